"""Options of a training run and the learning rate over its steps; `config.yaml` beside the result holds the options."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import yaml
from cyclopts import Parameter
from pydantic import ConfigDict

from polar.core.errors import InputError
from polar.core.files import write_text

if TYPE_CHECKING:
    from polar.training.objectives import Objective

Ranked = Literal["all_pairs", "plackett_luce"]
Tracker = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, slots=True)
class ScratchConfig:
    """Size of a network from scratch (Llama architecture) and of its tokenizer (byte-level BPE)."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    vocab_size: int = 8192
    """Tokens, the 256 bytes and 4 special tokens included."""
    hidden_size: int = 192
    """Width."""
    intermediate_size: int = 512
    """Width of the feed-forward layers."""
    num_layers: int = 4
    """Depth."""
    num_heads: int = 3
    """Attention heads; hidden_size must be a multiple of it."""
    rope_theta: float = 500_000.0
    """Base of the rotary positions."""
    max_positions: int = 4096
    """Longest input that the configuration allows."""


Schedule = Literal["cosine", "linear", "wsd", "constant"]

COSINE_END = 0.1
"""Share of the peak at the end of the cosine, as in the original configurations of POLAR."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a frozen model; its score head is trained in full."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    rank: int = 16
    """Rank of the adapters."""
    alpha: float = 32.0
    """The output of an adapter is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the input of an adapter."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the layers that get an adapter, for example q_proj and v_proj; all-linear is every linear layer."""
    load_in_4bit: bool = False
    """Hold the frozen weights in 4 bits, nf4 (QLoRA, arXiv 2305.14314); needs the package bitsandbytes."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora.rank must be at least 1, found {self.rank}")
        if self.alpha <= 0:
            raise InputError(f"lora.alpha must be above 0, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout must be in [0, 1), found {self.dropout}")
        if not self.targets:
            raise InputError("lora.targets: name at least one layer, or all-linear")


@Parameter(name="*")
@dataclass(kw_only=True)
class TrainConfig:
    """Options that pre-training and fine-tuning share."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    data: list[str]
    """Training files: triples (pretrain) or preferences (finetune), as JSONL or Parquet."""
    output: str
    """Directory of the trained checkpoint; the run's own files go to `<output>/run`."""
    model: str
    """A reward model to go on from, or a causal language model to put a new head on (directory or hub name)."""
    eval_data: list[str] = field(default_factory=list)
    """Held-out files of the same kind: accuracy is measured on them during training."""
    lora: LoraSettings | None = None
    """Train adapters instead of all weights; on if any of these is given."""
    epochs: float = 1.0
    """Passes over the data (ignored when max_steps is set)."""
    max_steps: int = -1
    """Optimizer steps, or -1 to go by epochs."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    adam_beta2: float = 0.95
    """Second AdamW beta; the first is 0.9."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises, rounded up."""
    schedule: Schedule = "cosine"
    """Decay after the warm-up: cosine falls to a tenth of the peak, linear to 0, wsd stays at the peak until the last
    steps (decay_ratio)."""
    decay_ratio: float = 0.2
    """Share of the steps in which wsd falls."""
    batch_size: int = 8
    """Groups (a triple or a preference each) per device and micro-batch."""
    batch_tokens: int | None = None
    """Tokens per device and micro-batch in place of batch_size: groups of any length are packed up to it."""
    gradient_accumulation: int = 1
    """Micro-batches per optimizer step."""
    ranked: Ranked = "all_pairs"
    """More than two candidates in a group: each better one against each worse one, or (plackett_luce) each against all
    that are worse at once."""
    centering: float = 0.0
    """Weight of the squared sum of a better and a worse reward, which keeps rewards near 0."""
    max_grad_norm: float = 1.0
    """Gradient clipping."""
    max_length: int | None = None
    """Longest input in tokens (default: the checkpoint's own; of a language model 16384, or its room)."""
    max_response_length: int | None = None
    """Longest reference and candidate in tokens (default: the checkpoint's own; of a language model 4096, or a quarter
    of max_length if that is too long)."""
    bf16: bool | None = None
    """bfloat16 autocast. Default: on a GPU yes, on a CPU no; switch it on for CPUs with AMX or AVX512-BF16."""
    gradient_checkpointing: bool = False
    """Keep only every layer's input for the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile for every layer; the first steps take longer."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer state over all processes (FSDP2); for torchrun, one process per GPU."""
    seed: int = 0
    """Seed of data order and initialisation."""
    log_steps: int = 10
    """Steps between log lines."""
    save_steps: int = 500
    """Steps between resumable checkpoints under `<output>/run` (the last two are kept)."""
    eval_steps: int = 500
    """Steps between evaluations, when eval_data is given."""
    resume: bool = True
    """Go on from the newest complete checkpoint of this output directory, if there is one; --no-resume removes what an
    unfinished run left there and begins again."""
    report_to: list[Tracker] = field(default_factory=list)
    """Experiment trackers of Hugging Face Trainer; each is a package of its own name."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Treatment of rows that cannot be read; skipped rows are counted and reported."""

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("data: name at least one training file")
        for name in ("batch_size", "gradient_accumulation", "log_steps", "save_steps", "eval_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.max_steps < 1 and self.epochs <= 0:
            raise InputError(f"epochs must be above 0, found {self.epochs}")
        if not 0 <= self.warmup_ratio < 1:
            raise InputError(f"warmup_ratio must be in [0, 1), found {self.warmup_ratio}")
        if not 0 < self.decay_ratio <= 1:
            raise InputError(f"decay_ratio must be in (0, 1], found {self.decay_ratio}")
        for name in ("batch_tokens", "max_length", "max_response_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be at least 1, found {value}")
        if self.learning_rate <= 0:
            raise InputError(f"learning_rate must be above 0, found {self.learning_rate}")
        for name in self.report_to:
            _require_tracker(name)
        self.objective()

    def objective(self) -> Objective:
        """Return the loss that these options describe.

        Raises:
            InputError: an option has an unknown value.
        """
        from polar.training.objectives import Objective

        return Objective(self.ranked, self.centering)

    def save(self, path: Path) -> None:
        """Write the resolved values as YAML; `--config` reads them back."""
        write_text(path, yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True))


