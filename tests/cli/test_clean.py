"""`polar corpus clean` from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polar.cli.main import main

LOOPING = "Fine. " + "I am happy. " * 30
QUESTION = " ".join(f"word{n}x" for n in range(40))


def rows() -> list[dict[str, Any]]:
    base = {"prompt": "Is it?", "policy": "p", "sample": 0, "finish_reason": "stop"}
    return [
        base | {"output": LOOPING, "finish_reason": "length"},
        base | {"output": "I'm sorry, but I can't help with that.", "policy": "q"},
        base | {"output": " ", "policy": "q"},
        base | {"output": "It is so. And th", "policy": "q", "finish_reason": "length"},
        base | {"output": "Yes.", "prompt": QUESTION},
        base | {"output": "Yes.", "prompt": QUESTION + " please"},
        base | {"output": "Yes.", "prompt": "What is 2+2?"},
    ]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Two shards, as `polar sample` writes them."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    pq.write_table(pa.Table.from_pylist(rows()[:4]), directory / "shard-00000.parquet")
    pq.write_table(pa.Table.from_pylist(rows()[4:]), directory / "shard-00001.parquet")
    (directory / "_manifest.json").write_text("{}")
    return str(directory)


def test_a_corpus_is_cleaned_and_counted(tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(json.dumps({"question": "What is 2 + 2?", "answer": "4"}) + "\n")
    output = tmp_path / "clean.parquet"
    words = ["corpus", "clean", corpus, "--output", str(output), "--decontaminate", str(evaluation)]
    assert main([*words, "--drop", "refused", "--drop", "empty"]) == 0
    found = rows()
    assert pq.read_table(output).to_pylist() == [
        found[0] | {"output": "Fine. I am happy."},
        found[3] | {"output": "It is so."},
        found[4],
    ]
    report = json.loads((tmp_path / "clean.parquet.report.json").read_text())
    assert report["total"]["removed"] == {
        "refused": 1,
        "empty": 1,
        "near-duplicate prompt": 1,
        "contaminated prompt": 1,
    }
    assert report["shared_ngrams"] == {"what is 2 2": 1}
    assert "outputs ended in a repetition loop" in capsys.readouterr().err


def test_the_flags_do_what_they_say(tmp_path: Path, corpus: str) -> None:
    output, report = tmp_path / "clean.jsonl", tmp_path / "counts.json"
    words = ["corpus", "clean", corpus, "--output", str(output), "--report", str(report)]
    assert main([*words, "--drop", "empty,refused", "--keep-near-duplicates", "--cut-endings", "never"]) == 0
    kept = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["output"] for row in kept] == ["Fine. I am happy.", "It is so. And th", "Yes.", "Yes.", "Yes."]
    assert json.loads(report.read_text())["total"]["kept"] == 5
    assert not (tmp_path / "clean.jsonl.report.json").exists()


def test_the_same_input_gives_the_same_files(tmp_path: Path, corpus: str) -> None:
    for name in ("a", "b"):
        assert main(["corpus", "clean", corpus, "--output", str(tmp_path / f"{name}.jsonl")]) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (tmp_path / "a.jsonl.report.json").read_bytes() == (tmp_path / "b.jsonl.report.json").read_bytes()


def test_standard_output_gets_rows_alone(corpus: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["corpus", "clean", corpus, "--output", "-"]) == 0
    lines = capfdbinary.readouterr().out.splitlines()
    assert [json.loads(line)["policy"] for line in lines] == ["p", "q", "q", "q", "p", "p"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drop", "refusals"], "--drop refusals: expected empty, refused, duplicate"),
        (["--near-duplicate-threshold", "2"], "above 0 and at most 1"),
        (["--decontaminate", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, corpus: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "clean.jsonl"
    assert main(["corpus", "clean", corpus, "--output", str(output), *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("polar: error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not output.exists()


def test_an_output_without_rows_is_not_written(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "p", "policy": "q", "output": ""}) + "\n")
    output = tmp_path / "out.jsonl"
    assert main(["corpus", "clean", str(source), "--output", str(output), "--drop", "empty"]) == 2
    assert not output.exists()
