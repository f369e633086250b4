"""Our trainer beside TRL's RewardTrainer: the same random model, the same triples, the same machine, in turn.

    python benchmarks/training.py --references 200,800 --dtype float32,bfloat16 --rounds 3 --report training

Token ids are random; prompt 100, reference 200, outputs about 200 tokens (half to one and a half times). A batch is the
whole data set, so that all sides see the same batch at every step and their losses can be compared. TRL gets what it
would get from a user: two padded sequences per triple, each with prompt and reference in it. "separate" is our own
trainer without shared prefixes: the same sequences, unpadded. bfloat16 is autocast on all sides, as `bf16=True` of
both trainers sets it. Lengths, types and sides take turns within a round, every second round in reverse.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback
from trl import RewardConfig
from trl import RewardTrainer as TrlTrainer

from polar.core.template import EncodedGroup, Truncation
from polar.corpus.plan import BUNDLED_TOKENIZER
from polar.model.backbone import prepare
from polar.training.batches import Collator, Example
from polar.training.example_store import write_examples
from polar.training.stream import BatchStream
from polar.training.trainer import Discriminator, RewardTrainer

VOCABULARY, SCORE = 8192, 3
STEPS = 4
"""Steps of a round; the first one is not timed."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
"""Largest difference of a loss that starts at about 0.7; bfloat16 is looser, it has 8 significant bits."""
SIDES = ("TRL", "separate", "tree")


@dataclass(frozen=True, slots=True)
class Result:
    """One side with references of one length in one type."""

    reference: int
    dtype: str
    side: str
    seconds: list[float]
    """Per step, one for each round."""
    triples_per_second: float
    """Median of the rounds."""
    ratios: list[float]
    """Speed / speed of TRL in the same type, one per round."""
    ratios_to_first: list[float]
    """Speed / speed of TRL in the first type, one per round."""
    difference: float
    """Largest difference of a loss from TRL's in the same type."""


def main() -> None:
    """Parse the command line, measure, and write a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--triples", type=int, default=8, help="triples of a batch")
    parser.add_argument("--references", default="200", help="tokens of the reference, for example 200,800")
    parser.add_argument("--dtype", default="float32", help="for example float32,bfloat16")
    parser.add_argument("--report", type=Path, required=True, help="name of the report, without .json and .md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lengths, dtypes = [int(length) for length in arguments.references.split(",")], arguments.dtype.split(",")
    results = measure(lengths, dtypes, arguments.triples, arguments.rounds)
    machine = (
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, TRL {trl.__version__}"
    )
    table = f"{markdown(results, dtypes[0])}\n{machine}, batches of {arguments.triples} triples\n"
    print(table)
    arguments.report.with_suffix(".md").write_text(table, "utf-8")
    report = {"machine": machine, "triples": arguments.triples, "runs": [asdict(result) for result in results]}
    arguments.report.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def measure(lengths: list[int], dtypes: list[str], triples: int, rounds: int) -> list[Result]:
    """All sides in turn."""
    groups = {length: make_groups(triples, length) for length in lengths}
    keys = list(itertools.product(lengths, dtypes, SIDES))
    seconds: dict[tuple[int, str, str], list[float]] = {key: [] for key in keys}
    differences: dict[tuple[int, str, str], list[float]] = {key: [] for key in keys}
    for number in range(rounds):
        losses = {}
        for length, dtype, side in keys if number % 2 == 0 else reversed(keys):
            run = train_trl if side == "TRL" else partial(train_polar, shared=side == "tree")
            elapsed, losses[length, dtype, side] = run(groups[length], dtype == "bfloat16")
            seconds[length, dtype, side].append(elapsed)
        for (length, dtype, side), own in losses.items():
            largest = max(abs(a - b) for a, b in zip(own, losses[length, dtype, "TRL"], strict=True))
            if largest > TOLERANCE[dtype]:
                raise SystemExit(f"{side}, {dtype}, reference {length}: a loss differs from TRL's by {largest:.1e}")
            differences[length, dtype, side].append(largest)

    def ratios(length: int, dtype: str, own: list[float]) -> list[float]:
        return [first / second for first, second in zip(seconds[length, dtype, "TRL"], own, strict=True)]

    return [
        Result(
            length,
            dtype,
            side,
            own,
            triples / statistics.median(own),
            ratios(length, dtype, own),
            ratios(length, dtypes[0], own),
            max(differences[length, dtype, side]),
        )
        for (length, dtype, side), own in seconds.items()
    ]


def markdown(results: list[Result], first: str) -> str:
    """One line per length, type and side: median, lowest and highest ratio."""
    titles = ["reference", "type", "side", "triples/s", "ratio to TRL", f"to TRL in {first}", "largest loss difference"]
    lines = [f"| {' | '.join(titles)} |", "|---:|---|---|---:|---|---|---:|"]
    for result in results:
        same, other = (
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            for ratios in (result.ratios, result.ratios_to_first)
        )
        speed, difference = f"{result.triples_per_second:.2f}", f"{result.difference:.1e}"
        cells = [str(result.reference), result.dtype, result.side, speed, same, other, difference]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def make_groups(count: int, reference: int) -> list[EncodedGroup]:
    """Random tokens in the layout of a triple."""
    random = np.random.default_rng(0)

    def tokens(length: int) -> list[int]:
        return random.integers(10, VOCABULARY, length).tolist()

    groups = []
    for _ in range(count):
        branches = [[*tokens(int(random.integers(100, 301))), SCORE] for _ in range(2)]
        prompt = tokens(100)
        groups.append(EncodedGroup([*prompt, *tokens(reference), 2, *prompt], branches, [Truncation(0, 0, 0)] * 2))
    return groups


def model() -> LlamaForSequenceClassification:
    """20 M parameters, the same weights every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=0,
        max_position_embeddings=8192,
    )
    return LlamaForSequenceClassification(config)


