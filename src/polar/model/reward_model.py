"""`RewardModel`: load, score and save a reward model.

A checkpoint is a plain Hugging Face `*ForSequenceClassification` directory (one label, safetensors, fast tokenizer)
plus `polar.json`, which holds the template, the calibration and the provenance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar.core.checkpoint import (
    BUNDLED_NAME,
    CHECKPOINT_FILE,
    Calibration,
    Scale,
    checkpoint_directory,
    put_in_place,
    read_calibration,
    read_checkpoint_file,
    scaling,
    with_reference,
)
from polar.core.errors import InputError, reason
from polar.core.files import on_disk, staging_directory
from polar.core.records import Comparison, Group
from polar.core.template import Compat, EncodedGroup, Template
from polar.data import record_rows
from polar.data.record_rows import Item

if TYPE_CHECKING:  # torch and transformers take seconds to import, so methods do it when they need them
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RewardModel:
    """A reward model with its tokenizer and its input format.

    Example:
        >>> from polar import Comparison, RewardModel
        >>> model = RewardModel.load()
        >>> reward = model.score([Comparison("2+2?", "It is 4.", "4")])[0]
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        provenance: dict[str, Any] | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        pad, limit = model.config.pad_token_id, getattr(model.config, "max_position_embeddings", None)
        if pad is None or pad == template.settings.score_token_id:
            raise InputError(
                f"the model's pad_token_id is {pad}; it must be set and must differ from the score token "
                f"{template.settings.score_token_id}, or engines read the reward at the wrong place"
            )
        vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        if not 0 <= pad < vocabulary:
            raise InputError(
                f"the model's pad_token_id is {pad}; expected a token of its vocabulary, 0 to {vocabulary - 1}"
            )
        if (largest := template.largest_id) >= vocabulary:
            raise InputError(
                f"the tokenizer has id {largest}, but the model has embeddings for {vocabulary} tokens; resize them, "
                "or take the tokenizer that the model was trained with"
            )
        if limit is not None and template.settings.max_length > limit:
            raise InputError(
                f"the template's max_length {template.settings.max_length} exceeds the model's "
                f"max_position_embeddings {limit}; lower it in {CHECKPOINT_FILE}"
            )
        from polar.model.backbone import prepare

        prepare(model)
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.provenance = provenance or {}
        self.calibration = calibration
        """Calibration of the present weights: whoever changes them sets it to None."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    @classmethod
    def load(
        cls,
        path_or_hub_id: str | Path = BUNDLED_NAME,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        in_4bit: bool = False,
        compat: Compat | None = None,
    ) -> RewardModel:
        """Load a checkpoint, or an adapter, which is merged into its base model.

        Loading is strict: a missing score head or any other missing weight is an error, and so is a NaN.

        Args:
            path_or_hub_id: A directory, a Hugging Face hub name, or a bundled model ("polar-mini", "polar-nano").
            device: Default: the first GPU if there is one, else the CPU.
            dtype: Default: bfloat16 on a GPU, float32 on a CPU. Ask for "bfloat16" on CPUs that multiply it natively
                (AVX512-BF16, AMX): it is several times as fast there.
            in_4bit: Hold the linear layers, which are most of a model, in 4 bits each: less memory, slower, and rewards
                that differ a little. Needs the package bitsandbytes.
            compat: "seed" builds the inputs exactly as the original POLAR client does.

        Raises:
            InputError: there is no usable checkpoint at that place; the message says what is missing.
        """
        from transformers import AutoTokenizer

        from polar.model.adapters import is_adapter
        from polar.model.weights import choose_device, choose_dtype, load_merged, load_weights, require_reward_config

        directory = checkpoint_directory(path_or_hub_id)
        adapted = is_adapter(directory)
        if not adapted:
            require_reward_config(directory)
        template = Template.load(directory, compat)
        provenance = read_checkpoint_file(directory).get("provenance") or {}
        calibration = read_calibration(directory)
        place = choose_device(device)
        weights = choose_dtype(dtype, place)
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{directory}: the tokenizer could not be loaded ({reason(error)})") from error
        if adapted:
            if in_4bit:
                raise InputError(f"{directory}: an adapter cannot be merged in 4 bits; `polar convert` it first")
            rounded = bool(provenance.get("lora", {}).get("load_in_4bit"))
            model = load_merged(directory, tokenizer, weights, place, rounded=rounded)
        else:
            model = load_weights(directory, weights, place, in_4bit=in_4bit)
        return cls(model, tokenizer, template, provenance, calibration)

    def save(self, directory: str | Path) -> None:
        """Write the checkpoint, complete or not at all; it replaces an older one, and nothing else that is there.

        Raises:
            InputError: the directory holds something else than a checkpoint, is a file, or cannot be written.
        """
        from polar.model.adapters import is_adapter, save_adapter
        from polar.model.probes import write_probes

        target = Path(directory)
        if target.exists() and not target.is_dir():
            raise InputError(f"{target}: is a file; a checkpoint is a directory, choose a new one")
        config = self.model.config
        config.problem_type = "regression"  # engines then answer the raw score instead of its sigmoid
        config.reward_token_id = self.template.settings.score_token_id
        config.split_token_id = self.template.settings.split_token_id
        with on_disk(target):
            found = sorted(path.name for path in target.iterdir()) if target.exists() else []
            if found and CHECKPOINT_FILE not in found:
                raise InputError(
                    f"{target}: holds other files than a checkpoint ({', '.join(found[:3])}); choose a new directory"
                )
            with staging_directory(target, inside=target.exists()) as written:
                if getattr(self.model, "peft_config", None):
                    save_adapter(self.model, written)
                else:
                    self.model.save_pretrained(written, state_dict=_weights_to_save(self.model))
                for weights in written.glob("*.safetensors"):
                    weights.chmod(0o644)  # safetensors writes 0600, which a server under another user cannot read
                self.tokenizer.save_pretrained(written)
                calibration = {} if self.calibration is None else {"calibration": asdict(self.calibration)}
                self.template.save(written, provenance=self.provenance, **calibration)
                if not is_adapter(written):  # which is not served before it is merged
                    write_probes(written)
                put_in_place(written, target)

    def score(
        self,
        comparisons: Comparison | Item | Iterable[Comparison | Item],
        *,
        scale: Scale = "raw",
        batch_tokens: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> list[float]:
        """Return the rewards of independent comparisons, in their order.

        Args:
            comparisons: What to score, also as dictionaries or tuples (`record_rows.Item`); each has its own truncation
                budget. A tuple (prompt, reference, [several candidates]) gives as many rewards.
            scale: Of the results; see `polar.core.checkpoint.Scale`.
            batch_tokens: Tokens of one forward pass; at most a shared prefix more. Default: 4096 on a CPU, more falls
                out of its caches; else 16384.
            progress: Called with the number of candidates that were just scored.

        Raises:
            InputError: a text is not valid Unicode, or z-scores are asked of a checkpoint without calibration.
            FloatingPointError: a reward is not finite. A failed reward is never a number.
        """
        groups = record_rows.groups_of_items(comparisons)
        scored = self.score_groups(groups, scale=scale, batch_tokens=batch_tokens, progress=progress)
        return [value for values in scored for value in values]

    def score_groups(
        self,
        groups: Iterable[Group],
        *,
        scale: Scale = "raw",
        batch_tokens: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> list[list[float]]:
        """Return the rewards of every candidate of every group, in their order.

        The shared prefix of a group is computed once and its candidates share one truncation budget, so they stay
        comparable. Arguments and errors as in `score`.
        """
        in_scale = scaling(scale, self.calibration)
        asked = (with_reference(group) for group in groups) if scale == "probability" else groups
        encoded = [self.template.encode_group(group) for group in asked]
        scored = self.score_encoded(encoded, batch_tokens=batch_tokens, progress=progress)
        return [in_scale(rewards) for rewards in scored]

    def score_encoded(
        self,
        groups: Sequence[EncodedGroup],
        *,
        batch_tokens: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> list[list[float]]:
        """Return the rewards of groups that the template has encoded already; see `score_groups`."""
        import torch

        from polar.model.cpu import choose_kernel, use_kernel
        from polar.model.tree import rewards, tree_batch

        scores: list[list[float]] = [[] for _ in groups]
        shared = bool(self.model.takes_rows)
        kernel = choose_kernel(self.model)
        for row in _rows(groups, batch_tokens or (4096 if self.device.type == "cpu" else 16384), shared=shared):
            batch = tree_batch([piece for _, piece in row], onednn=kernel == "onednn").to(self.device)
            with torch.inference_mode(), use_kernel(kernel, self.model.dtype):
                values = rewards(self.model, batch).tolist()
            if progress is not None:
                progress(len(values))
            for index, piece in row:
                scores[index] += values[: len(piece.branches)]
                values = values[len(piece.branches) :]
        for index, values in enumerate(scores):
            for candidate, value in enumerate(values):
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"the reward of candidate {candidate} of group {index} is {value}; "
                        "the dtype overflowed or the weights are broken (try dtype float32)"
                    )
        return scores


def _weights_to_save(model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights, with a bias of zero for the score head where SGLang would otherwise make up a random one."""
    weights: dict[str, Tensor] = model.state_dict()
    if model.config.model_type in ("qwen2", "qwen3"):
        weights.setdefault("score.bias", weights["score.weight"].new_zeros(1))
    return weights


