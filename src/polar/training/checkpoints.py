"""Resumable checkpoints that are either whole or not there, and a clean stop when the machine is taken away."""

from __future__ import annotations

import logging
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

log = logging.getLogger(__name__)

COMPLETE = "complete"
"""A file in a checkpoint's directory, written when everything else is there."""


class MarkComplete(TrainerCallback):
    """Marks a checkpoint when all processes have written their part of it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called after the checkpoint of this step was written."""
        processes = PartialState()
        processes.wait_for_everyone()
        if processes.is_main_process:
            (Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / COMPLETE).touch()


class StopOnSignal(TrainerCallback):
    """On SIGTERM, which batch systems send before they end a job: finish the step, save, stop."""

    def __init__(self) -> None:
        self.stopped = False
        self._before: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Listen from now on."""
        self._before = signal.signal(signal.SIGTERM, self._note)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save and stop if the signal came."""
        if self.stopped:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Listen no longer."""
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        log.warning("SIGTERM: saving after this step")
        self.stopped = True


def newest_complete(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; what a kill left half-written is removed."""
    found: dict[int, Path] = {}
    for directory in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (directory / COMPLETE).exists():
            found[int(directory.name.rpartition("-")[2])] = directory
        else:
            log.warning("%s: not complete, removed", directory)
            shutil.rmtree(directory)
    return found[max(found)] if found else None
