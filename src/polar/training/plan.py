"""Needs of a pre-training run before it begins: learning rate, batch, memory, time.

Learning rate and batch are the paper's fits (D.1.2). As printed ("all in millions") they miss the published values by
an order of magnitude; with parameters in units of 2^20 and tokens in units of 2^30 they give them: batch 1940 and 4343,
learning rate 1.43e-5 and 1.67e-5 for POLAR-1.8B and 7B. The text says that the learning rate is rescaled for the batch;
the published values come out without that.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from polar.core.errors import InputError

MI, GI = 2**20, 2**30
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU."""

    peak_flops: float
    """Dense bfloat16 operations per second."""
    memory: float
    """Bytes."""


DEVICES = {
    "a100": Device(312e12, 80e9),
    "a800": Device(312e12, 80e9),
    "h100": Device(989e12, 80e9),
    "h800": Device(989e12, 80e9),
    "h200": Device(989e12, 141e9),
    "h20": Device(148e12, 96e9),
    "l40s": Device(362e12, 48e9),
    "rtx4090": Device(165e12, 24e9),
}
"""From the makers' data sheets."""
STATE_BYTES = 16
"""Per parameter: bfloat16 weight and gradient, float32 master weight and two moments of AdamW (Rajbhandari et al. 2020,
arXiv 1910.02054, section 3.1)."""
PAPER_TOKENS_PER_TRIPLE = 3.6e12 / 510e6
"""POLAR-7B: 3.6T tokens (D.1.2) in 510 million samples (the name of its checkpoint), about 7,059."""
PAPER_UTILIZATION = 0.26
"""6 N D operations of POLAR-7B in 175 hours on 912 H800 (D.1.2) are 26 % of their peak; POLAR-1.8B comes to 16 %."""


@dataclass(frozen=True, slots=True)
class Run:
    """Known facts of a run."""

    parameters: float
    pretrained_tokens: float
    """Tokens in the pre-training of the language model at the start."""
    corpus_tokens: float
    """Tokens in the pre-training of the reward model."""
    devices: int = 1
    device: Device = DEVICES["h100"]
    utilization: float = PAPER_UTILIZATION
    """Share of the peak that is used (MFU)."""
    tokens_per_triple: float = PAPER_TOKENS_PER_TRIPLE
    tokens_per_device: float = 32768
    """Tokens of one forward pass on one device."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Needs of a run."""

    learning_rate: float
    batch: int
    """Triples."""
    steps: int
    state_bytes: float
    """Weights, gradients and optimizer, on every device, sharded over all of them (FSDP, ZeRO-3)."""
    activation_bytes: float
    """On every device, with activation checkpointing; a rough figure."""
    hours: float
    device_hours: float


def learning_rate(parameters: float, pretrained_tokens: float, corpus_tokens: float) -> float:
    """Return the peak learning rate of the pre-training (paper D.1.2)."""
    return float(
        0.0002306
        * (parameters / MI) ** 0.01125
        * (pretrained_tokens / GI) ** -0.66587
        * (corpus_tokens / GI) ** 0.33916
    )


def batch_size(parameters: float, corpus_tokens: float) -> float:
    """Return the triples per step of the pre-training (paper D.1.2)."""
    return float(31.9032 * (parameters / MI) ** 0.06944 * (corpus_tokens / GI) ** 0.52997)


def forecast(run: Run) -> Forecast:
    """Return the needs of a run.

    Raises:
        InputError: a number is not above zero, or the utilization is above 1.
    """
    numbers = ("parameters", "pretrained_tokens", "corpus_tokens", "devices", "tokens_per_triple", "tokens_per_device")
    for name in (*numbers, "utilization"):
        if not getattr(run, name) > 0:
            raise InputError(f"{name} must be above 0, found {getattr(run, name)}")
    if run.utilization > 1:
        raise InputError(f"utilization is a share of the peak, at most 1; found {run.utilization}")
    batch = max(1, round(batch_size(run.parameters, run.corpus_tokens)))
    device_seconds = 6 * run.parameters * run.corpus_tokens / (run.device.peak_flops * run.utilization)
    return Forecast(
        learning_rate(run.parameters, run.pretrained_tokens, run.corpus_tokens),
        batch,
        math.ceil(run.corpus_tokens / run.tokens_per_triple / batch),
        STATE_BYTES * run.parameters / run.devices,
        _activations(run.parameters, run.tokens_per_device),
        device_seconds / run.devices / 3600,
        device_seconds / 3600,
    )


def _activations(parameters: float, tokens: float) -> float:
    """Return the bytes of every layer's input and one layer's activations (Korthikanti et al. 2022, arXiv 2205.05198).

    The shape is guessed from the size: N = 12 L H^2 with H = 128 L, which is close to the common 1B to 70B models.
    """
    layers = math.cbrt(parameters / (12 * 128**2))
    return tokens * 128 * layers * (2 * layers + 34)


def quantity(text: str) -> float:
    """Return the number in a text with an optional unit: 1.8B, 940e9, 0.94T, 300M.

    Raises:
        InputError: the text is no number.
    """
    match = re.fullmatch(r"([0-9][0-9_,]*\.?[0-9]*(?:e[0-9]+)?)\s*([kmbgt]?)", text.strip().lower())
    if match is None:
        raise InputError(f"expected a number such as 1.8B, 0.94T or 300M, found {text!r}")
    return float(match[1].replace(",", "").replace("_", "")) * UNITS[match[2]]
