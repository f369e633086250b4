"""The guard stops exactly when the reward has risen while the accuracy has fallen, in a run of TRL too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from polar import InputError
from polar.rft.guard import OverOptimizationGuard, has_parted
from tests.corpus.engines.tiny import save_policy


@pytest.mark.parametrize(
    ("rewards", "accuracies", "parted"),
    [
        ([0, 1, 2, 3], [0.9, 0.8, 0.5, 0.4], True),
        ([0, 1, 2, 3], [0.4, 0.5, 0.8, 0.9], False),  # both rise
        ([3, 2, 1, 0], [0.9, 0.8, 0.5, 0.4], False),  # both fall
        ([0, 1, 2, 3], [0.5, 0.5, 0.5, 0.49], False),  # within the tolerance
        ([1, 1, 1, 1], [0.9, 0.8, 0.5, 0.4], False),  # the reward stays
        ([0, 0, 1], [0.9, 0.5, 0.1], False),  # not enough measurements
        ([9, 9, 0, 1, 2, 3], [0.0, 0.0, 0.9, 0.8, 0.5, 0.4], True),  # what was before the window does not count
    ],
)
def test_by_hand(rewards: list[float], accuracies: list[float], parted: bool) -> None:
    assert has_parted(rewards, accuracies, window=4, tolerance=0.02) is parted


curves = st.integers(1, 4).flatmap(
    lambda half: st.tuples(
        st.just(2 * half),
        st.lists(st.integers(-100, 100), min_size=2 * half, max_size=2 * half + 3),
        st.data(),
    )
)


@given(curves)
def test_only_a_rise_of_the_reward_with_a_fall_of_the_accuracy(drawn: tuple[int, list[int], st.DataObject]) -> None:
    window, rewards, data = drawn
    accuracies = data.draw(st.lists(st.integers(0, 100), min_size=len(rewards), max_size=len(rewards)))
    parted = has_parted([float(r) for r in rewards], [a / 100 for a in accuracies], window, tolerance=0.0)
    half = window // 2
    rise = sum(rewards[-half:]) - sum(rewards[-window:-half])
    fall = sum(accuracies[-window:-half]) - sum(accuracies[-half:])
    if abs(fall) > 0:  # sums of hundredths round, so an exact tie is not decided here
        assert parted == (rise > 0 and fall > 0)
    else:
        assert not parted or rise > 0


def run_with(guard: OverOptimizationGuard, tokenizer: Tokenizer, directory: Path) -> GRPOTrainer:
    """GRPO under a reward that rises from step to step, beside a verdict that falls."""

    def rising(prompts: list[Any], trainer_state: Any, **_: Any) -> list[float]:
        return [trainer_state.global_step + number % 2 for number, _ in enumerate(prompts)]

    def verifier(prompts: list[Any], trainer_state: Any, **_: Any) -> list[float]:
        return [0.9 - 0.1 * trainer_state.global_step for _ in prompts]

    save_policy(directory / "policy", tokenizer)
    rows = Dataset.from_list([{"prompt": "dog"}, {"prompt": "fox"}])
    arguments = GRPOConfig(
        output_dir=str(directory / "run"),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_generations=2,
        max_completion_length=2,
        max_steps=9,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        reward_weights=[1.0, 0.0],
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory / "policy"),
        reward_funcs=[rising, verifier],
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(directory / "policy", padding_side="left"),
        callbacks=[guard],
    )


def test_a_run_of_trl_is_stopped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    trainer = run_with(OverOptimizationGuard("verifier", window=4), tokenizer, tmp_path)
    trainer.train()
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert evaluated == [0, 1, 2, 3]


def test_a_guard_without_its_truth_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="eval_rewards/exact/mean"):
        run_with(OverOptimizationGuard("exact"), tokenizer, tmp_path).train()


@pytest.mark.parametrize("options", [{"window": 3}, {"window": 0}, {"tolerance": 1.0}])
def test_settings_of_the_guard_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        OverOptimizationGuard("verifier", **options)
