"""Pre-training and fine-tuning from the first record to the saved checkpoint, resumable."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from tokenizers import Tokenizer

from polar.core.checkpoint import BUNDLED, CHECKPOINT_FILE, checkpoint_directory, put_in_place
from polar.core.errors import InputError
from polar.core.files import on_disk
from polar.core.records import Preference, Triple, text_of
from polar.data.readers import read_preferences, read_triples
from polar.model.adapters import is_adapter, require_peft
from polar.model.reward_model import RewardModel
from polar.training.batches import (
    Collator,
    Cut,
    Example,
    drop_equal_pairs,
    examples_from_preferences,
    examples_from_triples,
    require_all_fit,
    require_several_policies,
)
from polar.training.checkpoints import (
    Layout,
    MarkComplete,
    RecordFiles,
    StopOnSignal,
    base_facts,
    begin_run,
    provenance_of,
)
from polar.training.config import FinetuneConfig, PretrainConfig, TrainConfig, peak_share
from polar.training.distributed import (
    fail_together,
    from_main,
    gathered,
    join_processes,
    reduce_in_float32,
    sharding,
)
from polar.training.example_store import ExampleStore, fingerprint_of, open_examples, write_examples
from polar.training.init_model import (
    add_adapters,
    fitting_lengths,
    from_language_model,
    from_scratch,
    train_tokenizer,
)
from polar.training.stream import BatchStream
from polar.training.trainer import Discriminator, RewardTrainer, training_arguments, uses_bf16

log = logging.getLogger(__name__)

Record = TypeVar("Record")

TOKENIZER_TRAINING_TRIPLES = 50_000
"""Triples for the training of the tokenizer of a model from scratch."""


def pretrain(config: PretrainConfig) -> RewardModel:
    """Train a policy discriminator on triples and save it to `config.output`.

    Where the model is sharded over several processes (FSDP2, DeepSpeed), the main one gets it whole and the others
    their shards: to score there, load the saved checkpoint.

    Raises:
        InputError: a setting, a file or a record is wrong, or a loss is not finite; all of several processes raise it.
        TerminatedError: SIGTERM stopped the run, after a checkpoint. Signals are heard in the main thread only.
        KeyboardInterrupt: Ctrl-C did so; a second one ends the run at once, without a checkpoint.
    """
    join_processes()
    if config.model == "scratch":
        tokenizer = from_main(lambda: _tokenizer(config))
        with fail_together():
            start = _scratch_model(config, tokenizer)
    else:
        with fail_together():
            start = _starting_model(config)
    template = start.template

    def examples(triples: Iterable[Triple]) -> Iterator[Example]:
        return examples_from_triples(require_several_policies(triples), template)

    return _train(config, start, read_triples, examples, config.lexical_weight)


def finetune(config: FinetuneConfig) -> RewardModel:
    """Fine-tune a reward model on preferences and save it to `config.output`.

    Result and errors as in `pretrain`.
    """
    join_processes()
    with fail_together():
        start = _starting_model(config)
    template = start.template

    def examples(preferences: Iterable[Preference]) -> Iterator[Example]:
        return examples_from_preferences(preferences, template)

    return _train(config, start, read_preferences, examples, lexical_weight=0.0)


def _train(
    config: TrainConfig,
    start: RewardModel,
    read: Callable[..., Iterator[Record]],
    encoded: Callable[[Iterable[Record]], Iterator[Example]],
    lexical_weight: float,
) -> RewardModel:
    output = Path(config.output)
    run = output / "run"
    with fail_together():
        layout = Layout(PartialState().num_processes, config.batch_size, sharding(config.fsdp))
    checkpoint = from_main(lambda: begin_run(config, layout))
    base = from_main(lambda: base_facts(config))
    encoding = _encoding(start)

    def examples(name: str, paths: list[str], *, keep: bool) -> ExampleStore:
        file, fingerprint = run / name, {**fingerprint_of(paths, encoding), "base": base.get("hash")}
        found = open_examples(file, fingerprint) if keep else None
        if found is not None:
            return found
        reading, cut = RecordFiles(read, paths, config.on_bad_row), Cut()
        made = drop_equal_pairs(require_all_fit(cut.count(encoded(reading)), start.model))
        return write_examples(file, made, fingerprint, lambda: {"data": reading.facts(), "cut": asdict(cut)})

    training = from_main(lambda: examples("examples.arrow", config.data, keep=checkpoint is not None))
    held_out = from_main(lambda: examples("held-out.arrow", config.eval_data, keep=False)) if config.eval_data else None
    if config.lora is None:
        start.model.to(torch.float32)  # type: ignore[arg-type]  # master weights
    objective = config.objective()
    _prepare(start.model, config)
    stop = StopOnSignal(config.resume)
    with fail_together():
        stream = _stream(config, training)
    trainer = RewardTrainer(
        stream,
        partial(peak_share, schedule=config.schedule, warmup=config.warmup_ratio, decay=config.decay_ratio),
        model=Discriminator(start.model, lexical_weight, objective),
        args=training_arguments(config, run, bool(held_out)),
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=Collator(lexical_weight > 0, objective),
        callbacks=[MarkComplete(layout), stop],
    )
    reduce_in_float32(trainer)
    log.info("training on %d groups", len(training))
    with stop:
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    stop.raise_if_stopped(trainer.state)
    metrics = dict(result.metrics)
    if held_out:
        last = trainer.state.log_history[-1]  # the run's summary, after an evaluation of the last step if there was one
        done = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == last["step"]]
        metrics.update(done[-1] if done else trainer.evaluate())
    summary = {
        "groups": len(training),
        "cut": training.summary["cut"],
        "steps": trainer.state.global_step,
        "tokens": sum(int(training.lengths[batch].sum()) for batch in stream) * stream.processes,
        "metrics": metrics,
    }
    trained = RewardModel(
        gathered(trainer, start.model).eval(),
        start.tokenizer,
        start.template,
        provenance_of(config, base, training.summary["data"], held_out.summary["data"] if held_out else [], summary),
    )
    with fail_together():
        if trainer.is_world_process_zero():
            with on_disk(run):
                trainer.save_state()
            _publish(trained, output)
    return trained


def _encoding(model: RewardModel) -> dict[str, Any]:
    """Return the settings that the token ids of an example depend on, besides its texts."""
    vocabulary = hashlib.sha256(model.template.tokenizer.to_str().encode()).hexdigest()
    return {**asdict(model.template.settings), "tokenizer": vocabulary}


def _stream(config: TrainConfig, examples: ExampleStore) -> BatchStream:
    state = PartialState()
    stream = BatchStream(
        examples.lengths,
        config.batch_size,
        config.batch_tokens,
        seed=config.seed,
        process=state.process_index,
        processes=state.num_processes,
    )
    if config.max_steps > 0:
        return replace(stream, turns=config.max_steps * config.gradient_accumulation)
    return stream.for_epochs(config.epochs)


def _prepare(model: Any, config: TrainConfig) -> None:
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:  # layer by layer: they share one compiled graph, and names and losses stay outside of it
        for layer in getattr(model, model.base_model_prefix).layers:
            layer.compile(dynamic=True)


def _publish(model: RewardModel, output: Path) -> None:
    """Save the checkpoint into `output` itself, beside the run's own directory; killed in between, it is done again."""
    written = output / "run" / "final"
    with on_disk(output):
        for left in (*written.parent.glob(".final.*"), *written.parent.glob("final")):
            shutil.rmtree(left)
        model.save(written)
        put_in_place(written, output)
        written.rmdir()


