"""Train polar-mini on one GPU in minutes, on a machine that has torch, transformers and accelerate and nothing else.

    python recipes/mini/gpu.py encode START mixture.parquet groups.safetensors     # where the package is installed
    python recipes/mini/gpu.py train START groups.safetensors trained.safetensors --minutes 9
    python recipes/mini/gpu.py adopt START trained.safetensors TRAINED             # where the package is installed

START is a reward model directory (weights in 8 bits are read too). The second command reads the package's sources, not
its dependencies: texts are encoded before, weights come back as one file. `gpu.sh` calls it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))


def main() -> None:
    """One of the three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["encode", "train", "adopt"])
    parser.add_argument("start")
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--epochs", type=float, default=3.0, help="at most")
    parser.add_argument("--row-tokens", type=int, default=32768, help="of a step")
    parser.add_argument("--learning-rate", type=float, default=1.5e-4)
    arguments = parser.parse_args()
    {"encode": encode, "train": train, "adopt": adopt}[arguments.step](arguments)


def encode(arguments: argparse.Namespace) -> None:
    """Write the token ids of all groups of a mixture, one after the other, and where each part ends."""
    import pyarrow.parquet as pq

    from polar import RewardModel
    from polar.core.records import Triple
    from polar.training.batches import examples_from_triples

    template = RewardModel.load(arguments.start, device="cpu").template
    rows = pq.read_table(arguments.source).to_pylist()
    triples = (Triple(row["prompt"], row["reference"], row["positive"], row["negative"]) for row in rows)
    ids: list[int] = []
    lengths: list[int] = []  # of a group: number of branches, prefix, branches
    for example in examples_from_triples(triples, template):
        parts = [example.group.prefix, *example.group.branches]
        lengths += [len(parts) - 1, *map(len, parts)]
        ids += [token for part in parts for token in part]
    save_file({"ids": torch.tensor(ids, dtype=torch.int32), "lengths": torch.tensor(lengths)}, arguments.target)


def train(arguments: argparse.Namespace) -> None:
    """Train for so many minutes, the learning rate falling to zero over them; prints loss, accuracy and speed."""
    from transformers import AutoModelForSequenceClassification

    from polar.model.backbone import prepare
    from polar.model.tree import rewards

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForSequenceClassification.from_pretrained(arguments.start, dtype=torch.float32).to(device)
    prepare(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    groups = read_groups(arguments.source)
    total = arguments.epochs * sum(length(group) for group in groups)
    begin, seen, margins = time.monotonic(), 0, []
    for step, row in enumerate(rows(groups, arguments.row_tokens)):
        done = max((time.monotonic() - begin) / (60 * arguments.minutes), seen / total)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * min(1.0, (step + 1) / 20, 0.02 + 1.2 * (1 - done))
        batch, better, worse = lay_out(row, device)
        with torch.autocast(device, torch.bfloat16):
            rewards_N = rewards(model, batch)
        margins_P = rewards_N[better] - rewards_N[worse]
        loss = torch.nn.functional.softplus(-margins_P).mean()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"step {step}: the loss is {loss.item()}")
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += sum(map(length, row))
        margins += (margins_P > 0).float().tolist()
        if step % 20 == 0:
            speed = seen / (time.monotonic() - begin)
            accuracy = sum(margins[-2000:]) / len(margins[-2000:])
            print(f"step {step}: loss {loss.item():.4f}, accuracy {accuracy:.3f}, {speed:.0f} tokens/s", flush=True)
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in model.named_parameters()
    }
    save_file(weights, arguments.target)


def adopt(arguments: argparse.Namespace) -> None:
    """Make a checkpoint of the weights that came back."""
    from polar import RewardModel

    model = RewardModel.load(arguments.start, device="cpu", dtype="float32")
    model.model.load_state_dict(load_file(arguments.source))
    model.save(arguments.target)


def read_groups(path: str) -> list[list[list[int]]]:
    """Prefix and branches of every group."""
    found = load_file(path)
    ids, lengths = found["ids"].tolist(), found["lengths"].tolist()
    groups, place, at = [], 0, 0
    while at < len(lengths):
        parts = []
        for size in lengths[at + 1 : at + 2 + lengths[at]]:
            parts.append(ids[place : place + size])
            place += size
        groups.append(parts)
        at += 2 + lengths[at]
    return groups


def length(group: list[list[int]]) -> int:
    """Tokens of a group in a row."""
    return sum(map(len, group))


def rows(groups: list[list[list[int]]], tokens: int) -> Iterator[list[list[list[int]]]]:
    """Groups in random order, as many as fill a row, epoch after epoch."""
    random = Random(0)
    row: list[list[list[int]]] = []
    while True:
        random.shuffle(groups)
        for group in groups:
            if row and sum(map(length, row)) + length(group) > tokens:
                yield row
                row = []
            row.append(group)


def lay_out(row: list[list[list[int]]], device: str) -> tuple[Any, Tensor, Tensor]:
    """The row as a batch, and which candidates beat which: the first one of a group all others."""
    from polar.core.template import EncodedGroup
    from polar.model.tree import tree_batch

    better: list[int] = []
    worse: list[int] = []
    first = 0
    for _, *branches in row:
        better += [first] * (len(branches) - 1)
        worse += range(first + 1, first + len(branches))
        first += len(branches)
    batch = tree_batch([EncodedGroup(prefix, branches, []) for prefix, *branches in row]).to(device)
    return batch, torch.tensor(better, device=device), torch.tensor(worse, device=device)


if __name__ == "__main__":
    main()
