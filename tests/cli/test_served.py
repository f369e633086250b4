"""Commands that ask servers for rewards: the same results as in this process, and clear words when they fail."""

import json
from pathlib import Path

import pytest

from polar import RewardModel
from polar.cli.main import main
from polar.core.checkpoint import Calibration
from tests.client.fakes import Fake, Ids, Reply, rewards_of

ROWS = [
    {"prompt": f"Capital number {n}?", "reference": "It is Beijing.", "candidates": ["Beijing", "It is Shanghai", "no"]}
    for n in range(5)
]


@pytest.fixture
def calibrated(llama: RewardModel, tmp_path: Path) -> Path:
    model = RewardModel(
        llama.model, llama.tokenizer, llama.template, calibration=Calibration(mean=-2, std=4, temperature=1.5)
    )
    model.save(tmp_path / "calibrated")
    return tmp_path / "calibrated"


@pytest.mark.parametrize(
    "words",
    [
        ["score", "--explain"],
        ["score", "--scale", "zscore"],
        ["score", "--scale", "probability", "--max-length", "60", "--max-response-length", "8"],
        ["score", "--compat", "seed"],
        ["rank", "--top-k", "2"],
        ["rank", "--min-zscore", "0.4"],
    ],
)
def test_a_server_gives_the_same_results(
    words: list[str], llama: RewardModel, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "in.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    command, *flags = words
    words = [command, str(data), "--model", str(calibrated), *flags]
    assert main(words) == 0
    here = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with Fake("sglang", model=rewards_of(llama)) as server:
        assert main([*words, "--server-address", server.address, "--engine", "sglang"]) == 0
    there = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(there) == len(here) > 0
    for mine, served in zip(here, there, strict=True):
        numbers = {name for name in mine if name in ("reward", "zscore", "by_reference")}
        for name in numbers:
            assert served[name] == pytest.approx(mine[name], abs=1e-4)
        assert {name: served[name] for name in mine if name not in numbers} == {
            name: mine[name] for name in mine if name not in numbers
        }


def test_a_calibration_by_a_server_is_the_same(llama: RewardModel, checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "in.jsonl"
    rows = [{"prompt": "p", "reference": f"r {n}", "chosen": f"a {n}", "rejected": f"b {n} {n % 3}"} for n in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    words = ["calibrate", str(checkpoint), "--data", str(data)]
    assert main([*words, "--output", str(tmp_path / "here")]) == 0
    with Fake("vllm", model=rewards_of(llama)) as server:
        assert main([*words, "--server-address", server.address, "--output", str(tmp_path / "there")]) == 0
    here, there = (
        json.loads((tmp_path / name / "polar.json").read_text("utf-8"))["calibration"] for name in ("here", "there")
    )
    for name in ("mean", "std", "accuracy"):
        assert there[name] == pytest.approx(here[name], abs=1e-5)
    assert there["quantiles"] == pytest.approx(here["quantiles"], abs=1e-4)


@pytest.mark.parametrize("command", ["score", "rank"])
def test_a_server_that_fails_is_one_line_and_no_file(
    command: str, llama: RewardModel, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(number: int, path: str, sequences: list[Ids]) -> Reply | None:
        return Reply(400, {"detail": "out of order"}) if number else None

    data, to = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    words = [command, str(data), "--model", str(checkpoint), "--output", str(to)]
    with Fake("vllm", refuse, model=rewards_of(llama)) as server:
        assert main([*words, "--server-address", server.address]) == 2
        error = capsys.readouterr().err
        assert f"{server.address}: 15 of 15 rewards failed" in error
        assert "out of order" in error
        assert not to.exists()
        assert main([*words, "--server-address", server.address, "--dtype", "bfloat16"]) == 2
        assert "leave those flags out" in capsys.readouterr().err
    assert main([*words, "--engine", "vllm"]) == 2
    assert "give both" in capsys.readouterr().err