@Parameter(name="*")
@dataclass(kw_only=True)
class PretrainConfig(TrainConfig):
    """Options of pre-training: a policy discriminator from triples."""

    model: str = "scratch"
    """"scratch" for a small network and tokenizer made from the training data, else a causal language model or a
    reward model to go on from (directory or hub name)."""
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    """Size of a network from scratch."""
    lexical_weight: float = 0.0
    """Weight of the lexical auxiliary loss, which a network from scratch needs (about 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora is not None and self.model == "scratch":
            raise InputError("lora: a model from scratch has no weights to freeze; name a model to start from")


@Parameter(name="*")
@dataclass(kw_only=True)
class FinetuneConfig(TrainConfig):
    """Options of fine-tuning: a reward model from preferences with a reference."""


def _require_tracker(name: str) -> None:
    if name not in get_args(Tracker):
        raise InputError(f"report_to: expected one of {', '.join(get_args(Tracker))}, found {name!r}")
    found = find_spec(name)
    if found is None or found.origin is None:  # without an origin it is a directory that happens to have the name
        raise InputError(f"report_to: {name} is not installed: pip install {name}")


def peak_share(step: int, steps: int, *, schedule: Schedule, warmup: float, decay: float) -> float:
    """Return the share of the peak learning rate that one optimizer step has.

    The warm-up starts above 0, at least one step has the peak, and the last step is above 0: no step is wasted, however
    short the run is. (A schedule that starts at 0 learns nothing from its first step, and nothing in a run of one.)

    Args:
        step: From 0 to steps - 1.
        steps: Of the whole run.
        schedule: What follows the warm-up. "wsd" (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395) stays at
            the peak until it falls linearly at the end.
        warmup: Share of the steps in which it rises, rounded up.
        decay: Share of the steps in which "wsd" falls, rounded up.
    """
    rising = min(math.ceil(warmup * steps), steps - 1)
    if step < rising:
        return (step + 1) / (rising + 1)
    falling = {"wsd": min(math.ceil(decay * steps), steps - rising), "constant": 0}.get(schedule, steps - rising)
    fallen = max(0, step - (steps - falling)) / max(1, falling)
    if schedule == "cosine":
        return COSINE_END + (1 - COSINE_END) * (1 + math.cos(math.pi * fallen)) / 2
    return 1 - fallen
