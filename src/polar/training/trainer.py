"""Hugging Face Trainer on a stream of tree batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from polar.core.errors import InputError
from polar.training.batches import Example
from polar.training.distributed import alone
from polar.training.finite import FiniteLosses
from polar.training.progress import Progress
from polar.training.speed import Meter
from polar.training.stream import BatchStream, held_out_batches


class RewardTrainer(Trainer):
    """Trainer on a stream of batches, with accuracy and speed in the logs, and evaluation by pairs."""

    def __init__(self, stream: BatchStream, share: Callable[[int, int], float] | None = None, **kwargs: Any) -> None:
        """Keyword arguments go to `Trainer`.

        Args:
            stream: The micro-batches of the run.
            share: Share of the peak learning rate in a step, given the step and the number of steps
                (`polar.training.schedules`); default: what `args` say.
            kwargs: What `Trainer` takes.
        """
        super().__init__(**kwargs)
        self.stream = stream
        self._share = share
        self._meter = Meter(self.model.model, self.args.device)  # type: ignore[union-attr]
        self._progress, self._finite = Progress(), FiniteLosses(self.model)  # type: ignore[arg-type]
        for theirs in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(theirs)
        self.add_callback(self._progress)
        self.add_callback(self._finite)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; the terminal is left as it was found, however it ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._progress.close()

    def get_train_dataloader(self) -> DataLoader[Example]:
        """The whole run as one epoch, so that a position in it is one number (`polar.training.stream`)."""
        return self._loader(self.train_dataset, self.stream)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate over the steps."""
        if self._share is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        share = self._share
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = LambdaLR(optimizer, lambda step: share(step, num_training_steps))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _loader(self, examples: Any, batches: Any) -> DataLoader[Example]:
        return DataLoader(
            examples,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and not self.args.use_cpu,
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The discriminator's own loss; what the next log line tells about it is counted."""
        self._meter.start()
        with alone():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._finite.add(loss, inputs["names"])
        self._meter.add(inputs["batch"], len(inputs["labels"]), outputs["margins"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add accuracy, mean margin and speed since the last log line, over all processes (`polar.training.speed`)."""
        if "loss" in logs:
            logs |= self._meter.read(self.accelerator.reduce, self.args.world_size)
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Bradley-Terry loss (under every objective), accuracy (ties one half) and mean margin of held-out pairs.

        Raises:
            InputError: a margin is not finite, on whichever process.
        """
        self._meter.pause()
        store = self.eval_dataset if eval_dataset is None else eval_dataset
        batches = held_out_batches(store.lengths, self.args.eval_batch_size, self.stream.batch_tokens)  # type: ignore[union-attr]
        turns = range(0, len(batches), self.args.world_size)
        # A process that has no batch left repeats the first one, since sharded models compute together; not counted.
        own = [turn + self.args.process_index for turn in turns]
        margins: list[float] = []
        broken: list[str] = []
        self.model.eval()  # type: ignore[union-attr]
        loader = self._loader(store, [batches[turn if turn < len(batches) else 0] for turn in own])
        self.callback_handler.eval_dataloader = loader
        for turn, inputs in zip(own, loader, strict=True):
            with torch.no_grad(), self.compute_loss_context_manager(), alone():
                found = self.model(**self._prepare_inputs(inputs))["margins"].float().tolist()  # type: ignore[misc]
            margins += found if turn < len(batches) else []
            broken += [] if all(map(math.isfinite, found)) else inputs["names"]
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.model.train()  # type: ignore[union-attr]
        if broken := gather_object(broken):
            raise InputError(
                f"a reward is not finite in the batch of held-out records {', '.join(broken)}; look at these records, "
                "or use a lower learning_rate"
            )
        margin = torch.tensor(gather_object(margins))
        metrics = {
            f"{metric_key_prefix}_loss": float(nn.functional.softplus(-margin).mean()),
            f"{metric_key_prefix}_accuracy": float(((margin > 0).float() + 0.5 * (margin == 0).float()).mean()),
            f"{metric_key_prefix}_margin": float(margin.mean()),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
