"""What `polar rft` is told. The resolved values are saved as `config.yaml` beside the result."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from cyclopts import Parameter

from polar.core.errors import InputError
from polar.core.references import Aggregate
from polar.core.template import BUNDLED_NAME
from polar.model.calibration import Scale


@Parameter(name="*")
@dataclass(kw_only=True)
class RftConfig:
    """Options of reinforcement fine-tuning.

    The output directory gets config.yaml, steps.jsonl (figures of every training step), held-out.jsonl (measurements on
    held-out prompts), curves.svg and curves.png, and the policies `last` and `best`.
    """

    model: str
    """The policy to start from: a causal language model (directory or hub name)."""
    data: list[str]
    """Files with rows prompt, reference (or references) and, for a verifier, answer; or other rows that polar rft-data
    knows; JSONL or Parquet."""
    output: str
    """Directory of the result; it must be new."""
    eval_data: list[str] = field(default_factory=list)
    """Held-out files of the same kind; one output per prompt is measured."""
    reward: str = BUNDLED_NAME
    """A reward model (directory or hub name), the address of a reward server (host:port or a URL), or as baselines
    rouge-l (closeness in words to the reference) and exact (the verifier itself)."""
    served_checkpoint: str | None = None
    """The checkpoint that is served, when the reward is an address (default: what a polar serve there has)."""
    scale: Scale = "raw"
    """Scale of the rewards of a model: raw, zscore or probability (the last two need `polar calibrate`)."""
    aggregate: Aggregate = "max"
    """What becomes of the rewards against several references: max, mean or softmax."""
    answer_pattern: str = r"-?\d+(?:\.\d+)?"
    """Regular expression of the answer in an output: its last match (of its first group, if it has one) must be the
    field answer. It is for logging, for the guard and for the reward exact; other rewards never see it."""
    max_steps: int = 100
    """Optimizer steps."""
    prompts: int = 16
    """Prompts per step."""
    generations: int = 8
    """Outputs per prompt: a group, in which rewards are compared."""
    gradient_accumulation: int = 1
    """Parts of a step that go through the network one after the other, for less memory."""
    gradient_checkpointing: bool = False
    """Keep only every layer's input for the backward pass: less memory, more time."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["constant_with_warmup", "cosine", "linear"] = "constant_with_warmup"
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises."""
    kl_weight: float = 0.01
    """Weight of the KL divergence from the start policy; at 0 it is not measured either."""
    temperature: float = 1.0
    """Of sampling, in training and on held-out prompts."""
    max_completion_length: int = 256
    """Longest output in tokens."""
    eval_steps: int = 10
    """Steps between measurements on held-out prompts."""
    guard: bool = False
    """Stop when reward and truth part: over the last measurements the reward has risen and the accuracy has fallen."""
    guard_window: int = 6
    """How many measurements the guard looks at, an even number: the newer half is compared with the older half."""
    guard_tolerance: float = 0.02
    """A fall of the accuracy up to this counts as none."""
    bf16: bool | None = None
    """bfloat16 autocast. Default: on a GPU yes, on a CPU no."""
    log_steps: int = 1
    """Steps between rows of steps.jsonl."""
    seed: int = 0
    """Seed of data order and sampling."""

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("data: name at least one file of prompts")
        for name in ("max_steps", "prompts", "gradient_accumulation", "max_completion_length", "eval_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.generations < 2:
            raise InputError(f"generations must be at least 2, found {self.generations}: a group compares its outputs")
        if self.prompts * self.generations % (self.gradient_accumulation * self.generations):
            raise InputError(
                f"gradient_accumulation: {self.prompts} prompts cannot be split into {self.gradient_accumulation} parts"
            )
        if self.learning_rate <= 0 or self.temperature <= 0:
            raise InputError("learning_rate and temperature must be above 0")
        if self.kl_weight < 0 or not 0 <= self.guard_tolerance < 1:
            raise InputError("kl_weight must be 0 or more, and guard_tolerance in [0, 1)")
        if self.guard_window < 2 or self.guard_window % 2:
            raise InputError(f"guard_window must be an even number from 2 on, found {self.guard_window}")
        try:
            re.compile(self.answer_pattern)
        except re.error as error:
            raise InputError(f"answer_pattern {self.answer_pattern!r}: no regular expression ({error})") from error

    def save(self, path: Path) -> None:
        """Write the resolved values as YAML; `--config` reads them back."""
        path.write_text(yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True), "utf-8")
