"""`polar rft`: GRPO on one machine through TRL, watched: reward, true accuracy, KL and length per step.

TRL trains. What is added here: any of our rewards by its name, a verifier whose verdict never reaches the training,
held-out prompts that are answered every few steps, and a guard that stops a run in which reward and truth part.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from polar.core.errors import InputError
from polar.core.text import opens_thinking
from polar.data.readers import convert_rows
from polar.data.writers import on_disk
from polar.model.files import reason
from polar.rft.config import RftConfig
from polar.rft.examiner import Examiner
from polar.rft.guard import Measurement, has_parted
from polar.rft.named_rewards import named_reward, verifier
from polar.rft.prompts import Task, read_task
from polar.rft.sample import Thinking

log = logging.getLogger(__name__)


def read_tasks(paths: Sequence[str]) -> list[Task]:
    """Prompts with references, and for a verifier answers, from rows that `polar.rft.prompts` knows.

    Raises:
        InputError: a row is wrong, or only some rows have an answer.
    """
    tasks = [task for path in paths for task in convert_rows(path, read_task)]
    without = sum(task.answer is None for task in tasks)
    if 0 < without < len(tasks):
        raise InputError(
            f"{', '.join(paths)}: {without} of {len(tasks)} rows have no answer; give every row one or none"
        )
    return tasks


def train(config: RftConfig) -> list[Measurement]:
    """Run the reinforcement fine-tuning; what it leaves in `config.output` is told in `RftConfig`.

    Returns:
        The measurements on held-out prompts, the first one before the training.

    Raises:
        InputError: a model, a file or a setting is wrong.
        RewardError, FloatingPointError: a reward could not be had.
    """
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    output = Path(config.output)
    with on_disk(output):
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise InputError(f"{output}: is a file or holds files already; choose a new directory")
    tasks, held_out = read_tasks(config.data), read_tasks(config.eval_data) if config.eval_data else []
    verified = all(task.answer is not None for task in [*tasks, *held_out])
    if not verified and (config.guard or config.reward == "exact"):
        wanted = "the guard" if config.guard else "the reward exact"
        raise InputError(f"{wanted} needs the field answer in every row of data and eval_data")
    if config.guard and not held_out:
        raise InputError("the guard needs eval_data: it compares reward and truth on held-out prompts")
    model, tokenizer = load_policy(config.model)
    thinking: Thinking = "opened" if template_opens_thinking(tokenizer) else "strip"
    reward = named_reward(config, thinking)
    truth = verifier(config.answer_pattern, thinking) if verified else None
    with on_disk(output):
        output.mkdir(parents=True, exist_ok=True)
        config.save(output / "config.yaml")
    examiner = Examiner(config, held_out, reward, truth, tokenizer)
    watch = Watch(config, output, examiner)
    arguments = GRPOConfig(
        output_dir=str(output / "run"),
        per_device_train_batch_size=config.prompts * config.generations // config.gradient_accumulation,
        gradient_accumulation_steps=config.gradient_accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        num_generations=config.generations,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        beta=config.kl_weight,
        temperature=config.temperature,
        max_completion_length=config.max_completion_length,
        reward_weights=None if truth is None else [1.0, 0.0],  # the verdict is logged and has no weight
        mask_truncated_completions=False,
        bf16=torch.cuda.is_available() if config.bf16 is None else config.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        logging_steps=config.log_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=list[Any]([reward] if truth is None else [reward, truth]),
        args=arguments,
        train_dataset=Dataset.from_list(list(examiner.rows(tasks))),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    finally:
        watch.save(model, "last")  # also when a reward could not be had, or the run is interrupted
    return watch.measurements


def load_policy(name: str) -> tuple[Any, Any]:
    """A causal language model in float32 and its tokenizer, padded on the left.

    Raises:
        InputError: there is no such model.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{name}: cannot be loaded as a language model ({reason(error)})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"{name}: the tokenizer has neither a pad nor an eos token")
    return model, tokenizer


def template_opens_thinking(tokenizer: Any) -> bool:
    """Whether the chat template opens the block of thinking at the end of a prompt, before the policy writes."""
    if tokenizer.chat_template is None:
        return False
    chat = [{"role": "user", "content": "?"}]
    return opens_thinking(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


class Watch(TrainerCallback):
    """Writes what happens, measures on held-out prompts, saves the best policy and the last one, stops the run."""

    def __init__(self, config: RftConfig, output: Path, examiner: Examiner) -> None:
        self.config = config
        self.output = output
        self.examiner = examiner
        self.measurements: list[Measurement] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure the policy that it starts from."""
        self._measure(model, 0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep the figures of the training steps; the names are ours, so that they stay when TRL's change."""
        logs = logs or {}
        if "reward" not in logs:
            return
        names = {
            "reward": "reward",
            "reward_spread": "reward_std",
            "accuracy": "rewards/verifier/mean",
            "kl": "kl",
            "length": "completions/mean_length",
            "entropy": "entropy",
            "loss": "loss",
            "learning_rate": "learning_rate",
            "seconds": "step_time",
        }
        figures = {name: float(logs[theirs]) for name, theirs in names.items() if theirs in logs}
        _append(self.output / "steps.jsonl", {"step": state.global_step, **figures})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure now and then, and stop when reward and truth part."""
        if state.global_step % self.config.eval_steps == 0 or state.global_step == state.max_steps:
            self._measure(model, state.global_step)
            if self.config.guard and has_parted(
                self.measurements, self.config.guard_window, self.config.guard_tolerance
            ):
                log.warning(
                    "stopped at step %d: over the last %d measurements the reward has risen and the accuracy has "
                    "fallen; the best policy is in %s",
                    state.global_step,
                    self.config.guard_window,
                    self.output / "best",
                )
                control.should_training_stop = True

    def _measure(self, model: Any, step: int) -> None:
        if not self.examiner.tasks:
            return
        measured = self.examiner.measure(model, step)
        self.measurements.append(measured)
        _append(self.output / "held-out.jsonl", measured.as_row())
        log.info("%s", measured)
        if all(measured.quality > earlier.quality for earlier in self.measurements[:-1]):
            self.save(model, "best")

    def save(self, model: Any, name: str) -> None:
        """Save the policy as it is now."""
        directory = self.output / name
        model.save_pretrained(directory)
        self.examiner.tokenizer.save_pretrained(directory)


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