def _starting_model(config: TrainConfig) -> RewardModel:
    """Return the model of a directory with `polar.json`, else a causal language model with a new head.

    With adapters if the settings ask for them; the frozen weights then have the type of the products.
    """
    torch.manual_seed(config.seed)  # of new embeddings and adapters
    lora, directory = config.lora, checkpoint_directory(config.model)
    whole = sharding(config.fsdp) == "none"
    if lora is not None:
        require_peft()
        if is_adapter(directory):
            raise InputError(f"{config.model}: is an adapter already; make a whole model of it with `polar convert`")
        if not whole:
            raise InputError("lora: every process needs a copy of the model; fsdp and deepspeed are for all weights")
    dtype = torch.bfloat16 if lora is not None and uses_bf16(config) else torch.float32
    in_4bit = lora is not None and lora.load_in_4bit
    local = directory == Path(config.model).expanduser() or config.model in BUNDLED
    new_tokens: list[int] = []
    if (directory / CHECKPOINT_FILE).is_file():
        start = RewardModel.load(directory, device=None if whole else "cpu", dtype=dtype, in_4bit=in_4bit)
        own, positions = start.template.settings, getattr(start.model.config, "max_position_embeddings", None)
        asked, usual = (config.max_length, config.max_response_length), (own.max_length, own.max_response_length)
        lengths = fitting_lengths(asked, usual, positions)
        start.template = start.template.with_lengths(*lengths)
    else:
        start = from_language_model(
            directory if local else config.model,
            max_length=config.max_length,
            max_response_length=config.max_response_length,
            dtype=dtype,
            in_4bit=in_4bit,
        )
        new_tokens = [start.template.settings.split_token_id, start.template.settings.score_token_id]
    if lora is not None:
        add_adapters(start, lora, str(directory.resolve()) if local else config.model, new_tokens)
    return start


def _tokenizer(config: PretrainConfig) -> Tokenizer:
    triples = islice(RecordFiles(read_triples, config.data, config.on_bad_row), TOKENIZER_TRAINING_TRIPLES)
    texts = (
        text_of(text)
        for triple in triples
        for text in (triple.prompt, triple.reference, triple.positive, triple.negative)
    )
    return train_tokenizer(texts, config.scratch.vocab_size)


def _scratch_model(config: PretrainConfig, tokenizer: Tokenizer) -> RewardModel:
    return from_scratch(
        tokenizer,
        config.scratch,
        max_length=config.max_length,
        max_response_length=config.max_response_length,
        seed=config.seed,
    )
