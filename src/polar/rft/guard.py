"""Guard against over-optimisation: the reward rises while the truth falls (Gao et al. 2022, arXiv 2210.10760).

trainer = GRPOTrainer(
    model,
    reward_funcs=[polar_reward("rm"), verifier],
    args=GRPOConfig(reward_weights=[1.0, 0.0], eval_strategy="steps", eval_steps=20, ...),
    train_dataset=dataset,
    eval_dataset=held_out,
    callbacks=[OverOptimizationGuard("verifier")],
)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from polar.core.errors import InputError

log = logging.getLogger(__name__)

REWARD = "eval_reward"
"""Name of the mean reward on held-out prompts in the logs of TRL."""


class OverOptimizationGuard(TrainerCallback):
    """Stop a run of TRL's GRPOTrainer or RLOOTrainer when reward and truth have parted on held-out prompts.

    The truth is a reward function with weight 0. A run that goes on from a checkpoint keeps its earlier evaluations.
    """

    def __init__(self, truth: str, *, window: int = 6, tolerance: float = 0.02) -> None:
        """Watch a reward function of the run.

        Args:
            truth: Name of the reward function that is 1 for right and 0 for wrong answers.
            window: See `has_parted`.
            tolerance: See `has_parted`.

        Raises:
            InputError: The window or the tolerance is out of range. While it trains: an evaluation has no such reward.
        """
        if window < 2 or window % 2:
            raise InputError(f"window must be an even number from 2 on, found {window}")
        if not 0 <= tolerance < 1:
            raise InputError(f"tolerance must be in [0, 1), found {tolerance}")
        self.truth = f"eval_rewards/{truth}/mean"
        self.window = window
        self.tolerance = tolerance

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Look at the evaluations so far, after each of them."""
        if logs is None or REWARD not in logs:
            return
        if logs.get(self.truth) is None:
            raise InputError(
                f"the guard found no {self.truth} in the evaluation; name one of the run's reward functions"
            )
        evaluations = [entry for entry in state.log_history if REWARD in entry]
        rewards, accuracies = ([entry[name] for entry in evaluations] for name in (REWARD, self.truth))
        if has_parted(rewards, accuracies, self.window, self.tolerance):
            log.warning(
                "stopped at step %d: over the last %d evaluations the reward has risen and %s has fallen",
                *(state.global_step, self.window, self.truth),
            )
            control.should_training_stop = True


def has_parted(rewards: Sequence[float], accuracies: Sequence[float], window: int, tolerance: float) -> bool:
    """Return whether over the last `window` measurements the reward has risen and the accuracy has fallen.

    The means of the older and of the newer half of the window are compared, since a single measurement is noisy.

    Args:
        rewards: Mean rewards in the order of the run.
        accuracies: Of the same measurements, 0 to 1.
        window: How many of the last measurements count; an even number. Fewer have never parted.
        tolerance: A fall of the accuracy up to this counts as none.
    """
    if len(rewards) < window:
        return False
    half = window // 2
    rise = sum(rewards[-half:]) - sum(rewards[-window:-half])
    fall = sum(accuracies[-window:-half]) - sum(accuracies[-half:])
    return rise > 0 and fall > tolerance * half
