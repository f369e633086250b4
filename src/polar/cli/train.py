"""`polar pretrain`, `polar finetune`, and `polar plan`, the cost of a pre-training."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from polar.core.errors import InputError
from polar.model.reward_model import RewardModel
from polar.training.config import FinetuneConfig, PretrainConfig
from polar.training.plan import DEVICES, PAPER_TOKENS_PER_TRIPLE, PAPER_UTILIZATION, Run, forecast, quantity


def pretrain(config: PretrainConfig) -> None:
    """Train a policy discriminator on triples (reference and positive by one policy, negative by another).

    Examples:
      polar pretrain --data triples.jsonl --output nano --lexical-weight 1 --learning-rate 1e-3
      polar pretrain --data triples.parquet --model Qwen/Qwen3-0.6B-Base --output base-rm --bf16
      polar pretrain --config recipes/nano/pretrain.yaml --seed 1
    """
    from polar.training import run

    _report(run.pretrain(config), config.output)


def finetune(config: FinetuneConfig) -> None:
    """Fine-tune a reward model on preferences (prompt, reference, chosen, rejected, or ranked lists).

    Examples:
      polar finetune --model base-rm --data preferences.jsonl --output rm --learning-rate 1e-5
      polar finetune --config finetune.yaml --resume
    """
    from polar.training import run

    _report(run.finetune(config), config.output)


def plan(
    *,
    parameters: str,
    corpus_tokens: str,
    pretrained_tokens: str,
    devices: int = 1,
    device: str = "h100",
    utilization: float = PAPER_UTILIZATION,
    tokens_per_triple: float = round(PAPER_TOKENS_PER_TRIPLE),
    tokens_per_device: int = 32768,
) -> None:
    """Learning rate and batch of a pre-training run by the paper's fits, with the memory and time that it takes.

    The fits were made on models of 100M to 924M parameters (paper D.1.2). Numbers take the units K, M, B and T.

    Examples:
      polar plan --parameters 1.8B --corpus-tokens 0.94T --pretrained-tokens 2.5T --devices 320 --device h800
      polar plan --parameters 0.6B --corpus-tokens 5B --pretrained-tokens 36T --devices 8

    Args:
        parameters: Size of the model.
        corpus_tokens: Tokens of the corpus that it is pre-trained on.
        pretrained_tokens: Tokens that the language model which it starts from has seen.
        devices: How many GPUs.
        device: a100, a800, h100, h800, h200, h20, l40s or rtx4090.
        utilization: Share of the GPUs' peak that is used (MFU); the default is what the paper's 7B run comes to.
        tokens_per_triple: Prompt, reference and two candidates; the default is the paper's.
        tokens_per_device: Tokens of one forward pass on one device.
    """
    if device not in DEVICES:
        raise InputError(f"device: expected one of {', '.join(DEVICES)}, found {device!r}")
    run = Run(
        quantity(parameters),
        quantity(pretrained_tokens),
        quantity(corpus_tokens),
        devices,
        DEVICES[device],
        utilization,
        tokens_per_triple,
        tokens_per_device,
    )
    result = forecast(run)
    needed = result.state_bytes + result.activation_bytes
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (
        ("learning rate", f"{result.learning_rate:.3g}"),
        ("batch", f"{result.batch:,} triples"),
        ("steps", f"{result.steps:,}"),
        ("weights, gradients, optimizer", f"{result.state_bytes / 1e9:,.1f} GB per device"),
        ("activations", f"about {result.activation_bytes / 1e9:,.1f} GB per device"),
        ("memory of the device", f"{run.device.memory / 1e9:,.0f} GB: {_fits(needed, run.device.memory)}"),
        ("time", f"{result.hours:,.1f} hours ({result.device_hours:,.0f} device hours)"),
    ):
        table.add_row(name, value)
    Console().print(table)


def _report(model: RewardModel, output: str) -> None:
    from accelerate import PartialState

    training = model.provenance["training"]
    if PartialState().is_main_process:
        cut = f", {training['cut']['examples']} of them cut to fit" if training["cut"]["examples"] else ""
        sys.stderr.write(f"saved {output} after {training['steps']} steps on {training['groups']} groups{cut}\n")


def _fits(needed: float, memory: float) -> str:
    if needed <= 0.9 * memory:
        return "it fits"
    return "too little; take more devices, or fewer tokens per device"
