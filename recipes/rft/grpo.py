"""GRPO by TRL under one of the rewards of the recipe, measured on held-out prompts as it goes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from polar.core.baselines import rouge_l
from polar.core.records import groups_of
from polar.data.readers import convert_rows
from polar.rft.prompts import Task, read_task
from polar.rft.trl import RewardFunction, output_of, polar_reward, samples_of

Row = dict[str, Any]

FIGURES = {
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
"""Our name of a figure of a training step -> TRL's."""


def train(
    policy: Path, reward: str, data: Path, held_out: Path, settings: dict[str, Any], *, seed: int, output: Path
) -> tuple[list[Row], list[Row]]:
    """Fine-tune a policy, which is saved to `output`.

    Args:
        policy: Directory of the causal language model to start from.
        reward: See `named_reward`.
        data: Prompts with references and answers, in any form that `polar rft-data` reads.
        held_out: The same, for the measurements.
        settings: Arguments of `GRPOConfig`; eval_steps are the steps between measurements.
        seed: Of data order and sampling.
        output: Directory.

    Returns:
        The measurements on held-out prompts, the first one before the training, and the figures of all steps.
    """
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    function = named_reward(reward)
    arguments = GRPOConfig(
        output_dir=str(output),
        **settings,
        seed=seed,
        reward_weights=[1.0, 0.0],  # the verdict is logged and has no weight
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    examiner = Examiner(list(read_rows(held_out)), function, tokenizer, arguments)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=list[Any]([function, verifier]),
        args=arguments,
        train_dataset=Dataset.from_list(list(read_rows(data))),
        processing_class=tokenizer,
        callbacks=[examiner],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(output))
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    steps = [
        {"step": entry["step"], **{name: float(entry[theirs]) for name, theirs in FIGURES.items() if theirs in entry}}
        for entry in logged
    ]
    return examiner.measurements, steps


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file as TRL takes them: a chat as the prompt, references and the answer."""
    tasks: Iterator[Task] = convert_rows(str(path), read_task)
    for task in tasks:
        prompt = [{"role": message.role, "content": message.content} for message in task.prompt]
        yield {"prompt": prompt, "references": list(task.references), "answer": task.answer}


def named_reward(name: str) -> RewardFunction:
    """Return a reward function: rouge-l, exact (the verifier itself), or by a reward model in a directory."""
    if name == "exact":
        return verifier
    return rouge if name == "rouge-l" else polar_reward(name)


def verifier(completions: Sequence[Any], answer: Sequence[str], **batch: Any) -> list[float]:
    """Return 1 where the last number in digits of a completion is the answer, else 0."""
    numbers = [re.findall("[0-9]+", str(output_of(completion))) for completion in completions]
    return [float(found[-1:] == [wanted]) for found, wanted in zip(numbers, answer, strict=True)]


def rouge(**batch: Any) -> list[float]:
    """Return ROUGE-L F1 of every completion with the closest of its references, 0 to 1: a baseline."""
    samples = samples_of(batch)
    groups = (groups_of(sample.prompt, sample.references, (str(sample.output),)) for sample in samples)
    return [max(rouge_l(group)[0] for group in of_sample) for of_sample in groups]


class Examiner(TrainerCallback):
    """Measures the policy on held-out prompts before the training and every few steps."""

    def __init__(self, rows: list[Row], reward: RewardFunction, tokenizer: Any, arguments: GRPOConfig) -> None:
        self.rows = rows
        self.reward = reward
        self.tokenizer = tokenizer
        self.arguments = arguments
        self.measurements: list[Row] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure the policy that it starts from."""
        self.measure(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure now and then, and after the last step."""
        if state.global_step % self.arguments.eval_steps == 0 or state.global_step == state.max_steps:
            self.measure(model, state.global_step)

    def measure(self, model: Any, step: int) -> None:
        """Score one answer to every held-out prompt, always drawn with the same random numbers."""
        training = model.training
        model.eval()
        size = self.arguments.per_device_train_batch_size
        outputs: list[str] = []
        tokens = 0
        with torch.random.fork_rng():
            torch.manual_seed(self.arguments.seed)
            for start in range(0, len(self.rows), size):
                texts, count = self.answers(model, self.rows[start : start + size])
                outputs += texts
                tokens += count
        model.train(training)
        columns = {name: [row[name] for row in self.rows] for name in ("references", "answer")}
        batch = {"prompts": [row["prompt"] for row in self.rows], "completions": outputs, **columns}
        rewards, verdicts = self.reward(**batch), verifier(**batch)
        measured = {
            "step": step,
            "reward": fmean(rewards),
            "reward_spread": pstdev(rewards),
            "accuracy": fmean(verdicts),
            "reward_right": mean_where(rewards, [verdict == 1 for verdict in verdicts]),
            "reward_wrong": mean_where(rewards, [verdict == 0 for verdict in verdicts]),
            "length": tokens / len(outputs),
            "prompts": len(outputs),
        }
        self.measurements.append(measured)
        print(f"step {step}: reward {measured['reward']:.3f}, accuracy {measured['accuracy']:.1%}", flush=True)

    @torch.no_grad()
    def answers(self, model: Any, rows: list[Row]) -> tuple[list[str], int]:
        """Return one output per row, and how many tokens they have together."""
        chats = [row["prompt"] for row in rows]
        texts = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        grown = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=self.arguments.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.arguments.max_completion_length,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )[:, inputs["input_ids"].shape[1] :]
        outputs = self.tokenizer.batch_decode(grown, skip_special_tokens=True)
        return outputs, int((grown != self.tokenizer.pad_token_id).sum())


def mean_where(values: Sequence[float], chosen: Sequence[bool]) -> float | None:
    """Return the mean of the chosen values; None if there are none."""
    found = list(compress(values, chosen))
    return fmean(found) if found else None
