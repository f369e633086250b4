"""Adapters: low-rank weights, a score head and the embeddings of new tokens, saved beside a frozen base model.

The files are those of peft, `adapter_config.json` and `adapter_model.safetensors`. A directory with them holds no
`config.json`: transformers then loads the base model that the adapter names, and the adapter into it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from polar.core.checkpoint import read_json
from polar.core.errors import InputError, reason

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Prefix of peft before the name of every weight."""


def is_adapter(directory: Path) -> bool:
    """Return whether the directory holds an adapter."""
    return (directory / ADAPTER_CONFIG).is_file()


def base_of(directory: Path) -> str:
    """Return the base model of a saved adapter: a directory, possibly relative to the adapter's, or a hub name.

    Raises:
        InputError: the adapter does not say what its base is.
    """
    base = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise InputError(f"{directory / ADAPTER_CONFIG}: base_model_name_or_path is {base!r}; name a base model")
    return str(directory / base) if (directory / base).is_dir() else base


def require_peft() -> None:
    """Check that peft is installed, which is an extra.

    Raises:
        InputError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise InputError("adapters need the package peft: pip install 'polar-rm[train]'")


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the settings of weights in 4 bits, multiplied in `dtype` (QLoRA, section 3: nf4, double quantisation).

    Raises:
        InputError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise InputError("weights in 4 bits need the package bitsandbytes: pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["score"],  # it is trained; the name is from 8 bits, but it holds for 4 too
    )


def save_adapter(model: PreTrainedModel, directory: Path) -> None:
    """Write what is not in the base model: never its embeddings, even where they have grown by new tokens."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {PREFIX + name: weight.contiguous() for name, weight in weights.items()},
        directory / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )
    model.peft_config["default"].save_pretrained(directory)


def merge_adapter(base: Any, directory: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The base model with the adapter merged into its weights, which has the same rewards and is faster.

    A base in 4 bits is unpacked first: the adapter was trained on the rounded weights, not on those of the base.

    Args:
        base: The base model; it is changed.
        directory: Where the adapter is.
        tokenizer: The adapter's; tokens that the base does not have get their embeddings from the adapter.

    Raises:
        InputError: a weight of the adapter is missing, superfluous, misshapen or not finite.
    """
    from peft import LoraConfig, LoraModel, get_peft_model_state_dict, set_peft_model_state_dict

    kind = read_json(directory / ADAPTER_CONFIG).get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{directory}: is an adapter of type {kind}; expected LORA (merge it with peft, then load that)"
        )
    dtype = base.dtype
    if getattr(base, "is_loaded_in_4bit", False):
        base = base.dequantize(dtype)
    if len(tokenizer) > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if tokenizer.pad_token_id is not None:
        base.config.pad_token_id = tokenizer.pad_token_id
    try:
        adapter = LoraModel(base, LoraConfig.from_pretrained(str(directory)), "default")
        saved = load_file(directory / ADAPTER_WEIGHTS, device=str(base.device))
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{directory}: the adapter could not be loaded ({reason(error)})") from error
    weights = {name.removeprefix(PREFIX): weight for name, weight in saved.items()}
    _require_same(get_peft_model_state_dict(base, save_embedding_layers=False), weights, directory)
    set_peft_model_state_dict(base, weights)
    merged: Any = adapter.merge_and_unload().to(dtype).requires_grad_(True).eval()
    return merged  # type: ignore[no-any-return]


def _require_same(expected: dict[str, Any], found: dict[str, Any], directory: Path) -> None:
    """The adapter has exactly the weights that its configuration and its base ask for."""
    shapes, asked = ({name: tuple(weight.shape) for name, weight in part.items()} for part in (found, expected))
    if wrong := sorted(name for name in shapes.keys() | asked.keys() if shapes.get(name) != asked.get(name)):
        raise InputError(
            f"{directory}: weights of the adapter are missing, of the wrong shape or not for this base "
            f"({', '.join(wrong[:5])}); the rewards would be wrong, so this is refused"
        )
    if "score.weight" not in found:
        raise InputError(f"{directory}: the adapter holds no score head; it was not trained as a reward model")
    if broken := [name for name, weight in found.items() if not bool(torch.isfinite(weight).all())]:
        raise InputError(f"{directory}: weight {broken[0]} holds NaN or infinity; the adapter is broken")
