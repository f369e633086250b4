"""Resumable runs: checkpoints that are complete or absent, a clean stop on a signal, and provenance."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Self, TypeVar

import yaml
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from polar.core.checkpoint import CHECKPOINT_FILE, checkpoint_directory, own_files, read_checkpoint_file
from polar.core.errors import InputError, TerminatedError
from polar.core.files import on_disk, write_text
from polar.core.version import __version__
from polar.data.readers import ReadReport
from polar.data.sources import sources
from polar.model.weights import weights_hash
from polar.training.config import PretrainConfig, TrainConfig
from polar.training.distributed import Sharding, largest

log = logging.getLogger(__name__)

Record = TypeVar("Record")

COMPLETE = "complete"
"""Last file of a checkpoint: the `Layout` of the run."""
MAY_CHANGE = {"output", "eval_data", "log_steps", "save_steps", "eval_steps", "report_to", "resume", "fsdp"}
"""Settings that may differ when a run goes on; its sharding is in the layout."""
RUN_FILES = ("config.yaml", "*.arrow", "trainer_state.json", "final", "runs")
"""Files of a run in its directory besides checkpoints (runs: of TensorBoard); everything else there is not ours."""
LAUNCHER_ECHO_SECONDS = 1.0
"""Seconds after Ctrl-C in which it is not taken for a second one: the terminal sends it to all processes, and launchers
pass it on to theirs once more."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run is laid out over processes, which may change while the position in the stream means the same."""

    processes: int
    batch_size: int
    """Examples per process and micro-batch."""
    sharding: Sharding


class MarkComplete(TrainerCallback):
    """Mark a checkpoint when all processes have written their part of it."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint of this step."""
        processes = PartialState()
        processes.wait_for_everyone()
        if processes.is_main_process:
            checkpoint = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_text(checkpoint / COMPLETE, json.dumps(asdict(self.layout)))


class StopOnSignal(TrainerCallback):
    """On SIGTERM, which batch systems send before they end a job, or on Ctrl-C: finish the step, save, stop.

    A signal to any process stops all of them after the same step. A second Ctrl-C ends the process at once. Signals are
    heard while this is entered as a context, and by the main thread only: elsewhere they do what they always do.
    """

    def __init__(self, resume: bool) -> None:
        """Listen as soon as this is entered.

        Args:
            resume: Whether the same command goes on with a run.
        """
        self.signal = 0
        """Number of the signal to whichever process; 0 for none."""
        self._same_command = "the same command" if resume else "the same command without --no-resume"
        self._heard = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that is not Python's

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save and stop if a signal came."""
        self.signal = largest(self.signal)
        if self.signal:
            control.should_save = control.should_training_stop = True
        return control

    def raise_if_stopped(self, state: TrainerState) -> None:
        """Raise if a signal cut the training short.

        Raises:
            TerminatedError: by SIGTERM.
            KeyboardInterrupt: by Ctrl-C.
        """
        if self.signal and state.global_step < state.max_steps:
            message = f"stopped at step {state.global_step}; {self._same_command} goes on from there"
            raise KeyboardInterrupt(message) if self.signal == signal.SIGINT else TerminatedError(message)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._heard = number, now
            again = "; once more ends it at once" if number == signal.SIGINT else ""
            log.warning("%s: saving after this step%s", signal.Signals(number).name, again)
        elif number == signal.SIGINT and now > self._heard + LAUNCHER_ECHO_SECONDS:
            raise KeyboardInterrupt(f"ended at once; {self._same_command} goes on from the newest checkpoint")


def newest_complete(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, and remove incomplete ones."""
    found = _checkpoints(run)
    for step, directory in list(found.items()):
        if not (directory / COMPLETE).exists():
            log.warning("%s: not complete, removed", directory)
            shutil.rmtree(found.pop(step))
    return found[max(found)] if found else None


