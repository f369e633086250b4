"""Pre-training and fine-tuning on Hugging Face Trainer, with the tree layout and the Bradley-Terry loss."""

from __future__ import annotations

import hashlib
import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from polar.errors import InputError
from polar.model.reward_model import RewardModel, checkpoint_directory
from polar.model.tree import TreeBatch, hidden_states, rewards
from polar.reading import ReadReport, read_preferences, read_triples
from polar.records import text_of
from polar.template import CHECKPOINT_FILE
from polar.training.batches import Collator, Example, examples_from_preferences, examples_from_triples
from polar.training.checkpoints import MarkComplete, StopOnSignal, newest_complete
from polar.training.config import FinetuneConfig, PretrainConfig, TrainConfig
from polar.training.objectives import LexicalProbes, Objective
from polar.training.scratch import from_language_model, from_scratch, train_tokenizer
from polar.training.store import ExampleStore, fingerprint_of, open_examples, write_examples
from polar.training.stream import BatchStream, batches_per_epoch

log = logging.getLogger(__name__)

TOKENIZER_TRAINING_TRIPLES = 50_000
"""How many triples the tokenizer of a model from scratch is trained on."""
MAY_CHANGE = {"output", "eval_data", "log_steps", "save_steps", "eval_steps", "report_to", "resume"}
"""Settings that may differ when a run goes on."""


def pretrain(config: PretrainConfig) -> RewardModel:
    """Train a policy discriminator on triples and save it to `config.output`."""
    start = _scratch_model(config) if config.model == "scratch" else _starting_model(config)
    template = start.template

    def examples(paths: Sequence[str]) -> Iterator[Example]:
        return examples_from_triples(_read(read_triples, paths, config), template)

    return _train(config, start, examples, config.lexical_weight)


def finetune(config: FinetuneConfig) -> RewardModel:
    """Fine-tune a reward model on preferences and save it to `config.output`."""
    start = _starting_model(config)
    template = start.template

    def examples(paths: Sequence[str]) -> Iterator[Example]:
        return examples_from_preferences(_read(read_preferences, paths, config), template)

    return _train(config, start, examples, lexical_weight=0.0)


