"""`evaluate` from Python: the same records as the command, also in a thread and inside an event loop."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from polar import InputError, RewardModel
from polar.cli.main import main
from polar.data.writers import record_to_dict
from polar.evaluation.manifest import read_manifest
from polar.evaluation.records import read_records
from polar.evaluation.run import evaluate
from polar.evaluation.suites import Suite
from polar.evaluation.summary import SUMMARY
from tests.evaluation.evaluating import triples, write_rows


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite.of_files(triples=[write_rows(tmp_path / "triples.jsonl", list(map(record_to_dict, triples())))])


def test_python_gives_what_the_command_gives(
    suite: Suite, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--triples", suite.datasets[0].path, "--model", str(checkpoint)]
    assert main([*words, "--output", str(tmp_path / "command")]) == 0
    summary = evaluate(str(checkpoint), suite)
    assert summary.table() == capsys.readouterr().out
    summary.save(tmp_path / "python")
    command, python = tmp_path / "command", tmp_path / "python"
    assert (python / SUMMARY).read_text("utf-8") == (command / SUMMARY).read_text("utf-8")
    assert list(read_records(python, texts=True)) == list(read_records(command, texts=True))
    started = {"started": ""}
    assert read_manifest(python).model_copy(update=started) == read_manifest(command).model_copy(update=started)
    with pytest.raises(InputError, match="exists already"):
        summary.save(python)
    temporary = summary.directory
    assert temporary.is_dir()
    del summary
    assert not temporary.exists()


def test_it_works_in_a_thread_and_inside_an_event_loop(suite: Suite, llama: RewardModel) -> None:
    async def cell() -> str:
        return evaluate(llama, suite).table()

    with ThreadPoolExecutor(1) as pool:
        in_thread = pool.submit(evaluate, llama, suite).result()
    assert in_thread.table() == asyncio.run(cell())
    assert in_thread.results[0].items == 24


def test_a_loaded_model_is_known_by_its_weights(suite: Suite, checkpoint: Path, tmp_path: Path) -> None:
    model = RewardModel.load(checkpoint)
    output = tmp_path / "out"
    evaluate(model, suite, output=output)
    before = (output / "records" / "triples-00000.parquet").stat().st_mtime_ns
    evaluate(model, suite, output=output)  # nothing is scored again
    assert (output / "records" / "triples-00000.parquet").stat().st_mtime_ns == before
    facts = json.loads((output / "manifest.json").read_text("utf-8"))["model"]
    assert (facts["name"], facts["dtype"]) == (str(checkpoint), "float32")
    with torch.no_grad():
        next(model.model.parameters()).flatten()[0] += 1
    with pytest.raises(InputError, match="records of another run .its model"):
        evaluate(model, suite, output=output)
    with pytest.raises(InputError, match="loaded already"):
        evaluate(model, suite, dtype="bfloat16")


def test_without_a_model_there_are_the_baselines(suite: Suite) -> None:
    summary = evaluate(None, suite, limit=5)
    assert summary.manifest.model is None
    assert "model" not in summary.results[0].accuracy
