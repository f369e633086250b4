"""Evaluation of a model that servers have: the same records, and nothing lost when a server fails."""

import json
from functools import partial
from pathlib import Path

import pytest

from polar import InputError, RewardModel
from polar.cli.main import main
from polar.data.writers import record_to_dict
from polar.evaluation.manifest import read_manifest
from polar.evaluation.records import read_records
from polar.evaluation.report import build_report
from polar.evaluation.run import evaluate
from polar.evaluation.suites import Suite
from tests.client.fakes import Fake, Ids, Reply, rewards_of
from tests.evaluation.evaluating import triples, write_rows
from tests.serving.serving import serving


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_rows(tmp_path / "triples.jsonl", list(map(record_to_dict, triples())))


def test_a_server_gives_the_records_that_the_model_gives(checkpoint: Path, data: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    run = partial(evaluate, checkpoint, Suite.of_files(triples=[data]), without_reference=True, max_response_length=8)
    run(output=here)
    with serving(model=checkpoint) as server:
        run(output=there, server_address=server.url, engine="polar")
    for local, served in zip(read_records(here), read_records(there), strict=True):
        for scorer in ("model", "no reference"):
            assert served.rewards[scorer] == pytest.approx(local.rewards[scorer], abs=1e-4)
        assert served.cut_tokens == local.cut_tokens
    local, served = read_manifest(here).model, read_manifest(there).model
    assert local is not None
    assert served is not None
    assert (served.hash, served.template_hash) == (local.hash, local.template_hash)
    assert (local.computed, served.computed) == ("polar, float32 on cpu", "a server (polar)")

    with pytest.raises(InputError, match="holds records of another run"):
        run(output=there)
    assert main(["eval", "report", str(here), str(there), "--output", str(tmp_path / "report.html")]) == 0
    assert "a server (polar)" in (tmp_path / "report.html").read_text("utf-8")
    assert "a server (polar)" in (tmp_path / "report.md").read_text("utf-8")
    assert len(build_report([here, there]).models) == 2


def test_a_server_that_fails_costs_no_record(
    llama: RewardModel, checkpoint: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polar.evaluation.records.SHARD_ITEMS", 10)
    sent = 0

    def refuse_the_third_shard(number: int, path: str, sequences: list[Ids]) -> Reply | None:
        nonlocal sent
        sent += len(sequences)
        return Reply(400, {"detail": "out of order"}) if sent > 2 * 20 + 3 else None

    output = tmp_path / "out"
    run = partial(evaluate, checkpoint, Suite.of_files(triples=[data]), output=output)
    with Fake("vllm", refuse_the_third_shard, model=rewards_of(llama)) as server:
        with pytest.raises(InputError, match="out of order"):
            run(server_address=server.address)
        recorded = len(list(read_records(output)))
    assert recorded == 20
    with Fake("vllm", model=rewards_of(llama)) as server:
        run(server_address=server.address)
        asked = sum(map(len, server.batches[1:]))
    assert asked == 2 * 4
    assert len(list(read_records(output))) == 24
    assert json.loads((output / "manifest.json").read_text("utf-8"))["datasets"][0]["finished"]


def test_a_server_of_another_model_is_refused(checkpoint: Path, data: str, tmp_path: Path) -> None:
    with Fake("vllm", model=lambda ids: 0.25) as server, pytest.raises(InputError, match="serves another model"):
        evaluate(checkpoint, Suite.of_files(triples=[data]), server_address=server.address, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_device_and_type_are_those_of_the_server(data: str) -> None:
    with pytest.raises(InputError, match="leave those flags out"):
        evaluate("polar-nano", Suite.of_files(triples=[data]), server_address="127.0.0.1:1", dtype="bfloat16")
