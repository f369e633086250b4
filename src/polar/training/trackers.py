"""Experiment trackers: what a run logs goes to TensorBoard, Weights & Biases or trackio, with the run's settings."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Collection
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from polar.core.errors import InputError
from polar.training.config import Tracker

PROJECT = "polar"
"""Project in wandb and trackio; the environment variable WANDB_PROJECT names another one for wandb."""

Log = Callable[[dict[str, float], int], None]


def check_trackers(names: Collection[str]) -> None:
    """See whether the trackers can be used.

    Raises:
        InputError: one of them is unknown or not installed.
    """
    for name in names:
        if name not in get_args(Tracker):
            raise InputError(f"report_to: expected one of {', '.join(get_args(Tracker))}, found {name!r}")
        found = find_spec(name)
        if found is None or found.origin is None:  # the second one is a directory that happens to have the name
            raise InputError(f"report_to: {name} is not installed: pip install {name}")


class Trackers(TrainerCallback):
    """Sends every log line to the trackers, from the main process only."""

    def __init__(self, names: Collection[str], output: Path, settings: dict[str, Any]) -> None:
        """Begin a run in every tracker, or go on with that of an interrupted run.

        Args:
            names: Which trackers.
            output: Directory of the trained checkpoint: its name is the name of the run, and local files of trackers
                go to `<output>/run`.
            settings: The resolved configuration, which becomes the run's hyperparameters.

        Raises:
            InputError: a tracker does not start.
        """
        self._open = [_start(name, output, settings) for name in names] if PartialState().is_main_process else []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Send a log line: training figures as `train/...`, those of held-out data as `eval/...`."""
        values = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
            for name, value in (logs or {}).items()
        }
        for send, _close in self._open:
            send(values, state.global_step)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Finish the run in every tracker."""
        for _send, close in self._open:
            close()
        self._open = []


def _start(name: str, output: Path, settings: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    """A tracker's function for values of a step, and the one that ends its run."""
    try:
        return _tensorboard(output, settings) if name == "tensorboard" else _wandb(name, output, settings)
    except Exception as error:  # trackers raise errors of many kinds: no account, no network, no disk
        raise InputError(f"report_to: {name} does not start: {' '.join(str(error).split())}") from error


def _tensorboard(output: Path, settings: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(output / "run" / "tensorboard"))
    writer.add_hparams(_flat(settings), {}, run_name=".")

    def send(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, writer.close


def _wandb(name: str, output: Path, settings: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    """Weights & Biases, and trackio, which has the same interface.

    A run that goes on has a file with its id. wandb finds it by that, trackio by its name.
    """
    file = output / "run" / f"{name}-id"
    goes_on = file.exists()
    if not goes_on:
        file.write_text(uuid.uuid4().hex, "utf-8")
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        where = {"project": project, "id": file.read_text("utf-8"), "dir": str(output / "run")}
    else:
        where = {"project": PROJECT}
    resume = "allow" if goes_on else "never"
    run = import_module(name).init(name=output.name, config=settings, resume=resume, **where)
    return lambda values, step: run.log(values, step=step), run.finish


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as TensorBoard takes them: without levels, and lists as text."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": found for inner, found in _flat(value).items()}
        else:
            flat[name] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return flat
