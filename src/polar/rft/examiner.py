"""How good a policy is on held-out prompts, while `polar rft` trains it: reward, truth and length of its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress
from statistics import fmean, pstdev
from typing import Any

import torch

from polar.core.records import text_of
from polar.rft.config import RftConfig
from polar.rft.guard import Measurement
from polar.rft.prompts import Task
from polar.rft.trl import RewardFunction

Chat = list[dict[str, str]]


class Examiner:
    """Answers held-out prompts as the policy does in training, and measures the answers."""

    def __init__(
        self,
        config: RftConfig,
        tasks: Sequence[Task],
        reward: RewardFunction,
        truth: RewardFunction | None,
        tokenizer: Any,
    ) -> None:
        self.config = config
        self.tasks = tasks
        self.reward = reward
        self.truth = truth
        self.tokenizer = tokenizer

    def rows(self, tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
        """Rows of a data set for TRL: a chat where the tokenizer has a chat template, else text."""
        for task in tasks:
            yield {"prompt": self._prompt(task), "references": list(task.references), "answer": task.answer}

    def _prompt(self, task: Task) -> str | Chat:
        if self.tokenizer.chat_template is None:
            return text_of(task.prompt)
        return [{"role": message.role, "content": message.content} for message in task.prompt]

    def measure(self, model: Any, step: int) -> Measurement:
        """One answer to every held-out prompt, always drawn with the same random numbers."""
        batch: dict[str, list[Any]] = {"prompts": [], "completions": [], "references": [], "answer": []}
        length = 0
        training = model.training
        model.eval()
        size = self.config.prompts * self.config.generations
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            for start in range(0, len(self.tasks), size):
                rows = list(self.rows(self.tasks[start : start + size]))
                outputs, tokens = self._answers(model, [row["prompt"] for row in rows])
                batch["prompts"] += [row["prompt"] for row in rows]
                batch["references"] += [row["references"] for row in rows]
                batch["answer"] += [row["answer"] for row in rows]
                batch["completions"] += outputs
                length += tokens
        model.train(training)
        rewards = self.reward(**batch, completion_ids=None)
        verdicts = [] if self.truth is None else self.truth(**batch, completion_ids=None)
        return Measurement(
            step,
            fmean(rewards),
            pstdev(rewards),
            fmean(verdicts) if verdicts else None,
            _mean_where(rewards, [verdict == 1 for verdict in verdicts]),
            _mean_where(rewards, [verdict == 0 for verdict in verdicts]),
            length / len(rewards),
            len(rewards),
        )

    @torch.no_grad()
    def _answers(self, model: Any, prompts: list[str | Chat]) -> tuple[list[str], int]:
        """Outputs, and how many tokens they have together."""
        tokenizer = self.tokenizer
        texts = [
            prompt
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in prompts
        ]
        chat = not isinstance(prompts[0], str)  # whose template writes the special tokens
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat).to(model.device)
        grown = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=self.config.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.config.max_completion_length,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )[:, inputs["input_ids"].shape[1] :]
        outputs = tokenizer.batch_decode(grown, skip_special_tokens=True)
        return outputs, int((grown != tokenizer.pad_token_id).sum())


def _mean_where(values: Sequence[float], chosen: Sequence[bool]) -> float | None:
    found = list(compress(values, chosen))
    return fmean(found) if found else None
