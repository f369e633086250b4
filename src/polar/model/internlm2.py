"""Conversion of official POLAR checkpoints (`InternLM2ForRewardModel`) to plain Hugging Face Llama.

The converted checkpoint gives the same rewards without remote code: weights (`internlm2_layout`), fast tokenizer
(`sentencepiece`) and template.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from polar.core.checkpoint import CHECKPOINT_FILE, local_directory
from polar.core.errors import InputError
from polar.core.files import new_directory, on_disk, require_new, write_json
from polar.core.template import Template, TemplateSettings
from polar.core.version import __version__
from polar.model.files import find_shards, read_json, read_shard
from polar.model.internlm2_layout import BASE_MODEL, map_config, map_tensor, source_shapes
from polar.model.probes import write_probes
from polar.model.sentencepiece import SentencePieceModel, build_tokenizer, read_model, token_content

log = logging.getLogger(__name__)

SOURCE_FILES = (
    "config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    CHECKPOINT_FILE,
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
)
"""All that is read, and downloaded, of a checkpoint: never code."""

SPLIT_TOKEN = "<|reward|>"
SPLIT_SLOT, SCORE_SLOT = "[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_130]"
"""Slots of the base vocabulary that POLAR takes; its tokenizer calls the first one `SPLIT_TOKEN`."""


def convert(source: str | Path, target: str | Path) -> None:
    """Convert a POLAR checkpoint, or an InternLM2 base model, to `LlamaForSequenceClassification`.

    Weights keep their dtype and are converted shard by shard. The target appears complete or not at all.

    Args:
        source: A directory or a Hugging Face hub name; the weights are safetensors or `pytorch_model*.bin`.
        target: A directory that does not exist yet, or is empty.

    Raises:
        InputError: a file is missing, damaged or not what the config says, a weight is not finite, or the target is
            in use or cannot be written.
    """
    target = Path(target)
    require_new(target)
    directory = local_directory(source, SOURCE_FILES)
    config = read_json(directory / "config.json")
    llama = map_config(config, where=str(directory))
    template, tokenizer_config = _map_tokenizer(directory, config)
    llama["reward_token_id"] = template.settings.score_token_id
    llama["split_token_id"] = template.settings.split_token_id
    architecture = config["architectures"][0]
    shapes = source_shapes(llama, architecture)
    shards = find_shards(directory)
    with on_disk(target), new_directory(target) as written:
        provenance = {"source": str(source), "architecture": architecture, "converter": f"polar {__version__}"}
        template.save(written, provenance=provenance)
        write_json(written / "config.json", llama)
        write_json(written / "tokenizer_config.json", tokenizer_config)
        _convert_weights(shards, written, shapes, llama)
        write_probes(written)


def _map_tokenizer(directory: Path, config: Mapping[str, Any]) -> tuple[Template, dict[str, Any]]:
    """The template with its fast tokenizer, and the `tokenizer_config.json` to be written."""
    tokenizer_config = read_json(directory / "tokenizer_config.json")
    if (directory / CHECKPOINT_FILE).is_file() and not (directory / "tokenizer.model").is_file():
        # `polar export` wrote it, or XTuner fine-tuned what it wrote: tokenizer and template are ours already.
        return Template.load(directory), tokenizer_config
    model = read_model(directory / "tokenizer.model")
    score = config.get("reward_token_id")
    if score is None and config["architectures"][0] == BASE_MODEL:
        score, tokenizer_config = _take_slots(model, tokenizer_config, directory)
    tokenizer = build_tokenizer(model, tokenizer_config, where=str(directory))
    split, vocab_size = tokenizer.token_to_id(SPLIT_TOKEN), config["vocab_size"]
    if split is None or split == score or not isinstance(score, int) or not 0 <= score < vocab_size:
        raise InputError(
            f"{directory}: reward_token_id is {score} and {SPLIT_TOKEN} has id {split}; expected two different tokens, "
            "as in POLAR (InternLM2-Reward of 2024 is another model)"
        )
    for role in ("bos", "pad"):
        name, index = token_content(tokenizer_config.get(f"{role}_token")), config[f"{role}_token_id"]
        if name is None or tokenizer.token_to_id(name) != index or index in (score, split):
            raise InputError(
                f"{directory}: {role}_token_id is {index} in config.json and {role}_token is {name!r} in "
                "tokenizer_config.json; expected the same token, and neither the split nor the score token"
            )
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise InputError(f"{directory}: the tokenizer has id {largest}, but vocab_size is {vocab_size} in config.json")
    bos = None if tokenizer.post_processor is None else config["bos_token_id"]
    settings = TemplateSettings(split_token_id=split, score_token_id=score, bos_token_id=bos)
    if (limit := config["max_position_embeddings"]) < settings.max_length:
        settings = replace(settings, max_length=limit, max_response_length=max(1, limit // 4))
    roles = ("unk_token", "bos_token", "eos_token", "pad_token")
    kept = ("add_bos_token", "chat_template", "model_max_length")
    return Template(tokenizer, settings), {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **{role: token_content(tokenizer_config.get(role)) for role in roles},
        "additional_special_tokens": [
            token_content(token) for token in tokenizer_config.get("additional_special_tokens") or []
        ],
        **{key: tokenizer_config[key] for key in kept if key in tokenizer_config},
    }


def _take_slots(
    model: SentencePieceModel, tokenizer_config: Mapping[str, Any], directory: Path
) -> tuple[int, dict[str, Any]]:
    """The score token's id, and the tokenizer config with the split token, for a base model that has neither yet."""
    slots = {piece.text: index for index, piece in enumerate(model.pieces)}
    if SPLIT_SLOT not in slots or SCORE_SLOT not in slots:
        raise InputError(
            f"{directory}: tokenizer.model has no {SPLIT_SLOT} or {SCORE_SLOT} for the split and score token"
        )
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split = {"content": SPLIT_TOKEN, **flags, "special": True}
    log.warning("%s: a base model; %s becomes %s and the score head starts at zero", directory, SPLIT_SLOT, SPLIT_TOKEN)
    return slots[SCORE_SLOT], {
        **tokenizer_config,
        "added_tokens_decoder": {**(tokenizer_config.get("added_tokens_decoder") or {}), str(slots[SPLIT_SLOT]): split},
        "additional_special_tokens": [*(tokenizer_config.get("additional_special_tokens") or []), SPLIT_TOKEN],
    }