def _checkpoints(run: Path) -> dict[int, Path]:
    """Checkpoints by their steps; a directory of another name is a copy that somebody keeps."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = {path: path.name.removeprefix(prefix) for path in run.glob(f"{prefix}*")}
    return {int(step): path for path, step in steps.items() if step.isdecimal()}


def begin_run(config: TrainConfig, layout: Layout) -> Path | None:
    """Make the directory of a run, and return the checkpoint from which the run in it goes on, if there is one.

    Raises:
        InputError: the run is finished, it was begun with other settings, the directory holds another model, or it
            cannot be written.
    """
    output = Path(config.output)
    run = output / "run"
    with on_disk(output):
        require_free(output)
        if not config.resume:  # its checkpoints would be taken for those of the new run
            for path in {*_checkpoints(run).values(), *(path for name in RUN_FILES for path in run.glob(name))}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        checkpoint = newest_complete(run)
        if checkpoint is not None:
            _require_same(run, checkpoint, asdict(config) | asdict(layout))
        run.mkdir(parents=True, exist_ok=True)
        config.save(run / "config.yaml")
    return checkpoint


def require_free(output: Path) -> None:
    """Check that a trained checkpoint can go into a directory.

    Raises:
        InputError: it is a file, or holds a checkpoint or other files that a checkpoint would replace.
        OSError: it cannot be read.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; the output of a training is a directory, choose another one")
    if (output / CHECKPOINT_FILE).exists():
        raise InputError(f"{output}: holds a trained checkpoint already; choose another output")
    others = [path.name for path in own_files(output)]
    if others and not (output / "run" / "config.yaml").exists():  # else a publication was killed halfway
        raise InputError(
            f"{output}: holds files that the trained checkpoint would replace ({', '.join(others[:3])}); choose "
            "another output"
        )


def _require_same(run: Path, checkpoint: Path, now: dict[str, Any]) -> None:
    """Check that the position in the stream of examples means the same as when the checkpoint was written."""
    saved = run / "config.yaml"
    if not saved.is_file():
        raise InputError(f"{run}: holds checkpoints but no config.yaml; put it back, or begin again with --no-resume")
    before = yaml.safe_load(saved.read_text("utf-8"))
    before |= json.loads((checkpoint / COMPLETE).read_text("utf-8"))
    if now["batch_tokens"] is None and now["sharding"] != "deepspeed":  # then only the product matters (`BatchStream`)
        for settings in (before, now):
            settings["batch_size x processes"] = settings.pop("batch_size") * settings.pop("processes")
    for name, value in now.items():
        if name not in MAY_CHANGE and before.get(name) != value:
            raise InputError(
                f"{run}: the run that was begun here has {name} {before.get(name)}, now it is {value}; go on with the "
                "same settings, choose another output, or begin again with --no-resume"
            )


class RecordFiles(Generic[Record]):
    """The records of several files, one after the other, and afterwards the facts about the files."""

    def __init__(self, read: Callable[..., Iterator[Record]], paths: Sequence[str], on_bad_row: str) -> None:
        self._read = read
        self._files = [(path, ReadReport()) for path in paths]
        self._on_bad_row = on_bad_row

    def __iter__(self) -> Iterator[Record]:
        for path, report in self._files:
            yield from self._read(path, on_bad_row=self._on_bad_row, report=report)
            if report.skipped:
                log.warning("%s: skipped %d of %d rows", path, report.skipped, report.read + report.skipped)

    def facts(self) -> list[dict[str, Any]]:
        """Return of every path the rows read and skipped, and the SHA-256 of its files (data sets have none)."""
        return [
            {"name": path, "rows": report.read, "skipped": report.skipped, "sha256": _hashes(path)}
            for path, report in self._files
        ]


def _hashes(path: str) -> dict[str, str]:
    found = {}
    for name, _ in sources(path):
        if Path(name).is_file():
            with Path(name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def base_facts(config: TrainConfig) -> dict[str, Any]:
    """Return name, weights hash, commit (of a hub name) and provenance of the model that a training starts from."""
    if isinstance(config, PretrainConfig) and config.model == "scratch":
        return {"name": "scratch"}
    directory = checkpoint_directory(config.model)
    facts = {"name": config.model, "hash": weights_hash(directory)}
    if directory.parent.name == "snapshots":
        facts["commit"] = directory.name
    if not (directory / CHECKPOINT_FILE).is_file():  # a language model
        return facts
    return {**facts, "provenance": read_checkpoint_file(directory).get("provenance") or {}}


def provenance_of(
    config: TrainConfig,
    base: dict[str, Any],
    data: Sequence[dict[str, Any]],
    eval_data: Sequence[dict[str, Any]],
    training: dict[str, Any],
) -> dict[str, Any]:
    """Return the provenance of a trained model; that of its start is below `base`.

    Args:
        config: The settings.
        base: From `base_facts`.
        data: From `RecordFiles.facts`.
        eval_data: The same of the held-out data.
        training: Groups, steps and figures of the run.
    """
    return {
        "made_by": f"polar {__version__} {'pretrain' if isinstance(config, PretrainConfig) else 'finetune'}",
        "base": base,
        "data": list(data),
        "eval_data": list(eval_data),
        "settings": asdict(config),
        "training": training,
        **({} if config.lora is None else {"lora": asdict(config.lora)}),
    }
