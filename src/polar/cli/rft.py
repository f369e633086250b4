"""`polar rft`: reinforcement fine-tuning of a small policy on one machine."""

from __future__ import annotations

import sys

from polar.client.errors import RewardError
from polar.core.errors import InputError
from polar.rft.config import RftConfig


def rft(config: RftConfig) -> None:
    """Fine-tune a policy with GRPO, on one machine through TRL, and watch whether the reward is the truth.

    Rows are {"prompt", "reference"} or {"prompt", "references"}, and for a verifier "answer": what the last number of
    an output must be, or whatever --answer-pattern finds. The reward never sees the answer. What happens is written
    step by step, with a plot at the end.

    Examples:
      polar rft --model Qwen/Qwen3-0.6B --data train.jsonl --reward my-reward-model --output run --max-steps 200
      polar rft --model policy --data train.jsonl --eval-data held-out.jsonl --guard --reward rm --output run
      polar rft --model policy --data train.jsonl --reward 127.0.0.1:30000 --served-checkpoint rm --output run
      polar rft --config recipes/rft/rft.yaml --seed 1
    """
    try:
        from polar.rft import grpo
        from polar.rft.curves import plot_run
    except ImportError as error:
        raise InputError(f"polar rft needs TRL: pip install 'polar-rm[rft]' ({error})") from error
    try:
        measurements = grpo.train(config)
    except RewardError as error:
        raise InputError(f"{error}; the policy as it was then is in {config.output}/last") from error
    plot_run(config.output)
    for measured in (measurements[0], measurements[-1]) if measurements else ():
        sys.stderr.write(f"held-out prompts, {measured}\n")
    sys.stderr.write(f"wrote the policy and its figures to {config.output}\n")
