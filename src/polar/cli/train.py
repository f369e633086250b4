"""`polar pretrain` and `polar finetune`."""

from __future__ import annotations

import sys

from polar.model.reward_model import RewardModel
from polar.training.config import FinetuneConfig, PretrainConfig


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


def _report(model: RewardModel, output: str) -> None:
    from accelerate import PartialState

    training = model.provenance["training"]
    if PartialState().is_main_process:
        cut = f", {training['cut']['examples']} of them cut to fit" if training["cut"]["examples"] else ""
        sys.stderr.write(f"saved {output} after {training['steps']} steps on {training['groups']} groups{cut}\n")
