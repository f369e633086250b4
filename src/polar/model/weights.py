"""The weights of a checkpoint, loaded strictly: nothing missing, nothing random, nothing that is not finite."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from polar.core.checkpoint import checkpoint_directory, find_shards, read_json
from polar.core.errors import InputError, reason
from polar.model.adapters import base_of, four_bits, is_adapter, merge_adapter, require_peft
from polar.model.cpu import multiplies_bfloat16

log = logging.getLogger(__name__)


def require_reward_config(directory: Path) -> None:
    """Raise an `InputError` if the directory holds another kind of model, and say what to do with it."""
    architecture = (read_json(directory / "config.json").get("architectures") or ["unknown"])[0]
    if architecture.startswith("InternLM2"):
        raise InputError(f"{directory}: {architecture} is an official POLAR layout; run `polar convert` on it first")
    if not architecture.endswith("ForSequenceClassification"):
        raise InputError(
            f"{directory}: architecture {architecture} has no score head; expected *ForSequenceClassification "
            "(train one from it with `polar pretrain` or `polar finetune`)"
        )


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the device of that name; by default the first GPU if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r}: expected a torch device like cpu or cuda:0") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r}: torch sees no GPU here")
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the type of that name; by default bfloat16 on a GPU and float32 on a CPU."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype {dtype!r}: expected float32, bfloat16 or float16")
    if device.type == "cpu" and chosen is torch.bfloat16 and not multiplies_bfloat16():
        log.warning("this CPU has no native bfloat16 arithmetic: scoring works, but float32 is faster here")
    return chosen


def load_weights(
    directory: Path, dtype: torch.dtype, device: torch.device, *, in_4bit: bool = False, new_head: bool = False
) -> PreTrainedModel:
    """Return the model of a checkpoint without its tokenizer and template, strictly as in `RewardModel.load`.

    Args:
        directory: The checkpoint.
        dtype: Type of the weights.
        device: Where to put them.
        in_4bit: Hold the linear layers in 4 bits, except the score head.
        new_head: The score head comes from elsewhere, so it may be missing here.

    Raises:
        InputError: a weight is missing, misshapen, not finite, quantised already or not used.
    """
    _require_plain_weights(directory)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, **({"num_labels": 1} if new_head else {}))
        if config.num_labels != 1:
            raise InputError(f"{directory}: the score head has {config.num_labels} labels; a reward model has one")
        model, info = AutoModelForSequenceClassification.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation="eager",  # which every architecture has; `RewardModel` chooses
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            quantization_config=four_bits(dtype) if in_4bit else None,
            device_map={"": device} if in_4bit else None,
        )
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{directory}: the checkpoint could not be loaded ({reason(error)})") from error
    missing = [name for name in info["missing_keys"] if not (new_head and name.startswith("score."))]
    problems = sorted([*missing, *(str(key) for key in info["mismatched_keys"])])
    if problems:
        raise InputError(
            f"{directory}: weights are missing or have the wrong shape ({', '.join(problems[:5])}); "
            "they would be random numbers, so this is refused"
        )
    if not new_head:
        _require_all_used(directory, info["unexpected_keys"])
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # On such a CPU bitsandbytes would repack its weights when a reward is asked for, and has no gradients then.
            layer.support_avx512bf16_for_cpu = False
    model = model.to(device).eval()
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(f"{directory}: weight {name} holds NaN or infinity; the checkpoint is broken")
    return model  # type: ignore[no-any-return]


def _require_plain_weights(directory: Path) -> None:
    quantised = read_json(directory / "config.json").get("quantization_config") or {}
    if quantised and not quantised.get("load_in_4bit"):
        raise InputError(
            f"{directory}: the weights are quantised ({quantised.get('quant_method', 'by an unnamed method')}); "
            "expected plain ones (float32, bfloat16, float16): take the checkpoint that they were made from"
        )


def _require_all_used(directory: Path, unused: Collection[str]) -> None:
    """Refuse weights that the model has no place for and that would have changed the rewards."""
    harmless = re.compile(r"lm_head\..*|.*\.inv_freq")
    wrong = sorted(name for name in unused if not harmless.fullmatch(name))
    if wrong == ["score.bias"]:  # `RewardModel.save` writes zeros, for SGLang
        bias = _tensor(directory, "score.bias")
        if not bool(bias.any()):
            return
        raise InputError(
            f"{directory}: score.bias is {bias.tolist()}, but the score head of this architecture has no bias, so "
            "transformers ignores it and engines differ; set it to zero (it moves all rewards alike)"
        )
    if wrong:
        raise InputError(
            f"{directory}: the model of config.json has no place for the weights {', '.join(wrong[:5])}; without them "
            "the rewards would be those of another model, so this is refused"
        )


def _tensor(directory: Path, name: str) -> Tensor:
    for shard in find_shards(directory):
        with safe_open(shard, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 (not a dict)
                tensor: Tensor = file.get_tensor(name)
                return tensor
    raise KeyError(name)


def load_merged(
    adapter: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device, *, rounded: bool
) -> PreTrainedModel:
    """Return an adapter merged into its base model; arguments and errors as in `load_weights`.

    Args:
        adapter: Its directory.
        tokenizer: The adapter's own.
        dtype: Type of the weights.
        device: Where to put them.
        rounded: The adapter was trained on a base in 4 bits, so it is merged into one.
    """
    base = load_weights(_base_directory(adapter), dtype, device, in_4bit=rounded, new_head=True)
    return merge_adapter(base, adapter, tokenizer)


def _base_directory(adapter: Path) -> Path:
    require_peft()
    base = base_of(adapter)
    try:
        directory = checkpoint_directory(base)
    except InputError as error:
        raise InputError(
            f"{adapter}: the base model of this adapter cannot be had ({error}); put it there, or write its new place "
            "into adapter_config.json (base_model_name_or_path)"
        ) from error
    if is_adapter(directory):
        raise InputError(f"{adapter}: its base model {base} is an adapter too; expected a whole model")
    return directory


def weights_hash(directory: Path) -> str:
    """Return sixteen hexadecimal digits of the weights' files; for an adapter, those of its base too."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    if is_adapter(directory):
        digest.update(weights_hash(checkpoint_directory(base_of(directory))).encode())
    return digest.hexdigest()[:16]
