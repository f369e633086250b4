import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from polar import Comparison, InputError, Preference, RewardModel
from polar.cli.main import main
from polar.core.records import Message, prompt_id, text_of
from polar.data.writers import record_to_dict
from polar.evaluation.manifest import read_manifest
from polar.evaluation.records import WITHOUT_REFERENCE, Record, read_records
from polar.evaluation.report import build_report
from polar.evaluation.run import evaluate as evaluate_suite
from polar.evaluation.suites import Suite
from polar.evaluation.summary import SUMMARY, summarise
from tests.evaluation.evaluating import triples, write_rows

PREFERENCES = [
    Preference("Capital of China?", "It is Beijing", ("Beijing it is", "no", "Shanghai"), domain="QA"),
    Preference("Capital of China?", "It is Beijing", ("It is Beijing", "It is Shanghai"), domain="QA"),
    Preference("写代码", (Message("assistant", "分数"),), ((Message("assistant", "分"),), "答"), domain="Coding"),
    Preference("Why?", "Because", ("same", "same")),
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    return (
        write_rows(tmp_path / "triples.jsonl", list(map(record_to_dict, triples()))),
        write_rows(tmp_path / "preferences.jsonl", list(map(record_to_dict, PREFERENCES))),
    )


def evaluate(output: Path, files: tuple[str, str], *, model: Path | None = None, **settings: Any) -> list[Record]:
    evaluate_suite(model, Suite.of_files(triples=[files[0]], preferences=[files[1]]), output=output, **settings)
    return list(read_records(output, texts=True))


def test_the_summary_is_printed_as_json(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["eval", "--triples", files[0], "--baselines-only", "--output", str(output), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((output / SUMMARY).read_text("utf-8"))
    assert printed["results"][0]["items"] == 24


def test_every_item_is_recorded_with_the_rewards_of_all_scorers(
    checkpoint: Path, files: tuple[str, str], tmp_path: Path
) -> None:
    records = evaluate(tmp_path / "out", files, model=checkpoint, without_reference=True)
    model = RewardModel.load(checkpoint)
    assert [(each.dataset, each.number) for each in records] == [
        *(("triples", number) for number in range(24)),
        *(("preferences", number) for number in range(4)),
    ]
    for record in records:
        assert record.candidates is not None
        for reference, name in ((record.reference, "model"), ("", WITHOUT_REFERENCE)):
            outputs = [Comparison(record.prompt, reference, candidate) for candidate in record.candidates]
            assert record.rewards[name] == pytest.approx(tuple(model.score(outputs)), abs=1e-4)
        assert record.lengths == tuple(map(len, record.candidates))
        assert record.reference_length == len(record.reference or "")
    assert list(records[0].rewards) == list(read_manifest(tmp_path / "out").scorers)
    triple, ranked, copy = records[0], records[24], records[25]
    assert (triple.policies, triple.reference_policy, triple.quality) == (("A", "B"), "A", (1, 0))
    assert triple.candidates == ("It is Beijing indeed 0", "score?")
    assert triple.rewards["unigram F1"] == (pytest.approx(2 * 3 / 8), 0)
    assert (ranked.quality, ranked.domain, ranked.prompt_id) == ((2, 1, 0), "QA", prompt_id("Capital of China?"))
    assert copy.copies_reference == (True, False)
    assert records[26].candidates == tuple(map(text_of, PREFERENCES[2].ranked))


def test_records_can_be_read_without_texts_and_with_sql(files: tuple[str, str], tmp_path: Path) -> None:
    records = evaluate(tmp_path / "out", files)
    without = list(read_records(tmp_path / "out"))
    assert without == [replace(record, prompt=None, reference=None, candidates=None) for record in records]
    assert {record.further_references for record in records} == {None}
    query = (
        'select dataset, avg((rewards."unigram F1"[1] > rewards."unigram F1"[2])::int) '
        f"from '{tmp_path}/out/records/*.parquet' group by dataset order by dataset"
    )
    assert duckdb.sql(query).fetchall() == [("preferences", 0.75), ("triples", pytest.approx(2 / 3))]


def test_the_manifest_says_what_was_evaluated(checkpoint: Path, files: tuple[str, str], tmp_path: Path) -> None:
    evaluate(tmp_path / "out", files, model=checkpoint)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.finished
    assert manifest.model is not None
    assert (manifest.model.dtype, manifest.model.max_length) == ("float32", 512)
    assert manifest.scorers[0] == "model"
    assert manifest.scorers[-1] == "chance"
    assert [(each.name, each.task, each.items) for each in manifest.datasets] == [
        ("triples", "policy discrimination", 24),
        ("preferences", "preference accuracy", 4),
    ]
    assert manifest.datasets[1].reference == 'column "reference"'
    other = tmp_path / "other.jsonl"
    other.write_text(Path(files[0]).read_text("utf-8").replace("score?", "score!"), "utf-8")
    evaluate_suite(None, Suite.of_files(triples=[other]), output=tmp_path / "changed")
    changed = read_manifest(tmp_path / "changed").datasets[0]
    assert changed.hash != manifest.datasets[0].hash
    short = evaluate(tmp_path / "short", files, model=checkpoint, max_length=300)
    again = read_manifest(tmp_path / "short").model
    assert again is not None
    assert again.hash == manifest.model.hash
    assert again.template_hash != manifest.model.template_hash
    assert len(short) == 28


class Killed(BaseException):
    """Like a kill, nothing catches it."""


def test_a_run_that_was_killed_goes_on_from_its_records(
    checkpoint: Path, files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polar.evaluation.records.SHARD_ITEMS", 5)
    expected = evaluate(tmp_path / "whole", files, model=checkpoint)
    score, calls = RewardModel.score_encoded, 0

    def score_a_little(self: RewardModel, groups: Sequence[Any], **settings: Any) -> list[list[float]]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed
        return score(self, groups, **settings)

    monkeypatch.setattr(RewardModel, "score_encoded", score_a_little)
    with pytest.raises(Killed):
        evaluate(tmp_path / "out", files, model=checkpoint)
    shards = sorted((tmp_path / "out" / "records").iterdir())
    assert [shard.name for shard in shards] == [f"triples-0000{number}.parquet" for number in range(3)]
    assert not read_manifest(tmp_path / "out").finished
    assert list(read_records(tmp_path / "out", texts=True)) == expected[:15]
    before = [shard.stat().st_mtime_ns for shard in shards]
    assert evaluate(tmp_path / "out", files, model=checkpoint) == expected
    assert calls == 4 + 3  # two more of the triples, one of the preferences
    assert [shard.stat().st_mtime_ns for shard in shards] == before
    whole, resumed = (read_manifest(tmp_path / name) for name in ("whole", "out"))
    assert [each.hash for each in resumed.datasets] == [each.hash for each in whole.datasets]


def test_a_process_that_is_killed_goes_on_where_it_was(files: tuple[str, str], tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "reference": f"it is {n}", "chosen": f"{n}", "rejected": "no"} for n in range(2500)]
    path = write_rows(tmp_path / "many.jsonl", rows)

    words = ["eval", "--preferences", path, "--baselines-only", "--output", str(tmp_path / "killed")]
    process = subprocess.Popen([sys.executable, "-m", "polar.cli.main", *words], stdout=subprocess.DEVNULL)
    shards = [tmp_path / "killed" / "records" / f"many-{number:05}.parquet" for number in range(3)]
    deadline = time.monotonic() + 120
    while not shards[0].exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    written = {shard: shard.stat() for shard in shards if shard.exists()}
    assert 0 < len(written) < 3
    assert not read_manifest(tmp_path / "killed").finished
    for name in ("killed", "whole"):
        evaluate_suite(None, Suite.of_files(preferences=[path]), output=tmp_path / name)
    for shard, before in written.items():  # what was there is not scored again
        assert (shard.stat().st_mtime_ns, shard.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    killed, whole = (list(read_records(tmp_path / name, texts=True)) for name in ("killed", "whole"))
    assert killed == whole
    assert len(killed) == 2500
    summaries = [(tmp_path / name / "summary.json").read_text("utf-8") for name in ("killed", "whole")]
    assert summaries[0] == summaries[1]


def test_records_of_another_run_or_of_other_data_are_never_mixed(
    checkpoint: Path, files: tuple[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    evaluate(output, files, model=checkpoint)
    with pytest.raises(InputError, match="records of another run .its settings"):
        evaluate(output, files, model=checkpoint, limit=3)
    with pytest.raises(InputError, match="its model: .*, weights .*; now: .*, weights"):
        evaluate(output, files, model=checkpoint, max_length=300)
    text = Path(files[0]).read_text("utf-8")
    Path(files[0]).write_text(text.replace("score?", "score!"), "utf-8")
    with pytest.raises(InputError, match="triples-00000.parquet: holds records of other items"):
        evaluate(output, files, model=checkpoint)
    Path(files[0]).write_text(text, "utf-8")
    (output / "manifest.json").unlink()
    with pytest.raises(InputError, match="records without a manifest"):
        evaluate(output, files, model=checkpoint)
    with pytest.raises(InputError, match="no manifest.json; expected a directory that `polar eval --output` wrote"):
        list(read_records(output))
    (output / "manifest.json").write_text("{}", "utf-8")
    with pytest.raises(InputError, match="cannot be read as a manifest"):
        list(read_records(output))


def test_the_same_suite_may_be_named_in_another_way(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"datasets: [{{name: a, path: '{files[0]}', task: policy discrimination}}]", "utf-8")
    for name in (str(suite), "suite.yaml"):
        monkeypatch.chdir(tmp_path)
        evaluate_suite(None, name, output=tmp_path / "out")
    assert len(list(read_records(tmp_path / "out"))) == 24


def test_data_that_became_shorter_are_noticed(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polar.evaluation.records.SHARD_ITEMS", 12)
    evaluate(tmp_path / "out", files)
    lines = Path(files[0]).read_text("utf-8").splitlines(keepends=True)
    Path(files[0]).write_text("".join(lines[:12]), "utf-8")
    with pytest.raises(InputError, match="triples-00001.parquet: holds records of other items"):
        evaluate(tmp_path / "out", files)


def test_a_damaged_record_file_is_named(files: tuple[str, str], tmp_path: Path) -> None:
    evaluate(tmp_path / "out", files)
    (tmp_path / "out" / "records" / "triples-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="triples-00000.parquet: cannot be read as records"):
        list(read_records(tmp_path / "out"))


def test_the_command_shows_what_the_records_say(
    checkpoint: Path, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = " ".join(
        evaluate_suite(checkpoint, Suite.of_files(triples=[files[0]], preferences=[files[1]]), output=tmp_path / "out")
        .table()
        .split()
    )
    summary = summarise(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    assert content["results"] == json.loads(json.dumps([asdict(result) for result in summary.results]))
    for result in summary.results:
        assert f"{100 * result.accuracy['model'].mean:.1f}" in shown
        assert result.difference is not None
        assert result.difference.verdict() in shown
    assert "1 of 4 items the better candidate is the reference itself" in shown
    assert 'preferences: references: column "reference"' in shown


def test_items_that_do_not_fit_are_counted(checkpoint: Path, tmp_path: Path) -> None:
    long = replace(triples()[0], negative="number " * 400)
    path = write_rows(tmp_path / "long.jsonl", [record_to_dict(triple) for triple in (*triples(), long)])
    evaluate_suite(checkpoint, Suite.of_files(triples=[path]), output=tmp_path / "out")
    (result,) = summarise(tmp_path / "out").results
    assert (result.items, result.truncated, result.reference_copies) == (25, 1, 0)
    *fitting, last = read_records(tmp_path / "out")
    assert last.cut_tokens[0] == 0
    assert last.cut_tokens[1] > 200
    assert not any(any(record.cut_tokens) for record in fitting)


def test_bad_rows_are_an_error_or_are_counted(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with Path(files[0]).open("a", encoding="utf-8") as file:
        file.write('{"prompt": "no reference"}\n')
    with pytest.raises(InputError, match=r"triples\.jsonl:25"):
        evaluate_suite(None, Suite.of_files(triples=[files[0]]))
    assert "skipped 1 rows" in evaluate_suite(None, Suite.of_files(triples=[files[0]]), on_bad_row="skip").table()


def test_a_suite_with_perturbations_best_of_n_and_official_scores_is_evaluated_in_one_command(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(
        tmp_path / "best.jsonl",
        [
            {
                "prompt": f"{n}+1?",
                "reference": f"It is {n + 1}",
                "candidates": ["It is", f"{n + 1}", "no"],
                "quality": [0, 1, 0],
            }
            for n in range(12)
        ],
    )
    (tmp_path / "suite.yaml").write_text(
        "datasets:\n"
        "  - {name: best, path: best.jsonl, task: best of N, perturbations: [upper case, prompt injection]}\n"
        "  - {name: right, path: best.jsonl, task: verifiable correctness, scoring: RMB}\n"
    )
    summary = evaluate_suite(checkpoint, tmp_path / "suite.yaml", limit=5)
    shown = summary.table()
    for words in ("best of N: best", "N=2", "by the rules of RMB", "prompt injection", "AUC, all prompts"):
        assert words in shown
    assert {each.probe for each in summary.sensitivity} == {"upper case", "prompt injection"}
    assert summary.best_of_n[0].curves["model"][0].quality.count == 5  # of the items, not of perturbed ones
    assert summary.official[0].scores["chance"]["overall"] == 0


def test_several_references_are_scored_one_by_one_and_aggregated(checkpoint: Path, tmp_path: Path) -> None:
    preference = {"prompt": "2+2?", "references": ["It is 4", "Four"], "chosen": "4", "rejected": "5"}
    discrimination = {"prompt": "2+2?", "references": ["4", "4!", "=4"], "positive": "4.", "negative": "five"}
    single = {"prompt": "3+3?", "reference": "6", "chosen": "It is 6", "rejected": "7"}
    write_rows(tmp_path / "p.jsonl", [preference, single])
    write_rows(tmp_path / "d.jsonl", [discrimination])
    (tmp_path / "suite.yaml").write_text(
        "datasets:\n"
        "  - {name: p, path: p.jsonl, task: preference accuracy, aggregate: mean, probes: [doubled]}\n"
        "  - {name: d, path: d.jsonl, task: policy discrimination}\n"
    )
    evaluate_suite(checkpoint, tmp_path / "suite.yaml", output=tmp_path / "out")
    records = list(read_records(tmp_path / "out", texts=True))
    assert [(each.task, len(each.by_reference["model"] if each.by_reference else ())) for each in records] == [
        ("preference accuracy", 2),
        ("sensitivity", 2),
        ("preference accuracy", 0),
        ("sensitivity", 0),
        ("policy discrimination", 3),
    ]
    model = RewardModel.load(checkpoint)
    first, *_, last = records
    assert (first.reference, first.further_references) == ("It is 4", ("Four",))
    assert first.by_reference is not None
    for reference, rewards in zip(("It is 4", "Four"), first.by_reference["model"], strict=True):
        expected = model.score([Comparison("2+2?", reference, candidate) for candidate in ("4", "5")])
        assert rewards == pytest.approx(expected, abs=1e-4)
    assert first.rewards["model"] == pytest.approx(np.mean(first.by_reference["model"], axis=0))
    assert last.by_reference is not None
    assert last.rewards["model"] == pytest.approx(np.max(last.by_reference["model"], axis=0))
    assert {each.dataset for each in summarise(tmp_path / "out").several_references} == {"p", "d"}


def test_a_model_that_was_trained_without_references_reads_none(
    checkpoint: Path, files: tuple[str, str], tmp_path: Path
) -> None:
    blind = evaluate(tmp_path / "blind", files, model=checkpoint, reference_free=True)
    seeing = evaluate(tmp_path / "seeing", files, model=checkpoint, without_reference=True)
    for one, other in zip(blind, seeing, strict=True):
        assert one.rewards["model"] == pytest.approx(other.rewards[WITHOUT_REFERENCE], abs=1e-5)
        assert one.rewards["unigram F1"] == other.rewards["unigram F1"]
    assert "reads no references" in " ".join(build_report([tmp_path / "blind"]).warnings)


def test_a_benchmark_without_references_is_scored_with_empty_ones(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "2+2?", "chosen": "4", "rejected": "5"}])
    (tmp_path / "suite.yaml").write_text(
        f"datasets:\n  - {{name: p, path: {path}, task: preference accuracy, reference: {{absent: true}}}}\n"
    )
    evaluate_suite(None, tmp_path / "suite.yaml", output=tmp_path / "out")
    (record,) = read_records(tmp_path / "out", texts=True)
    assert (record.reference, record.reference_source) == ("", "none (an empty text)")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to evaluate"),
        (["--triples", "t.jsonl", "--limit", "0"], "limit must be at least 1, found 0"),
        (["--triples", "t.jsonl", "--output", "result.json"], "expected a directory"),
        (["s.yaml", "--triples", "t.jsonl"], "either a suite or"),
        (["--preferences", "p.jsonl", "--references", "r.jsonl", "--chosen-as-reference"], "give one of"),
        (["--triples", "t.jsonl", "--baselines-only", "--server-address", "127.0.0.1:1"], "a server has a model"),
    ],
)
def test_wrong_arguments_are_refused_before_the_work(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *words]) == 2
    assert message in capsys.readouterr().err


def test_files_of_the_same_name_keep_their_records_apart(tmp_path: Path) -> None:
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths.append(write_rows(tmp_path / name / "data set.jsonl", list(map(record_to_dict, triples()))))
    evaluate_suite(None, Suite.of_files(triples=paths), output=tmp_path / "out")
    assert [each.name for each in read_manifest(tmp_path / "out").datasets] == ["data-set", "data-set_2"]
    results = summarise(tmp_path / "out").results
    assert [(each.dataset, each.items) for each in results] == [(None, 48), ("data-set", 24), ("data-set_2", 24)]