def _rows(
    groups: Sequence[EncodedGroup], batch_tokens: int, *, shared: bool = True
) -> Iterator[list[tuple[int, EncodedGroup]]]:
    """Fill rows of at most `batch_tokens` (at least one piece each) with groups and their numbers, in order.

    Where prefixes are not shared, every candidate is a piece, and all of them count as much as the longest.
    """
    from polar.model.tree import row_length

    row: list[tuple[int, EncodedGroup]] = []
    tokens, longest = 0, 0
    for index, group in enumerate(groups):
        for piece in _pieces(group, batch_tokens if shared else 0):
            tokens, longest = tokens + row_length(piece), max(longest, row_length(piece))
            if row and (tokens if shared else (len(row) + 1) * longest) > batch_tokens:
                yield row
                row, tokens, longest = [], row_length(piece), row_length(piece)
            row.append((index, piece))
    if row:
        yield row


def _pieces(group: EncodedGroup, batch_tokens: int) -> Iterator[EncodedGroup]:
    """Cut a group whose branches exceed `batch_tokens`; the prefix does not count, as every piece computes it again."""
    start, tokens = 0, 0
    for number, branch in enumerate(group.branches):
        if number > start and tokens + len(branch) > batch_tokens:
            yield replace(group, branches=group.branches[start:number], truncations=group.truncations[start:number])
            start, tokens = number, 0
        tokens += len(branch)
    if group.branches:
        yield replace(group, branches=group.branches[start:], truncations=group.truncations[start:])
