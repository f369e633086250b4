"""Figures of a run: accuracy and margin, triples and tokens per second, share of the devices' peak (MFU).

Model FLOPs utilization (MFU) is what the model has to compute per second, divided by what the devices could (Chowdhery
et al. 2022, PaLM, arXiv 2204.02311, appendix B). What is computed again to save memory does not count, as in
Korthikanti et al. 2022 (arXiv 2205.05198). Forward and backward take

- per token 2 operations forward and 2 backward for every weight, and 2 more for a weight that is trained: 6 N if all N
  are. Embeddings are looked up, so they do not count;
- per pair of a token and one that it sees 12 L d, with L layers and d = heads times size of a head. PaLM counts T^2
  pairs for T tokens. Here only pairs that are seen count: a segment of length l behind a prefix of length p has
  l p + l^2 / 2 of them.

`mfu` counts the operations that are computed. `mfu_separate` counts those of separate sequences of prefix and candidate
in the same time: the figure to compare with tools that do not share prefixes.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from polar.model.tree import TreeBatch
from polar.training.plan import DEVICES

log = logging.getLogger(__name__)

GPU_NAME = re.compile(
    r"(?:NVIDIA )?(?:GeForce )?(?P<chip>A100|A800|H100|H800|H200|H20|L40S|RTX 4090)"
    r"(?P<board>(?:[ -](?:SXM\d?|PCIe|PCIE|HBM\d\w*|\d+GB))*)"
)
"""Names that drivers give to the GPUs of `DEVICES`. A name with anything more (Laptop, MIG, NVL) is another device."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Floating point operations of training, forward and backward."""

    per_token: float
    """Of the weights."""
    per_pair: float
    """Of a token and one that it sees, in all layers."""

    def of(self, table_11S4: Tensor) -> tuple[float, float]:
        """Return the operations for a row of trees (`polar.model.attention`) and for its candidates as sequences."""
        first_S, last_S, start_S, end_S = table_11S4[0, 0].double().unbind(1)
        prefix_S, length_S = last_S - first_S, end_S - start_S
        tree = self._sum(length_S, prefix_S * length_S + length_S**2 / 2)
        # A segment that is the prefix of the next one is part of every sequence there, and none by itself.
        is_prefix_S = torch.zeros_like(first_S, dtype=torch.bool)
        is_prefix_S[:-1] = (start_S[:-1] == first_S[1:]) & (end_S[:-1] == last_S[1:])
        whole_S = (prefix_S + length_S)[~is_prefix_S]
        return tree, self._sum(whole_S, whole_S**2 / 2)

    def _sum(self, tokens_S: Tensor, pairs_S: Tensor) -> float:
        return self.per_token * float(tokens_S.sum()) + self.per_pair * float(pairs_S.sum())


def cost_of(model: Any) -> Cost:
    """Return the cost of training a transformers model."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = model.num_parameters(exclude_embeddings=True)
    trained = model.num_parameters(exclude_embeddings=True, only_trainable=True)
    return Cost(4 * weights + 2 * trained, 12 * config.num_hidden_layers * config.num_attention_heads * head)


def peak_of(name: str) -> float | None:
    """Return the dense bfloat16 operations per second of a GPU by its name in PyTorch, or None if they are unknown."""
    found = GPU_NAME.fullmatch(name)
    if found is None or (found["chip"].startswith("H") and "PCI" in found["board"].upper()):
        return None  # H100 and H800 cards for PCIe are slower than the modules of that name
    return DEVICES[found["chip"].lower().replace(" ", "")].peak_flops


class Meter:
    """Sums of one process over the steps since the last reading; nothing synchronises with the device before that."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.cost = cost_of(model)
        self.shares_prefixes: bool = model.takes_rows
        self.device = device
        self.peak = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._started: float | None = None
        self._reset()

    def start(self) -> None:
        """Start the clock unless it runs."""
        if self._started is None:
            self._started = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock until the next start, around work that is not training."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def add(self, batch: TreeBatch, triples: int, margins_P: Tensor) -> None:
        """Count a micro-batch: its comparisons, and the margins of its pairs."""
        tree, separate = self.cost.of(batch.table_11S4)
        self._margins.append(margins_P.detach())
        self._triples += triples
        self._tokens += batch.ids_1T.numel()
        self._operations += tree if self.shares_prefixes else separate
        self._separate += separate

    def read(self, add_up: Callable[[Tensor], Tensor], processes: int) -> dict[str, float]:
        """Return the figures since the last reading, over all processes, and stop the clock.

        Args:
            add_up: Returns the sum of a tensor over all processes, to each of them.
            processes: Their number; each has one device.

        Returns:
            Accuracy (ties count one half) and mean margin of the pairs, comparisons and tokens per second, and on
            a GPU with a known peak the two utilizations.
        """
        self.pause()
        margins, seconds = torch.cat(self._margins).double(), self._seconds
        wins = (margins > 0).sum() + 0.5 * (margins == 0).sum()
        counts = [len(margins), self._triples, self._tokens, self._operations, self._separate]
        own = torch.tensor(counts, dtype=torch.float64, device=self.device)
        sums = add_up(torch.cat([own, torch.stack([wins, margins.sum()])]))
        pairs, triples, tokens, operations, separate, won, margin = sums.tolist()
        self._reset()
        figures = {
            "accuracy": won / pairs,
            "margin": margin / pairs,
            "triples_per_second": round(triples / seconds, 2),
            "tokens_per_second": round(tokens / seconds),
        }
        if self.peak is not None:
            available = seconds * self.peak * processes
            figures |= {"mfu": round(operations / available, 4), "mfu_separate": round(separate / available, 4)}
        return figures

    def _reset(self) -> None:
        self._margins: list[Tensor] = []
        self._seconds = self._operations = self._separate = 0.0
        self._triples = self._tokens = 0


class LogLines(TrainerCallback):
    """Log lines with the figures of a run, from its main process, where Trainer shows no bar."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Log the figures of the steps since the last line, or of an evaluation."""
        if not state.is_world_process_zero or not args.disable_tqdm or logs is None:
            return
        place = f"step {state.global_step:,} of {state.max_steps:,}"
        if "eval_loss" in logs:
            results = ", ".join(f"{name} {logs[f'eval_{name}']:.4f}" for name in ("loss", "accuracy", "margin"))
            log.info("%s, held-out data: %s", place, results)
        elif "loss" in logs:
            log.info("%s: %s", place, _line(logs))


def _line(logs: dict[str, float]) -> str:
    parts = [
        f"loss {logs['loss']:.4f}",
        f"accuracy {logs['accuracy']:.3f}",
        f"lr {logs['learning_rate']:.2e}",
        f"{logs['triples_per_second']:,.1f} triples/s",
        f"{logs['tokens_per_second']:,} tokens/s",
    ]
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.1%} ({logs['mfu_separate']:.1%} as separate sequences)")
    return ", ".join(parts)
