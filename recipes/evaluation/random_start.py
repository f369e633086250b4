"""A network like that of a checkpoint, with the same tokenizer and template, and with random weights.

python recipes/evaluation/random_start.py polar-nano WORK/random
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

from polar.core.checkpoint import checkpoint_directory
from polar.model.reward_model import RewardModel


def main(checkpoint: str, target: str) -> None:
    """Initialise by transformers' own rules, with one seed, and save."""
    set_seed(0)
    trained = RewardModel.load(checkpoint, device="cpu", dtype="float32")
    config = AutoConfig.from_pretrained(checkpoint_directory(checkpoint))
    network = AutoModelForSequenceClassification.from_config(config)
    RewardModel(network, trained.tokenizer, trained.template).save(Path(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
