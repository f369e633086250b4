"""InternLM2 as Llama: configuration, tensor names and shapes.

InternLM2 is Llama under other names, with the rows of query, key and value interleaved in one tensor `wqkv`
(InternLM/xtuner v0.2.0, `modeling_internlm2_reward/modeling_internlm2.py`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polar.core.errors import InputError

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


def map_config(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """The Llama `config.json` of an InternLM2 one.

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
    """Name and shape of every tensor that the InternLM2 source of a Llama config holds, each exactly once."""
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
    """The Llama tensors that one InternLM2 tensor (a key of `source_shapes`) becomes."""
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