class Clock(TrainerCallback):
    """Seconds per step without the first one."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def settings(directory: str, batch: int, bf16: bool) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": directory,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": bf16,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "activation_checkpointing": False,
    }


def train_polar(groups: list[EncodedGroup], bf16: bool, *, shared: bool) -> tuple[float, list[float]]:
    """Seconds per step and losses of our trainer."""
    from transformers import TrainingArguments

    with tempfile.TemporaryDirectory() as directory:
        examples = [Example(group, ((0, 1),), str(number)) for number, group in enumerate(groups)]
        store = write_examples(Path(directory) / "examples.arrow", examples, {})
        arguments = TrainingArguments(**settings(directory, len(groups), bf16), label_names=[], num_train_epochs=1)
        clock, own = Clock(), model()
        prepare(own)
        trainer = RewardTrainer(
            BatchStream(store.lengths, len(groups), turns=STEPS),
            model=Discriminator(own),
            args=arguments,
            train_dataset=store,
            data_collator=Collator() if shared else separate,
            callbacks=[clock],
        )
        trainer.train()
        return clock.seconds(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def separate(examples: list[Example]) -> dict[str, Any]:
    """A batch in which every candidate has its own prefix."""
    alone = [
        Example(EncodedGroup([], [example.group.prefix + branch], [Truncation(0, 0, 0)]), (), example.name)
        for example in examples
        for branch in example.group.branches
    ]
    inputs = Collator()(alone)
    pairs = torch.arange(0, len(alone), 2)
    return {**inputs, "better_P": pairs, "worse_P": pairs + 1, "labels": pairs}


def train_trl(groups: list[EncodedGroup], bf16: bool) -> tuple[float, list[float]]:
    """Seconds per step and losses of TRL."""
    data = Dataset.from_dict(
        {
            "chosen_ids": [group.prefix + group.branches[0] for group in groups],
            "rejected_ids": [group.prefix + group.branches[1] for group in groups],
        }
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(BUNDLED_TOKENIZER), pad_token="<pad>", eos_token="<|score|>")
    with tempfile.TemporaryDirectory() as directory:
        arguments = RewardConfig(
            **settings(directory, len(groups), bf16), max_length=None, max_steps=STEPS, disable_dropout=True
        )
        clock = Clock()
        trainer = TrlTrainer(
            model=model(), args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
        )
        trainer.train()
        return clock.seconds(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