def _convert_weights(
    shards: Sequence[Path], written: Path, shapes: Mapping[str, tuple[int, ...]], llama: Mapping[str, Any]
) -> None:
    """Write the weights of `shards` as Llama safetensors to the directory `written`, one shard after the other."""
    missing = set(shapes)
    sizes: dict[str, int] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        converted = _convert_shard(shard, written / name, shapes, missing, llama)
        shutil.copymode(written / "config.json", written / name)  # safetensors makes files private to their owner
        sizes |= converted
        weight_map |= dict.fromkeys(converted, name)
        log.info("%s: converted, %d of %d", shard, number, len(shards))
    if missing:
        raise InputError(
            f"{shards[0].parent}: {len(missing)} tensors are missing from the weights: {min(missing)}, ..."
        )
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(written / "model.safetensors.index.json", index)


def _convert_shard(
    shard: Path, output: Path, shapes: Mapping[str, tuple[int, ...]], missing: set[str], llama: Mapping[str, Any]
) -> dict[str, int]:
    """Write one shard, take its tensors off `missing`, and return the names and bytes of what was written.

    No tensor outlives the call, so that a conversion never holds more than one shard.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in read_shard(shard):
        if name.endswith("rotary_emb.inv_freq"):  # in older dumps; it follows from the config
            continue
        _check_tensor(name, tensor, shapes, missing, shard)
        missing.remove(name)
        converted |= map_tensor(name, tensor, llama)
    save_file(converted, output, metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in converted.items()}


def _check_tensor(
    name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]], missing: set[str], shard: Path
) -> None:
    if name not in shapes:
        raise InputError(f"{shard}: unexpected tensor {name}; expected the weights that config.json describes")
    if name not in missing:
        raise InputError(f"{shard}: tensor {name} was in an earlier shard already; expected every tensor once")
    if tuple(tensor.shape) != shapes[name]:
        raise InputError(f"{shard}: {name} has shape {tuple(tensor.shape)}; config.json asks for {shapes[name]}")
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise InputError(f"{shard}: {name} is {tensor.dtype}; expected float16, bfloat16 or float32 (not quantised)")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{shard}: {name} holds NaN or infinity; the checkpoint is broken, download it again")
