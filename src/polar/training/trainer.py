"""A reward model and its loss as one module, and Hugging Face Trainer on a stream of tree batches."""

from __future__ import annotations

import errno
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils.import_utils import is_in_notebook

from polar.core.errors import InputError
from polar.core.files import refusal
from polar.model.tree import TreeBatch, hidden_states, rewards
from polar.training.batches import Example
from polar.training.config import TrainConfig
from polar.training.distributed import alone, fail_together
from polar.training.objectives import LexicalAuxiliaryLoss, Objective
from polar.training.speed import LogLines, Meter
from polar.training.stream import BatchStream, held_out_batches

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What a disk refuses while training goes on; other `OSError`s may be those of a network."""


class RewardTrainer(Trainer):
    """Trainer on a stream of batches, with accuracy and speed in the logs, and evaluation by pairs."""

    def __init__(self, stream: BatchStream, share: Callable[[int, int], float] | None = None, **kwargs: Any) -> None:
        """Prepare a run.

        Args:
            stream: The micro-batches of the run.
            share: Share of the peak learning rate in a step, given the step and the number of steps
                (`polar.training.config.peak_share`); default: that of `args`.
            kwargs: Arguments of `Trainer`.
        """
        super().__init__(**kwargs)
        self.stream = stream
        self._share = share
        self._meter = Meter(self.model.model, self.args.device)  # type: ignore[union-attr]
        self._finite = FiniteLosses(self.model)  # type: ignore[arg-type]
        self.remove_callback(PrinterCallback)  # its lines are those of `LogLines` without units
        self.add_callback(LogLines())
        self.add_callback(self._finite)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does.

        Raises:
            InputError: the disk is full, so that a checkpoint is not whole.
        """
        try:
            return super().train(*args, **kwargs)
        except Exception as error:  # of the libraries that write a checkpoint each has a type of its own
            if (isinstance(error, OSError) and error.errno not in FULL) or (refused := refusal(error)) is None:
                raise
            raise InputError(
                f"{self.args.output_dir}: the checkpoint of step {self.state.global_step} cannot be written: "
                f"{refused}; make room, and the same command goes on from the newest whole one"
            ) from error

    def get_train_dataloader(self) -> DataLoader[Example]:
        """Return the whole run as one epoch, so that a position in it is one number (`polar.training.stream`)."""
        return self._loader(self.train_dataset, self.stream)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the learning rate over the steps."""
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
        """Return the discriminator's own loss, and count the figures of the next log line."""
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
        """Return Bradley-Terry loss (under every objective), accuracy (ties one half) and mean margin of the pairs.

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


class FiniteLosses(TrainerCallback):
    """End a run at a loss that is not finite, with the names of its records, before it can reach the weights.

    The losses of all micro-batches are looked at once per optimizer step: before that nothing synchronises with the
    device, and there all processes come, and stop, together.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._losses: list[Tensor] = []
        self._names: list[Sequence[str]] = []

    def add(self, loss: Tensor, names: Sequence[str]) -> None:
        """Keep the loss of a micro-batch and the names of its examples."""
        self._losses.append(loss.detach())
        self._names.append(names)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Look at the losses of the step.

        Raises:
            InputError: a loss is not finite, on whichever process.
        """
        losses, names = torch.stack(self._losses), self._names
        self._losses, self._names = [], []
        with fail_together():
            for number in torch.nonzero(~torch.isfinite(losses)).flatten().tolist()[:1]:
                raise self._not_finite(losses[number].item(), names[number])

    def _not_finite(self, loss: float, names: Sequence[str]) -> InputError:
        # Of a sharded model this process looks at its own part: the other processes do not come here.
        own = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in self._model.parameters())
        broken = not all(bool(torch.isfinite(weight).all()) for weight in own)
        cause = (
            "the weights were not finite before it, so an earlier step was too large: use a lower learning_rate"
            if broken
            else "the weights are finite: look at these records, or use a lower learning_rate"
        )
        return InputError(f"the loss is {loss} in the batch of records {', '.join(names)}; {cause}")


class Discriminator(nn.Module):
    """A reward model together with its loss, so that any data-parallel wrapper sees one forward call."""

    accepts_loss_kwargs = True
    """Trainer then gives `num_items_in_batch`: the labels of the whole optimizer step, over all its micro-batches and
    machines. It neither divides the loss by the number of micro-batches then, nor lets machines count as equal."""

    def __init__(self, model: Any, lexical_weight: float = 0.0, objective: Objective | None = None) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # what FSDP shards: the layers
        self.objective = objective or Objective()
        self.probes = LexicalAuxiliaryLoss(model.config.hidden_size) if lexical_weight > 0 else None
        self.lexical_weight = lexical_weight
        if not all(weight.requires_grad for weight in model.parameters()):  # adapters are trained
            self.register_state_dict_post_hook(_leave_out_frozen)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_post_hook(_need_no_frozen)  # type: ignore[no-untyped-call]

    def forward(
        self,
        batch: TreeBatch,
        better_P: Tensor,
        worse_P: Tensor,
        margin_N: Tensor,
        labels: Tensor,
        names: Sequence[str],
        overlap_BT: Tensor | None = None,
        closeness_BT3: Tensor | None = None,
        select_BT: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Return this batch's share of the mean loss over all comparisons of the step, and the margins of its pairs.

        The names of the examples are not needed: they belong to the batch, for messages (`FiniteLosses`).
        """
        output = hidden_states(self.model, batch, output_hidden_states=self.probes is not None)
        rewards_N = rewards(self.model, batch, output.last_hidden_state)
        loss = self.objective(rewards_N, better_P, worse_P, margin_N)
        if self.probes is not None and overlap_BT is not None and closeness_BT3 is not None and select_BT is not None:
            middle_BTH = output.hidden_states[len(output.hidden_states) // 2]
            auxiliary = self.probes(middle_BTH, output.last_hidden_state, overlap_BT, closeness_BT3, select_BT)
            loss = loss + len(labels) * self.lexical_weight * auxiliary
        loss = loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        return {"loss": loss, "margins": rewards_N[better_P] - rewards_N[worse_P]}


def _saved(module: nn.Module) -> set[str]:
    """Names in a checkpoint of the run: frozen weights are those of the base model, on disk already."""
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    return trained | {name for name, _ in module.named_buffers()}


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in state.keys() - {prefix + name for name in _saved(module)}:
        del state[name]


def _need_no_frozen(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in _saved(module)]


def training_arguments(config: TrainConfig, run: Path, evaluate: bool) -> TrainingArguments:
    """Return the arguments of a run in a directory; batches and the learning rate over time are not among them.

    Those are in the stream (`polar.training.stream`) and in the schedule (`polar.training.config.peak_share`).
    """
    return TrainingArguments(
        output_dir=str(run),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=1,  # all epochs and steps are in the stream
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        bf16=uses_bf16(config),
        seed=config.seed,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,  # such a loss ends the run
        save_steps=config.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=config.eval_steps if evaluate else None,
        report_to=config.report_to or "none",  # type: ignore[arg-type]  # a list, too
        run_name=Path(config.output).name,
        project="polar",
        disable_tqdm=not (sys.stderr.isatty() or is_in_notebook()),  # then there are log lines (`LogLines`)
        remove_unused_columns=False,
        label_names=[],
        dataloader_num_workers=0,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # every trained weight takes part in every loss
        fsdp=config.fsdp,  # type: ignore[arg-type]  # a flag; its type is that of an older form
        fsdp_config={"version": 2, "state_dict_type": "SHARDED_STATE_DICT"},
    )


def uses_bf16(config: TrainConfig) -> bool:
    """Return whether products are computed in bfloat16."""
    return torch.cuda.is_available() if config.bf16 is None else config.bf16