class Discriminator(nn.Module):
    """A reward model together with its loss, so that any data-parallel wrapper sees one forward call."""

    accepts_loss_kwargs = True
    """Trainer then gives `num_items_in_batch`: the labels of the whole optimizer step, over all its micro-batches and
    machines. It neither divides the loss by the number of micro-batches then, nor lets machines count as equal."""

    def __init__(self, model: Any, lexical_weight: float = 0.0, objective: Objective | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective or Objective()
        self.probes = LexicalProbes(model.config.hidden_size) if lexical_weight > 0 else None
        self.lexical_weight = lexical_weight

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
        """This batch's share of the mean loss over all comparisons of the optimizer step, and the margins of its pairs.

        Raises:
            InputError: the loss is not finite; the message names the examples.
        """
        output = hidden_states(self.model, batch, output_hidden_states=self.probes is not None)
        rewards_N = rewards(self.model, batch, output.last_hidden_state)
        loss = self.objective(rewards_N, better_P, worse_P, margin_N)
        if self.probes is not None and overlap_BT is not None and closeness_BT3 is not None and select_BT is not None:
            middle_BTH = output.hidden_states[len(output.hidden_states) // 2]
            auxiliary = self.probes(middle_BTH, output.last_hidden_state, overlap_BT, closeness_BT3, select_BT)
            loss = loss + len(labels) * self.lexical_weight * auxiliary
        loss = loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise self._not_finite(loss.item(), names)
        return {"loss": loss, "margins": rewards_N[better_P] - rewards_N[worse_P]}

    def _not_finite(self, loss: float, names: Sequence[str]) -> InputError:
        broken = not all(bool(torch.isfinite(weight).all()) for weight in self.model.parameters())
        cause = (
            "the weights were not finite before it, so an earlier step was too large: use a lower learning_rate"
            if broken
            else "the weights are finite: look at these records, or use a lower learning_rate"
        )
        return InputError(f"the loss is {loss} in the batch of records {', '.join(names)}; {cause}")


class RewardTrainer(Trainer):
    """Trainer on a stream of batches, with accuracy and speed in the logs, and evaluation by pairs."""

    def __init__(self, stream: BatchStream, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stream = stream
        self._margins: list[Tensor] = []
        self._tokens = 0
        self._since = time.perf_counter()

    def get_train_dataloader(self) -> DataLoader[Example]:
        """The whole run as one epoch, so that a position in it is one number (`polar.training.stream`)."""
        return self._loader(self.train_dataset, self.stream)

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
        """The discriminator's own loss; its margins are kept for the next log line."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._margins.append(outputs["margins"].detach())
        self._tokens += inputs["batch"].ids_1T.numel()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add accuracy, mean margin and speed (of this process) since the last log line."""
        if self._margins and "loss" in logs:
            margins, seconds = torch.cat(self._margins).float(), time.perf_counter() - self._since
            logs["accuracy"] = _accuracy(margins)
            logs["margin"] = float(margins.mean())
            logs["pairs_per_second"] = round(len(margins) / seconds, 2)
            logs["tokens_per_second"] = round(self._tokens / seconds)
            self._margins, self._tokens, self._since = [], 0, time.perf_counter()
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Bradley-Terry loss (under every objective), accuracy (ties one half) and mean margin of held-out pairs."""
        store = self.eval_dataset if eval_dataset is None else eval_dataset
        size, order = self.args.eval_batch_size, np.argsort(-store.lengths, kind="stable")  # type: ignore[union-attr]
        batches = [order[start : start + size].tolist() for start in range(0, len(order), size)]
        turns = range(0, len(batches), self.args.world_size)
        # A process that has no batch left repeats the first one, since sharded models compute together; not counted.
        own = [turn + self.args.process_index for turn in turns]
        margins: list[float] = []
        self.model.eval()  # type: ignore[union-attr]
        loader = self._loader(store, [batches[turn if turn < len(batches) else 0] for turn in own])
        for turn, inputs in zip(own, loader, strict=True):
            with torch.no_grad(), self.compute_loss_context_manager():
                found = self.model(**self._prepare_inputs(inputs))["margins"]  # type: ignore[misc]
            margins += found.float().tolist() if turn < len(batches) else []
        self.model.train()  # type: ignore[union-attr]
        margin = torch.tensor(gather_object(margins))
        metrics = {
            f"{metric_key_prefix}_loss": float(nn.functional.softplus(-margin).mean()),
            f"{metric_key_prefix}_accuracy": _accuracy(margin),
            f"{metric_key_prefix}_margin": float(margin.mean()),
        }
        self.log(metrics)
        return metrics


def _accuracy(margins: Tensor) -> float:
    """Ties count one half."""
    return float(((margins > 0).float() + 0.5 * (margins == 0).float()).mean())


def _train(
    config: TrainConfig,
    start: RewardModel,
    read_examples: Callable[[Sequence[str]], Iterator[Example]],
    lexical_weight: float,
) -> RewardModel:
    output = Path(config.output)
    run = output / "run"
    if (output / "config.json").exists():
        raise InputError(f"{output}: holds a trained checkpoint already; choose another output")
    checkpoint = _begin(config, run)
    settings = _encoding(start)

    def examples(name: str, paths: list[str], *, keep: bool) -> ExampleStore:
        file, fingerprint = run / name, fingerprint_of(paths, settings)
        with PartialState().main_process_first():  # the others find its file
            found = open_examples(file, fingerprint) if keep or not PartialState().is_main_process else None
            return found or write_examples(file, read_examples(paths), fingerprint)

    training = examples("examples.arrow", config.data, keep=checkpoint is not None)
    held_out = examples("held-out.arrow", config.eval_data, keep=False) if config.eval_data else None
    start.model.to(torch.float32)  # type: ignore[arg-type]  # master weights
    objective = config.objective()
    stream = _stream(config, training)
    stop = StopOnSignal()
    trainer = RewardTrainer(
        stream,
        model=Discriminator(start.model, lexical_weight, objective),
        args=_arguments(config, run, bool(held_out)),
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=Collator(lexical_weight > 0, objective),
        callbacks=[MarkComplete(), stop],
    )
    log.info("training on %d groups", len(training))
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        log.warning("stopped at step %d; the same command goes on from there", trainer.state.global_step)
        raise SystemExit(128 + signal.SIGTERM)
    metrics = dict(result.metrics)
    if held_out:
        last = trainer.state.log_history[-1]  # the run's summary, after an evaluation of the last step if there was one
        done = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == last["step"]]
        metrics.update(done[-1] if done else trainer.evaluate())
    summary = {
        "groups": len(training),
        "steps": trainer.state.global_step,
        "tokens": sum(int(training.lengths[batch].sum()) for batch in stream) * stream.processes,
        "metrics": metrics,
    }
    trained = RewardModel(
        start.model.eval(), start.tokenizer, start.template, {**start.provenance, "training": summary}
    )
    if trainer.is_world_process_zero():
        trainer.save_state()
        _publish(trained, output)
    return trained


def _begin(config: TrainConfig, run: Path) -> Path | None:
    """Make the directory of a run, or find the checkpoint from which the run in it goes on."""
    with PartialState().main_process_first():
        if not config.resume:  # its checkpoints would be taken for those of the new run
            shutil.rmtree(run, ignore_errors=True)
        checkpoint = newest_complete(run)
        saved = run / "config.yaml"
        if checkpoint is not None:
            before, now = yaml.safe_load(saved.read_text("utf-8")), asdict(config)
            for name in now.keys() - MAY_CHANGE:
                if before.get(name) != now[name]:
                    raise InputError(
                        f"{run}: the run that was begun here has {name} {before.get(name)}, now it is {now[name]}; go "
                        "on with the same settings, choose another output, or begin again with --no-resume"
                    )
        run.mkdir(parents=True, exist_ok=True)
        config.save(saved)
    return checkpoint


def _encoding(model: RewardModel) -> dict[str, Any]:
    """What the token ids of an example depend on besides its texts."""
    vocabulary = hashlib.sha256(model.template.tokenizer.to_str().encode()).hexdigest()
    return {**asdict(model.template.settings), "tokenizer": vocabulary}


def _stream(config: TrainConfig, examples: ExampleStore) -> BatchStream:
    state = PartialState()
    per_epoch = batches_per_epoch(len(examples), config.batch_size, state.num_processes)
    if not per_epoch:
        raise InputError(f"{len(examples)} examples are too few for {state.num_processes} processes")
    if config.max_steps > 0:
        batches = config.max_steps * config.gradient_accumulation
    else:
        batches = max(1, round(config.epochs * per_epoch))
    return BatchStream(
        examples.lengths, config.batch_size, batches, config.seed, state.process_index, state.num_processes
    )


def _publish(model: RewardModel, output: Path) -> None:
    """Save the checkpoint into `output` itself, beside the run's own directory."""
    written = output / "run" / "final"
    model.save(written)
    for path in written.iterdir():
        path.replace(output / path.name)
    written.rmdir()


def _arguments(config: TrainConfig, run: Path, evaluate: bool) -> TrainingArguments:
    schedules: dict[str, tuple[str, dict[str, Any]]] = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        "linear": ("linear", {}),
        "constant": ("constant_with_warmup", {}),
    }
    schedule, schedule_kwargs = schedules[config.schedule]
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
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=schedule_kwargs,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of the steps, rounded up
        bf16=torch.cuda.is_available() if config.bf16 is None else config.bf16,
        seed=config.seed,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,  # such a loss ends the run
        save_steps=config.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=config.eval_steps if evaluate else None,
        report_to=config.report_to or "none",
        remove_unused_columns=False,
        label_names=[],
        dataloader_num_workers=0,
        use_cpu=not torch.cuda.is_available(),
    )


def _starting_model(config: TrainConfig) -> RewardModel:
    """A reward model when the directory holds `polar.json`, otherwise a causal language model with a new head."""
    path = Path(config.model).expanduser()
    if path.is_dir() and not (path / CHECKPOINT_FILE).is_file():
        return from_language_model(
            path, max_length=config.max_length or 16384, max_response_length=config.max_response_length or 4096
        )
    directory = checkpoint_directory(config.model)
    if not (directory / CHECKPOINT_FILE).is_file():
        return from_language_model(
            config.model, max_length=config.max_length or 16384, max_response_length=config.max_response_length or 4096
        )
    start = RewardModel.load(directory, dtype=torch.float32)
    start.template = start.template.with_lengths(config.max_length, config.max_response_length)
    return start


def _scratch_model(config: PretrainConfig) -> RewardModel:
    triples = islice(_read(read_triples, config.data, config), TOKENIZER_TRAINING_TRIPLES)
    texts = (
        text_of(text)
        for triple in triples
        for text in (triple.prompt, triple.reference, triple.positive, triple.negative)
    )
    return from_scratch(
        train_tokenizer(texts, config.scratch.vocab_size),
        config.scratch,
        max_length=config.max_length or config.scratch.max_positions,
        max_response_length=config.max_response_length or 1024,
        seed=config.seed,
    )


def _read(read: Any, paths: Sequence[str], config: TrainConfig) -> Iterator[Any]:
    for path in paths:
        report = ReadReport()
        yield from read(path, on_bad_row=config.on_bad_row, report=report)
        if report.skipped:
            log.warning("%s: skipped %d of %d rows", path, report.skipped, report.read + report.skipped)
