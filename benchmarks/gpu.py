"""All figures of a GPU in at most ten minutes: attention of rows of trees, training and scoring.

    python benchmarks/gpu.py --output gpu.json              # torch and transformers are enough
    python benchmarks/gpu.py --tiny                         # the same on a CPU, to see that it runs

Models have random weights in the shapes of 0.5 and 1.8 billion parameters; groups have random tokens. Every figure is
the median of several rounds, interleaved, so that a slow minute meets all of them:

- attention: rows of groups through FlexAttention, and the same groups as padded separate sequences through SDPA;
- training: tokens/s and MFU of forward and backward (bfloat16, both candidates of a pair in one row);
- scoring: candidates/s for groups of 2 to 32, beside separate sequences.

MFU counts 6 operations per weight and token plus 12 per layer, width and pair of tokens that see each other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from polar.core.template import EncodedGroup
from polar.model.attention import TREE_ATTENTION
from polar.model.backbone import prepare
from polar.model.tree import TreeBatch, rewards, tree_batch

SHAPES = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "kv": 2,
    },
    "1.8B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "kv": 8,
    },
}
TINY = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "kv": 2}
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bfloat16 operations per second, from the data sheets."""


def main() -> None:
    """Measure everything and print one line per figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--row-tokens", type=int, default=16384)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        raise SystemExit("no GPU here; --tiny tries the script on a CPU")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    figures: dict[str, Any] = {"device": name, "torch": torch.__version__}
    tokens = 512 if arguments.tiny else arguments.row_tokens
    for shape, sizes in (TINY if arguments.tiny else SHAPES).items():
        model = build(sizes, device)
        row = pairs(tokens, 64 if arguments.tiny else 1024)
        figures[shape] = {
            "weights": sum(weight.numel() for weight in model.parameters()),
            "training": training(model, row, name, arguments.rounds),
            "scoring": scoring(model, arguments.rounds, 32 if arguments.tiny else 512),
        }
        print(shape, json.dumps(figures[shape], indent=2), flush=True)
        del model
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(figures, indent=2), "utf-8")


def build(sizes: dict[str, int], device: str) -> Any:
    """A reward model with random weights."""
    sizes = dict(sizes)
    config = LlamaConfig(
        vocab_size=32000,
        num_key_value_heads=sizes.pop("kv"),
        pad_token_id=0,
        num_labels=1,
        max_position_embeddings=8192,
        **sizes,
    )
    with torch.device(device):
        model = LlamaForSequenceClassification(config)
    prepare(model)
    return model


def group(random: Random, prefix: int, *branches: int) -> EncodedGroup:
    """A group of random tokens."""

    def draw(count: int) -> list[int]:
        return [random.randrange(1, 32000) for _ in range(count)]

    return EncodedGroup(draw(prefix), [draw(branch) for branch in branches], [])


def pairs(tokens: int, longest: int) -> list[EncodedGroup]:
    """Groups of two candidates that fill a row; prompt and reference are about twice as long as a candidate."""
    random, found, total = Random(0), list[EncodedGroup](), 0
    while total < tokens:
        size = random.randrange(longest // 8, longest // 2)
        found.append(group(random, 2 * size, size, size + random.randrange(size)))
        total += 4 * size
    return found


def separate(groups: list[EncodedGroup], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All candidates as right padded sequences, and their mask."""
    sequences = [sequence for one in groups for sequence in one.sequences()]
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences], device=device)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]


def training(model: Any, groups: list[EncodedGroup], name: str, rounds: int) -> dict[str, float]:
    """Tokens/s of forward and backward for the row and for separate sequences, MFU of the row, and their ratio."""
    device = model.device.type
    batch, (ids, mask) = tree_batch(groups).to(device), separate(groups, device)

    def in_rows() -> None:
        model.set_attn_implementation(TREE_ATTENTION)
        with torch.autocast(device, torch.bfloat16):
            loss(rewards(model, batch)).backward()

    def separately() -> None:
        model.set_attn_implementation("sdpa")
        with torch.autocast(device, torch.bfloat16):
            loss(model(ids, attention_mask=mask).logits[:, 0].float()).backward()

    seconds = timed({"rows": in_rows, "separate": separately}, rounds, model)
    pairs_per_step = len(groups)
    result = {f"pairs/s, {kind}": pairs_per_step / value for kind, value in seconds.items()}
    result["ratio"] = seconds["separate"] / seconds["rows"]
    result["tokens/s, rows"] = batch.ids_1T.shape[1] / seconds["rows"]
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    if peak:
        result["MFU"] = operations(model, batch) / seconds["rows"] / peak
    return result


def loss(rewards_N: torch.Tensor) -> Any:
    """Bradley-Terry, the first of two candidates being the better one."""
    return torch.nn.functional.softplus(rewards_N[1::2] - rewards_N[0::2]).mean()


def operations(model: Any, batch: TreeBatch) -> float:
    """Operations of forward and backward."""
    first, last, start, end = batch.table_11S4[0, 0].unbind(1)
    queries = end - start
    seen = float((queries * (last - first) + queries * (queries + 1) / 2).sum())
    weights = sum(weight.numel() for weight in model.model.layers.parameters())
    config = model.config
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seen
    return float(6 * weights * batch.ids_1T.shape[1] + attention)


def scoring(model: Any, rounds: int, size: int) -> dict[str, dict[str, float]]:
    """Candidates/s for groups of K candidates, in rows and as separate sequences."""
    device, random, result = model.device.type, Random(1), {}
    for count in (2, 8, 32):
        groups = [group(random, 2 * size, *([size] * count)) for _ in range(max(1, 32 // count))]
        batch, (ids, mask) = tree_batch(groups).to(device), separate(groups, device)

        def in_rows(batch: TreeBatch = batch) -> None:
            model.set_attn_implementation(TREE_ATTENTION)
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
                rewards(model, batch)

        def separately(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
            model.set_attn_implementation("sdpa")
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
                model(ids, attention_mask=mask)

        seconds = timed({"rows": in_rows, "separate": separately}, rounds, None)
        total = count * len(groups)
        result[f"K={count}"] = {
            "candidates/s, rows": total / seconds["rows"],
            "candidates/s, separate": total / seconds["separate"],
            "ratio": seconds["separate"] / seconds["rows"],
        }
    return result


def timed(ways: dict[str, Callable[[], None]], rounds: int, model: Any) -> dict[str, float]:
    """Median seconds of each way; the first round, in which kernels are compiled, does not count."""
    seconds: dict[str, list[float]] = {kind: [] for kind in ways}
    for number in range(rounds + 1):
        for kind, way in ways.items():
            if model is not None:
                model.zero_grad(set_to_none=True)
            synchronize()
            begin = time.perf_counter()
            way()
            synchronize()
            if number:
                seconds[kind].append(time.perf_counter() - begin)
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
