"""Conversion of official POLAR checkpoints (`InternLM2ForRewardModel`) to plain Hugging Face Llama.

The converted checkpoint gives the same rewards without remote code: weights, fast tokenizer (`sentencepiece`) and
template. InternLM2 is Llama under other names, with the rows of query, key and value interleaved in one tensor `wqkv`
(InternLM/xtuner v0.2.0, `modeling_internlm2_reward/modeling_internlm2.py`).
"""

from __future__ import annotations

import logging
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from polar.core.checkpoint import CHECKPOINT_FILE, find_shards, local_directory, read_json
from polar.core.errors import InputError, reason
from polar.core.files import new_directory, on_disk, require_new, write_json
from polar.core.template import Template, TemplateSettings
from polar.core.version import __version__
from polar.model.probes import write_probes
from polar.model.sentencepiece import build_tokenizer, read_model, token_content

log = logging.getLogger(__name__)

REWARD_MODEL, BASE_MODEL = "InternLM2ForRewardModel", "InternLM2ForCausalLM"

POLAR_LENGTH = 16384
"""Longest input of the official models, in tokens."""

COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
OUTER_NAMES = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "v_head.weight": "score.weight",
}
LAYER_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

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
    """Return the template with its fast tokenizer, and the `tokenizer_config.json` to be written."""
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


def _take_slots(model: Any, tokenizer_config: Mapping[str, Any], directory: Path) -> tuple[int, dict[str, Any]]:
    """Return the score token's id and a tokenizer config with the split token, for a base model with neither."""
    slots = {piece.piece: index for index, piece in enumerate(model.pieces)}
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


def read_shard(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of one weight file, one after the other; nothing in the file can run code.

    Raises:
        InputError: the file is missing or damaged, or it holds something else than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield name, file.get_tensor(name)
            return
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file, but the index names it; download the checkpoint again") from error
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: not a plain file of tensors; refused, because loading it could run code") from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(
            f"{path}: not readable as weights ({reason(error)}); download it again or store it as safetensors"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise InputError(f"{path}: expected a dictionary of tensors")
    yield from tensors.items()


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


def map_config(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """Return the Llama `config.json` of an InternLM2 one.

    The old pair of keys `rope_theta`, `rope_scaling` is written because every release of transformers reads it.
    Dynamic NTK scaling has no effect up to `max_position_embeddings`, but some engines apply it at every length; where
    no POLAR input is longer, as in all official models, it is left out.

    Raises:
        InputError: a key is missing, or this is no InternLM2 model that can be converted.
    """
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in (REWARD_MODEL, BASE_MODEL):
        raise InputError(f"{where}: architecture {architecture}; expected {REWARD_MODEL} or {BASE_MODEL}")
    copied = ("hidden_act", "rms_norm_eps", "rope_theta", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype")
    missing = [key for key in (*COUNTS, *copied, "bias") if config.get(key) is None]
    if missing:
        raise InputError(f"{where}: config.json lacks {', '.join(missing)}; expected the config of an InternLM2 model")
    for key in COUNTS:
        if not isinstance(config[key], int) or config[key] < 1:
            raise InputError(f"{where}: {key} is {config[key]!r} in config.json; expected a positive integer")
    hidden, heads, kv_heads = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if hidden % heads or heads % kv_heads:
        raise InputError(f"{where}: hidden_size {hidden}, {heads} heads, {kv_heads} key-value heads do not divide")
    return {
        "architectures": ["LlamaForSequenceClassification"],
        "model_type": "llama",
        **{key: config[key] for key in (*COUNTS, *copied)},
        "head_dim": hidden // heads,
        "rope_scaling": _map_rope_scaling(config, where),
        "attention_bias": bool(config["bias"]),
        "mlp_bias": False,
        "initializer_range": config.get("initializer_range", 0.02),
        "tie_word_embeddings": False,
        # One label without an activation, so that engines answer the raw score.
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "problem_type": "regression",
    }


def source_shapes(llama: Mapping[str, Any], architecture: str) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that the InternLM2 source of a Llama config holds, each exactly once."""
    hidden, inner, vocabulary = llama["hidden_size"], llama["intermediate_size"], llama["vocab_size"]
    wqkv = (llama["num_attention_heads"] + 2 * llama["num_key_value_heads"]) * llama["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.tok_embeddings.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    shapes |= (
        {"v_head.weight": (1, hidden)} if architecture == REWARD_MODEL else {"output.weight": (vocabulary, hidden)}
    )
    for layer in (f"model.layers.{number}" for number in range(llama["num_hidden_layers"])):
        shapes[f"{layer}.attention.wqkv.weight"] = (wqkv, hidden)
        shapes[f"{layer}.attention.wo.weight"] = (hidden, hidden)
        if llama["attention_bias"]:
            shapes[f"{layer}.attention.wqkv.bias"] = (wqkv,)
            shapes[f"{layer}.attention.wo.bias"] = (hidden,)
        shapes[f"{layer}.feed_forward.w1.weight"] = (inner, hidden)
        shapes[f"{layer}.feed_forward.w2.weight"] = (hidden, inner)
        shapes[f"{layer}.feed_forward.w3.weight"] = (inner, hidden)
        shapes[f"{layer}.attention_norm.weight"] = (hidden,)
        shapes[f"{layer}.ffn_norm.weight"] = (hidden,)
    return shapes


def map_tensor(name: str, tensor: Tensor, llama: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the Llama tensors that one InternLM2 tensor (a key of `source_shapes`) becomes."""
    if name == "output.weight":
        return {"score.weight": tensor.new_zeros(1, llama["hidden_size"])}
    if name in OUTER_NAMES:
        return {OUTER_NAMES[name]: tensor.contiguous()}
    layer, part, kind = re.findall(r"(model\.layers\.\d+)\.(.+)\.(weight|bias)", name)[0]
    if part != "attention.wqkv":
        return {f"{layer}.{LAYER_NAMES[part]}.{kind}": tensor.contiguous()}
    # The rows of each key-value head are its query heads, its key and its value; a bias has no last dimension.
    rows = tensor.reshape(llama["num_key_value_heads"], -1, llama["head_dim"], *tensor.shape[1:])
    parts = {"q": rows[:, :-2], "k": rows[:, -2], "v": rows[:, -1]}
    return {
        f"{layer}.self_attn.{letter}_proj.{kind}": part.reshape(-1, *tensor.shape[1:]).contiguous()
        for letter, part in parts.items()
    }


def _map_rope_scaling(config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    scaling, limit = config.get("rope_scaling"), config["max_position_embeddings"]
    match scaling:
        case None:
            return None
        case {"type": "dynamic", "factor": int() | float()} if limit >= POLAR_LENGTH:
            return None
        case {"type": "dynamic" | "linear" as kind, "factor": int() | float() as factor}:
            if kind == "dynamic":
                log.warning("%s: dynamic rope is kept; engines disagree about it (max positions %d)", where, limit)
            return {"rope_type": kind, "factor": float(factor)}
    raise InputError(f"{where}: rope_scaling {scaling} in config.json; expected type linear or dynamic, and a factor")
