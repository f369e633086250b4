"""`polar parity` against servers that answer with the real model, and against others."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from polar import RewardModel
from polar.cli.main import main
from polar.cli.serve import QUESTIONS, compare
from polar.core.template import EncodedGroup
from tests.client.fakes import Fake, Ids, Reply, sglang, vllm


@pytest.fixture(scope="module")
def nano() -> RewardModel:
    return RewardModel.load("polar-nano", device="cpu", dtype="float32")


@pytest.fixture
def answers(nano: RewardModel) -> Iterator[Fake]:
    """vLLM with the bundled model."""

    def honest(number: int, path: str, sequences: list[Ids]) -> Reply:
        rewards = nano.score_encoded([EncodedGroup([], [ids], []) for ids in sequences])
        numbers = iter([values[0] for values in rewards])
        return Reply(body=vllm(sequences, lambda ids: next(numbers)))

    with Fake("vllm", honest) as fake:
        yield fake


def test_an_honest_server_agrees(answers: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "parity.json"
    assert main(["parity", answers.address, "--output", str(report), "--device", "cpu"]) == 0
    table = capsys.readouterr().err
    assert "largest difference" in table
    assert "rewards/s" in table
    found = json.loads(report.read_text())
    assert found["inputs"] == len(found["rewards"]) == len(QUESTIONS) ** 2
    assert found["max_difference"] < 1e-4
    assert found["kendall"] == pytest.approx(1, abs=1e-3)
    assert found["tokens_per_second"] > 0


def test_files_of_groups_and_triples_are_taken(answers: Fake, tmp_path: Path) -> None:
    groups, triples, report = (str(tmp_path / name) for name in ("groups.jsonl", "triples.jsonl", "parity.json"))
    Path(groups).write_text(json.dumps({"prompt": "a", "reference": "b", "candidates": ["c", "d", "e"]}) + "\n")
    Path(triples).write_text(json.dumps({"prompt": "a", "reference": "b", "positive": "c", "negative": "d"}) + "\n")
    words = ["parity", answers.address, groups, "--triples", triples, "--output", report, "--engine", "vllm"]
    assert main([*words, "--device", "cpu"]) == 0
    assert json.loads(Path(report).read_text())["inputs"] == 5


def test_a_server_with_another_bias_is_measured_and_refused(
    nano: RewardModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def biased(number: int, path: str, sequences: list[Ids]) -> Reply:
        numbers = iter([values[0] for values in nano.score_encoded([EncodedGroup([], [ids], []) for ids in sequences])])
        return Reply(body=sglang(sequences, lambda ids: next(numbers) + 0.0259))

    report = tmp_path / "parity.json"
    with Fake("sglang", biased) as fake:
        words = ["parity", fake.address, "--device", "cpu", "--limit", "2"]
        assert main([*words, "--output", str(report)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("polar: error:")]
    assert "differ by up to 0.026, more than the tolerance 0.001" in line
    assert "score.bias" in line
    assert json.loads(report.read_text())["max_difference"] == pytest.approx(0.0259, abs=1e-4)
    with Fake("sglang", biased) as fake:
        words = ["parity", fake.address, "--device", "cpu", "--limit", "2"]
        assert main([*words, "--tolerance", "0.1"]) == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["127.0.0.1:1"], "no server answers: http://127.0.0.1:1: ConnectError"),
        (["127.0.0.1:1", "--limit", "0"], "limit must be at least 1"),
        (["127.0.0.1:1", "--output", "nowhere/parity.json"], "in a directory that exists"),
        (["127.0.0.1:1", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_mistakes_are_one_line(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("polar: error:")]
    assert reason in line


def test_ranks_are_compared_beside_differences() -> None:
    found = compare([1.0, 2.0, 4.0, 3.0], [1.0, 2.0, 3.0, 4.0], tokens=40, seconds=2.0)
    assert (found.max_difference, found.mean_difference) == (1.0, 0.5)
    assert found.kendall == pytest.approx(4 / 6)
    assert found.spearman == pytest.approx(0.8)
    assert (found.rewards_per_second, found.tokens_per_second) == (2.0, 20.0)
    assert compare([1.0, 1.0], [1.0, 2.0], 2, 1.0).kendall is None
