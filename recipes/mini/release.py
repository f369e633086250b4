"""Make the shipped checkpoint of a trained one: weights in 8 bits, scaled into their range, and room for long texts.

    python recipes/mini/release.py TRAINED TARGET [--dtype float8_e4m3fn]

The weights are stored as `float8_e4m3fn` in plain safetensors, one byte each; whoever loads them asks for float32 or
bfloat16. Eight bits hold numbers from 2**-9 to 448, so every matrix is first multiplied by a power of two that its
neighbours take back, which changes no reward: what reads a norm through the norm's weight, what writes to the residual
stream (embeddings, attention outputs, feed-forward outputs) all together, since a norm follows.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from polar import RewardModel

MAX_LENGTH = 4096
MAX_RESPONSE_LENGTH = 1536
LARGEST = 448.0
"""The largest number of float8_e4m3fn."""


def main() -> None:
    """Load in float32, scale, save, and store the matrices in 8 bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained")
    parser.add_argument("target")
    parser.add_argument("--dtype", default="float8_e4m3fn", help="of the matrices; bfloat16 stores them as trained")
    arguments = parser.parse_args()
    model = RewardModel.load(arguments.trained, device="cpu", dtype="float32")
    model.template = model.template.with_lengths(MAX_LENGTH, MAX_RESPONSE_LENGTH)
    dtype = getattr(torch, arguments.dtype)
    scale(model.model)
    round_to(model.model, dtype)
    model.provenance = {
        "name": "polar-mini",
        "recipe": "recipes/mini",
        "start": "SmolLM2-135M-Instruct (Apache-2.0), first layers and tokens",
        "training": model.provenance.get("training"),
    }
    model.save(arguments.target)
    store(Path(arguments.target) / "model.safetensors", dtype)


@torch.no_grad()
def scale(model: Any) -> None:
    """Multiply the matrices of a Llama by powers of two, so that their largest numbers stand near the top of 8 bits."""
    backbone = model.model
    writers = [backbone.embed_tokens.weight]
    for layer in backbone.layers:
        writers += [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]
        attention, feed_forward = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (feed_forward.gate_proj, feed_forward.up_proj)),
        ):
            factor = power_of_two(max(float(reader.weight.abs().max()) for reader in readers))
            norm.weight /= factor
            for reader in readers:
                reader.weight *= factor
    factor = power_of_two(max(float(weight.abs().max()) for weight in writers))
    for weight in writers:
        weight *= factor
    model.config.rms_norm_eps *= factor**2  # the stream is larger by the factor, its square by the square


def power_of_two(largest: float) -> float:
    """By how much numbers up to `largest` may be multiplied."""
    return 2.0 ** math.floor(math.log2(LARGEST / largest))


@torch.no_grad()
def round_to(model: Any, dtype: torch.dtype) -> None:
    """Give the matrices the values that they have when stored, so that probes and evaluation see these."""
    for name, weight in model.named_parameters():
        if is_stored_small(name, weight):
            weight.copy_(weight.to(dtype).to(weight.dtype))


def store(file: Path, dtype: torch.dtype) -> None:
    """Write the matrices of a checkpoint in this type and the rest in float32."""
    tensors = load_file(file)
    save_file(
        {name: tensor.to(dtype) if is_stored_small(name, tensor) else tensor for name, tensor in tensors.items()},
        file,
        metadata={"format": "pt"},
    )


def is_stored_small(name: str, tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a matrix of the backbone; norms and the score head are small and stay as they are."""
    return tensor.ndim == 2 and not name.startswith("score")


if __name__ == "__main__":
    main()
