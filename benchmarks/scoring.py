"""How fast groups are scored: prefix sharing against padded batches and against one text at a time.

    python benchmarks/scoring.py --rounds 5 --threads 2 --report scoring.json

A random Llama of 20 M parameters scores groups of K candidates (prompt about 100 tokens, reference 200, outputs 200).
The ways take turns within a round, in one process, since the machine may be busy with other things; the ratio of a
round is what counts.

- padded: `AutoModelForSequenceClassification`, batches of 16 full texts in the order of the input, padded.
- single: the same, one text at a time, so without padding and without a mask.
- shared: one group at a time with its prefix computed once (`polar.model.tree`), and nothing else changed.
- polar: `RewardModel.score_encoded`, which also packs rows and chooses the faster matrix products of torch.

Encoding of the texts is not timed; it is the same for all. `error` is the largest difference from the rewards of single
texts in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from polar import BUNDLED_MODEL, RewardModel, Template
from polar.model.tree import rewards, tree_batch
from polar.template import EncodedGroup

BATCH = 16
COUNTS = [1, 2, 4, 8, 16, 32, 64]


@dataclass(frozen=True, slots=True)
class Result:
    """One way on one load."""

    dtype: str
    candidates_per_group: int
    candidates: int
    way: str
    rewards_per_second: float
    """Median of the rounds."""
    ratios: list[float]
    """Speed of this way / speed of padded batches, one per round, in increasing order."""
    error: float
    spread: float
    """Standard deviation of the rewards, to judge the error by."""

    @property
    def ratio(self) -> float:
        """The ratio in the middle."""
        return statistics.median(self.ratios)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that warms up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--candidates", type=int, default=64, help="candidates of a load, at least one group")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="candidates per group, one load each")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--report", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    results: list[Result] = []
    print("| dtype | K | way | rewards/s | ratio | lowest to highest | error | spread |")
    print("|---|---:|---|---:|---:|---|---:|---:|")
    with TemporaryDirectory() as directory:
        save_random_model(Path(directory))
        for dtype in arguments.dtypes:
            for count in arguments.counts:
                for result in measure(Path(directory), dtype, count, arguments.candidates, arguments.rounds):
                    results.append(result)
                    speed = f"{result.rewards_per_second:.1f} | {result.ratio:.2f}"
                    spread = f"{result.ratios[0]:.2f} to {result.ratios[-1]:.2f}"
                    error = f"{result.error:.1e} | {result.spread:.2f}"
                    print(f"| {dtype} | {count} | {result.way} | {speed} | {spread} | {error} |", flush=True)
    if arguments.report is not None:
        runs = [{**asdict(result), "ratio": result.ratio} for result in results]
        arguments.report.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n", "utf-8")


def save_random_model(directory: Path) -> None:
    """A Llama whose rewards spread, with the template of the bundled model."""
    template = Template.load(BUNDLED_MODEL).with_lengths(2048, 512)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        num_labels=1,  # type: ignore[call-arg]  # taken by the base class
        initializer_range=0.06,
    )
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    RewardModel(LlamaForSequenceClassification(config), tokenizer, template).save(directory)


def random_groups(count: int, candidates: int) -> list[EncodedGroup]:
    """Token ids of groups with `count` candidates each; no padding id among them."""
    generator = random.Random(count)

    def tokens(mean: int) -> list[int]:
        return [generator.randrange(10, 8000) for _ in range(max(10, round(generator.gauss(mean, mean / 4))))]

    groups = []
    for _ in range(max(1, candidates // count)):
        prompt = tokens(100)
        groups.append(EncodedGroup([1, *prompt, *tokens(200), 2, *prompt], [tokens(200) for _ in range(count)], []))
    return groups


def measure(directory: Path, dtype: str, count: int, candidates: int, rounds: int) -> list[Result]:
    """Score one load in all ways, in turn."""
    plain = AutoModelForSequenceClassification.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    exact = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    polar = RewardModel.load(directory, device="cpu", dtype=dtype)
    groups = random_groups(count, candidates)
    sequences = [ids for group in groups for ids in group.sequences()]
    ways: dict[str, Callable[[], list[float]]] = {
        "padded": lambda: padded(plain, sequences),
        "single": lambda: single(plain, sequences),
        "shared": lambda: shared(polar.model, groups),
        "polar": lambda: [reward for values in polar.score_encoded(groups) for reward in values],
    }
    expected = single(exact, sequences)
    errors = {way: max(abs(a - b) for a, b in zip(run(), expected, strict=True)) for way, run in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - start)
    return [
        Result(
            dtype,
            count,
            len(sequences),
            way,
            len(sequences) / statistics.median(seconds[way]),
            sorted(base / own for base, own in zip(seconds["padded"], seconds[way], strict=True)),
            errors[way],
            statistics.pstdev(expected),
        )
        for way in ways
    ]


@torch.inference_mode()
def padded(model: Any, sequences: list[list[int]]) -> list[float]:
    """Batches of full texts, padded on the right."""
    values: list[float] = []
    for start in range(0, len(sequences), BATCH):
        batch = sequences[start : start + BATCH]
        longest, pad = max(map(len, batch)), model.config.pad_token_id
        ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in batch])
        values += model(ids, attention_mask=(ids != pad).long()).logits[:, 0].tolist()
    return values


@torch.inference_mode()
def single(model: Any, sequences: list[list[int]]) -> list[float]:
    """One text at a time."""
    return [model(torch.tensor([ids])).logits.item() for ids in sequences]


@torch.inference_mode()
def shared(model: Any, groups: list[EncodedGroup]) -> list[float]:
    """One group at a time, its prefix computed once."""
    return [reward for group in groups for reward in rewards(model, tree_batch([group])).tolist()]


if __name__ == "__main__":
    main()
