import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from polar import Group, RewardModel
from polar.cli.main import main
from polar.cli.rank import Counts, Limits, _kept
from polar.core.checkpoint import Calibration

ANSWERS = ["It is Beijing.", "Shanghai.", "I do not know.", "北京", ""]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def group(number: int) -> dict:
    return {
        "id": f"g{number}",
        "prompt": [{"role": "user", "content": f"Capital number {number}?"}],
        "reference": "It is Beijing.",
        "candidates": ANSWERS[: 2 + number % 4],
        "source": {"page": number},
    }


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def rank(*words: str, checkpoint: Path, to: Path) -> list[dict]:
    assert main(["rank", *words, "--model", str(checkpoint), "--output", str(to)]) == 0
    return read(to)


def test_flags_rank_one_group(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "Capital?", "--reference", "Beijing."]
    for answer in ANSWERS:
        words += ["--candidate", answer]
    assert main(["rank", *words, "--model", str(checkpoint)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (expected,) = RewardModel.load(checkpoint).score_groups([Group("Capital?", "Beijing.", tuple(ANSWERS))])
    best = sorted(zip(expected, ANSWERS, strict=True), reverse=True)
    assert [row["output"] for row in rows] == [answer for _, answer in best]
    assert [row["reward"] for row in rows] == [reward for reward, _ in best]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]


def test_a_terminal_gets_a_table(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    words = ["--prompt", "p", "--reference", "r", "--candidate", "[bold]first[/]", "--candidate", "-second"]
    assert main(["rank", *words, "--model", str(checkpoint)]) == 0
    output = capsys.readouterr().out
    assert "[bold]first[/]" in output
    assert "-second" in output
    assert "reward" in output


def test_rows_keep_their_other_columns_and_the_best_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [group(n) for n in range(300)])
    everything = rank(source, checkpoint=checkpoint, to=tmp_path / "all.jsonl")
    assert len(everything) == sum(len(group(n)["candidates"]) for n in range(300))
    for row in everything[:20]:
        number = int(row["id"][1:])
        assert row["output"] == group(number)["candidates"][row["candidate"]]
        assert {name: row[name] for name in ("prompt", "reference", "source")} == {
            name: group(number)[name] for name in ("prompt", "reference", "source")
        }
        assert "candidates" not in row
    best = rank(source, "--top-k", "2", checkpoint=checkpoint, to=tmp_path / "best.jsonl")
    assert best == [row for row in everything if row["rank"] <= 2]


def test_outputs_that_stand_together_are_ranked_like_a_list_of_candidates(checkpoint: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": group(n)["prompt"], "reference": "It is Beijing.", "output": answer, "policy": f"{n}-{i}"}
        for n in range(6)
        for i, answer in enumerate(group(n)["candidates"])
    ]
    single = rank(write(tmp_path / "rows.jsonl", rows), checkpoint=checkpoint, to=tmp_path / "rows.out.jsonl")
    source = write(tmp_path / "lists.jsonl", [group(n) for n in range(6)])
    listed = rank(source, checkpoint=checkpoint, to=tmp_path / "lists.out.jsonl")
    same = ("prompt", "output", "rank", "reward")
    assert [[row[name] for name in same] for row in single] == [[row[name] for name in same] for row in listed]
    assert [row["policy"] for row in single] == [f"{row['id'][1:]}-{row['candidate']}" for row in listed]


def test_a_prompt_that_comes_back_later_is_an_error(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": prompt, "reference": "r", "output": "o"} for prompt in "aba"]
    words = [write(tmp_path / "in.jsonl", rows), "--model", str(checkpoint), "--output", str(tmp_path / "out.jsonl")]
    assert main(["rank", *words]) == 2
    assert "in.jsonl:3: this prompt with this reference is in earlier rows" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_limits_drop_what_is_low_and_count_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", [group(n) for n in range(8)])
    everything = rank(source, checkpoint=checkpoint, to=tmp_path / "all.jsonl")
    limit = sorted(row["reward"] for row in everything)[len(everything) // 2]
    capsys.readouterr()
    kept = rank(source, "--min-reward", repr(limit), "--top-k", "1", checkpoint=checkpoint, to=tmp_path / "kept.jsonl")
    assert kept == [row for row in everything if row["reward"] >= limit and row["rank"] == 1]
    good = [row for row in everything if row["reward"] >= limit]
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"8 prompts, {len(everything)} candidates, {len(kept)} kept; dropped: {len(everything) - len(good)} below the "
        f"limit, {len(good) - len(kept)} not among the best 1; {8 - len(kept)} prompts keep nothing"
    )


def test_a_least_z_score_needs_a_calibration(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", [group(n) for n in range(4)])
    words = ["rank", source, "--model", str(checkpoint), "--min-zscore", "0", "--output", str(tmp_path / "out.jsonl")]
    assert main(words) == 2
    assert "polar calibrate" in capsys.readouterr().err
    everything = rank(source, checkpoint=checkpoint, to=tmp_path / "all.jsonl")
    model = RewardModel.load(checkpoint)
    model.calibration = Calibration(mean=everything[0]["reward"], std=2.0)
    model.save(checkpoint)
    assert main(words) == 0
    kept = read(tmp_path / "out.jsonl")
    assert all(row["zscore"] == pytest.approx((row["reward"] - everything[0]["reward"]) / 2) for row in kept)
    assert len(kept) == sum(row["reward"] >= everything[0]["reward"] for row in everything)


def test_equal_rewards_keep_their_order_and_limits_come_before_the_best_k() -> None:
    counts = Counts()
    rows = [{"reward": reward, "output": name} for reward, name in ((2.0, "a"), (1.0, "b"), (1.0, "c"), (0.0, "d"))]
    assert [row["output"] for row in _kept(rows, Limits(top_k=2, min_reward=1.0), counts)] == ["a", "b"]
    assert (counts.kept, counts.below_limit, counts.beyond_top_k, counts.empty_prompts) == (2, 1, 1, 0)
    assert _kept(rows, Limits(min_reward=3.0), counts) == []
    assert (counts.prompts, counts.below_limit, counts.empty_prompts) == (2, 5, 1)


def test_parquet_in_and_out(checkpoint: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "p", "reference": "r", "candidates": ANSWERS}])
    words = ["--model", str(checkpoint), "--output"]
    assert main(["rank", source, *words, str(tmp_path / "out.parquet")]) == 0
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    # What was ranked can be an input again, once its own columns are gone.
    again = tmp_path / "again.parquet"
    pq.write_table(pq.read_table(tmp_path / "out.parquet").drop_columns(["rank", "reward", "candidate"]), again)
    assert main(["rank", str(again), *words, str(tmp_path / "twice.jsonl")]) == 0
    assert [row["output"] for row in read(tmp_path / "twice.jsonl")] == [row["output"] for row in rows]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to rank: --prompt, --reference, --candidate missing"),
        (["--prompt", "p", "--reference", "r"], "--candidate missing"),
        (["x.jsonl", "--candidate", "c"], "not both"),
        (["--top", "1"], "unknown flag --top"),
        (["x.jsonl", "--top-k", "0"], "top_k must be at least 1"),
        (["x.jsonl"], "no such file"),
    ],
)
def test_bad_usage_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["rank", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": 1}, 'field "reward": expected no field of this name'),
        ({"output": "o"}, 'field "output": expected either candidates or output'),
        ({"candidates": []}, 'field "candidates"'),
    ],
)
def test_bad_rows_stop_or_are_skipped_and_counted(
    change: dict, message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", [group(0), {**group(1), **change}, group(2)])
    words = ["rank", source, "--model", str(checkpoint), "--output", str(tmp_path / "out.jsonl")]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert main([*words, "--on-bad-row", "skip"]) == 0
    assert "skipped 1 unreadable rows, used 2" in capsys.readouterr().err
    assert {row["id"] for row in read(tmp_path / "out.jsonl")} == {"g0", "g2"}
