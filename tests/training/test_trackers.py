"""Trackers get the figures of a run."""

import json
import sys
from pathlib import Path

import pytest

from polar import InputError
from polar.cli.main import main
from polar.training.config import PretrainConfig

SHAPE = {"vocab-size": 300, "hidden-size": 16, "intermediate-size": 32, "num-layers": 1, "num-heads": 1}


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "triples.jsonl"
    rows = [
        {"prompt": f"{n}?", "reference": "red fox", "positive": f"red {n}", "negative": f"{n} 7"} for n in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_tensorboard_gets_the_figures(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "my-run"
    shape = [word for name, value in SHAPE.items() for word in (f"--scratch.{name}", str(value))]
    flags = ["--data", data, "--output", str(output), "--max-steps", "4", "--log-steps", "2"]
    evaluation = ["--max-length", "128", "--max-response-length", "32", "--eval-data", data, "--eval-steps", "4"]
    status = main(["pretrain", *flags, *evaluation, *shape, "--report-to", "tensorboard"])
    assert status == 0, capsys.readouterr().err
    (directory,) = output.glob("run/runs/*")
    events = EventAccumulator(str(directory)).Reload()
    written = json.loads((output / "run" / "trainer_state.json").read_text())["log_history"]
    for name in ("loss", "accuracy", "learning_rate", "triples_per_second", "tokens_per_second"):
        found = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        expected = {entry["step"]: entry[name] for entry in written if "loss" in entry}
        assert found == pytest.approx(expected), name
    assert [event.step for event in events.Scalars("eval/accuracy")] == [4]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    words = ["finetune", "--model", "none", "--data", "none", "--output", str(tmp_path / "out"), "--report-to", name]
    assert main(words) == 2
    assert capsys.readouterr().err.strip().endswith(f"report_to: {name} is not installed: pip install {name}")
    assert not (tmp_path / "out").exists()


def test_a_directory_of_a_trackers_name_is_not_the_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some trackers keep their files in a directory of that name, where the command may be run again."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match="wandb is not installed"):
        PretrainConfig(data=["x"], output="y", report_to=["wandb"])


def test_an_unknown_tracker_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match="expected one of tensorboard, wandb, trackio, found 'paper'"):
        PretrainConfig(data=["x"], output="y", report_to=["paper"])
