"""Export of our checkpoints to the layouts of XTuner and LMDeploy, the reverse of `polar.model.internlm2`.

A Llama becomes `InternLM2ForRewardModel` (InternLM/xtuner v0.2.0, `modeling_internlm2_reward`), which both of them
load. LMDeploy has one other reward model, `Qwen2ForRewardModel`, whose head has a hidden layer and a ReLU.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from polar.core.checkpoint import checkpoint_directory, find_shards, read_checkpoint_file, read_json
from polar.core.errors import InputError, reason
from polar.core.files import new_directory, on_disk, require_new, write_json
from polar.core.template import Template
from polar.core.version import __version__
from polar.model.internlm2 import COUNTS, LAYER_NAMES, OUTER_NAMES, REWARD_MODEL, source_shapes

Engine = Literal["xtuner", "lmdeploy"]

SHARD_BYTES = 5 * 10**9
"""Most bytes of weights in one file, and so in memory."""

AUTO_MAP = {
    "AutoConfig": "configuration_internlm2.InternLM2Config",
    "AutoModel": "modeling_internlm2.InternLM2ForRewardModel",
}
"""As in XTuner 0.2.0. It loads InternLM2 through the two Python files that this names, and they are XTuner's (in
`xtuner/tools/model_converters/modeling_internlm2_reward`): the user puts them there, as we ship and run no such code.
LMDeploy has a model of its own and needs none."""


def export(source: str | Path, target: str | Path, engine: Engine) -> str:
    """Write a reward model in the layout of another tool.

    Weights keep their dtype and at most `SHARD_BYTES` of them are in memory. The rewards are the same. The target
    appears complete or not at all.

    Args:
        source: A checkpoint of ours: a directory, a Hugging Face hub name, or "polar-nano".
        target: A directory that does not exist yet, or is empty.
        engine: Who is to load it.

    Returns:
        The architecture that was written.

    Raises:
        InputError: the model has no counterpart there, a weight is missing or not finite, or the target is in use or
            cannot be written.
    """
    target = Path(target)
    require_new(target)
    directory = checkpoint_directory(source)
    template = Template.load(directory)
    config = _read_config(directory, engine)
    weights = _locate_weights(directory)
    if config["model_type"] == "llama":
        exported = _internlm2_config(config, template, engine)
        tensors = _internlm2_tensors(weights, config)
    else:
        exported = _qwen2_config(config, directory)
        tensors = _qwen2_tensors(weights, config)
    ours = read_checkpoint_file(directory)
    provenance = {**ours.get("provenance", {}), "exported": f"{engine}, polar {__version__}"}
    with on_disk(target), new_directory(target) as written:
        kept = {name: ours[name] for name in ("probes", "calibration") if name in ours}  # the rewards are the same
        template.save(written, provenance=provenance, **kept)
        write_json(written / "config.json", exported)
        write_json(written / "tokenizer_config.json", _tokenizer_config(directory))
        for name in ("special_tokens_map.json", "chat_template.jinja"):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, written / name)
        _write_weights(tensors, written)
        if weights:  # what no tensor was made of
            raise InputError(f"{directory}: unexpected tensor {min(weights)}; {engine} has no place for it")
    return str(exported["architectures"][0])


def _read_config(directory: Path, engine: Engine) -> dict[str, Any]:
    """The config with all defaults filled in, rope and dtype in their old words, of a model that has a counterpart."""
    architecture = (read_json(directory / "config.json").get("architectures") or ["unknown"])[0]
    accepted = {
        "LlamaForSequenceClassification": ("xtuner", "lmdeploy"),
        "Qwen2ForSequenceClassification": ("lmdeploy",),
    }
    if engine not in accepted.get(architecture, ()):
        raise InputError(
            f"{directory}: {engine} has no reward model like {architecture}; expected "
            f"{' or '.join(name for name in accepted if engine in accepted[name])}. "
            "vLLM and SGLang serve a *ForSequenceClassification as it is, `polar finetune` trains it"
        )
    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(directory, local_files_only=True).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{directory}: config.json cannot be used ({reason(error)})") from error
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    match rope:
        case {"rope_type": "default"}:
            config["rope_scaling"] = None
        case {"rope_type": "linear" | "dynamic" as kind, "factor": factor}:
            config["rope_scaling"] = {"type": kind, "factor": float(factor)}
        case _:
            raise InputError(f"{directory}: {engine} has no rope like {rope}; expected default, linear or dynamic")
    if config.get("dtype") is None:
        raise InputError(f"{directory}: config.json names no dtype; expected the one of the weights")
    config["torch_dtype"] = str(config.pop("dtype")).removeprefix("torch.")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if config["model_type"] == "llama" and (config["mlp_bias"] or config["head_dim"] * heads != hidden):
        raise InputError(
            f"{directory}: {REWARD_MODEL} has no mlp_bias, and heads that make up the hidden_size; found mlp_bias "
            f"{config['mlp_bias']}, {heads} heads of {config['head_dim']}, hidden_size {hidden}. vLLM and SGLang serve "
            "the checkpoint as it is"
        )
    return config


def _internlm2_config(config: Mapping[str, Any], template: Template, engine: Engine) -> dict[str, Any]:
    """The `config.json` of `InternLM2ForRewardModel`, with every field that has a default there."""
    copied = ("hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "initializer_range", "torch_dtype")
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {
        "architectures": [REWARD_MODEL],
        "model_type": "internlm2",
        **{key: config[key] for key in (*COUNTS, *copied, *tokens)},
        "bias": config["attention_bias"],
        "tie_word_embeddings": False,  # there is no output layer, so what Llama says makes no difference
        "reward_token_id": template.settings.score_token_id,
        "split_token_id": template.settings.split_token_id,
        # LMDeploy reads the config without a class of its own; transformers 5 then takes rope from this alone.
        **({"auto_map": AUTO_MAP} if engine == "xtuner" else {"rope_parameters": config["rope_parameters"]}),
    }


def _internlm2_tensors(weights: dict[str, Path], config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of InternLM2, each made of its Llama tensors; the reverse of `internlm2.map_tensor`."""
    head_dim, kv_heads = config["head_dim"], config["num_key_value_heads"]
    rows = {"q": config["num_attention_heads"] * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    for name, shape in source_shapes(config, REWARD_MODEL).items():
        if name in OUTER_NAMES:
            yield name, _take(weights, OUTER_NAMES[name], shape)
            continue
        layer, part, kind = re.findall(r"(model\.layers\.\d+)\.(.+)\.(weight|bias)", name)[0]
        if part != "attention.wqkv":
            yield name, _take(weights, f"{layer}.{LAYER_NAMES[part]}.{kind}", shape)
            continue
        inner = shape[1:]  # nothing for a bias
        parts = [
            _take(weights, f"{layer}.self_attn.{letter}_proj.{kind}", (count, *inner)).reshape(
                kv_heads, -1, head_dim, *inner
            )
            for letter, count in rows.items()
        ]
        yield name, torch.cat(parts, dim=1).reshape(shape)


def _qwen2_config(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The `config.json` of `Qwen2ForRewardModel`: our own with rope and dtype in the words of every transformers."""
    words = {key: config[key] for key in ("rope_theta", "rope_scaling", "rope_parameters", "torch_dtype")}
    return read_json(directory / "config.json") | words | {"architectures": ["Qwen2ForRewardModel"]}


def _qwen2_tensors(weights: dict[str, Path], config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of Qwen2, with a head `w` as two rows of a hidden layer: w h = relu(w h) - relu(-w h), exactly."""
    hidden = config["hidden_size"]
    for name in sorted(weights.keys() - {"score.weight", "score.bias"}):
        yield name, _take(weights, name)
    score_1H = _take(weights, "score.weight", (1, hidden))
    bias_1 = _take(weights, "score.bias", (1,)) if "score.bias" in weights else score_1H.new_zeros(1)
    yield "score.0.weight", torch.cat([score_1H, -score_1H, score_1H.new_zeros(hidden - 2, hidden)])
    yield "score.0.bias", score_1H.new_zeros(hidden)
    yield "score.2.weight", torch.cat([score_1H.new_tensor([[1.0, -1.0]]), score_1H.new_zeros(1, hidden - 2)], dim=1)
    yield "score.2.bias", bias_1


def _locate_weights(directory: Path) -> dict[str, Path]:
    """The file of every tensor."""
    weights: dict[str, Path] = {}
    for shard in find_shards(directory):
        if shard.suffix != ".safetensors":
            raise InputError(f"{shard}: expected safetensors; load the checkpoint with transformers and save it again")
        try:
            with safe_open(shard, framework="pt") as file:
                weights |= dict.fromkeys(file.keys(), shard)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{shard}: not readable as weights ({reason(error)})") from error
    return weights


def _take(weights: dict[str, Path], name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """Read one tensor, check it, and strike it off `weights`."""
    if name not in weights:
        raise InputError(f"the checkpoint has no tensor {name}; expected the weights that its config.json describes")
    path = weights.pop(name)
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    if shape is not None and tuple(tensor.shape) != shape:
        raise InputError(f"{path}: {name} has shape {tuple(tensor.shape)}; config.json asks for {shape}")
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise InputError(f"{path}: {name} is {tensor.dtype}; expected float16, bfloat16 or float32 (not quantised)")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{path}: {name} holds NaN or infinity; the checkpoint is broken")
    return tensor


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    """The `tokenizer_config.json` in the words of transformers 4, which XTuner pins; release 5 reads them too."""
    config = read_json(directory / "tokenizer_config.json")
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return {**config, "tokenizer_class": "PreTrainedTokenizerFast"}


def _write_weights(tensors: Iterable[tuple[str, Tensor]], written: Path) -> None:
    """Write tensors to files of at most `SHARD_BYTES`, with an index if there are several."""
    parts: list[list[str]] = []
    total = 0
    shard: dict[str, Tensor] = {}

    def close_shard() -> None:
        path = written / f"part-{len(parts)}"
        save_file(shard, path, metadata={"format": "pt"})
        shutil.copymode(written / "config.json", path)  # safetensors makes files private to their owner
        parts.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > SHARD_BYTES:
            close_shard()
        shard[name] = tensor
        total += tensor.nbytes
    close_shard()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        (written / f"part-{number}").rename(written / file)
        weight_map |= dict.fromkeys(names, file)
    if len(parts) > 1:
        write_json(
            written / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
