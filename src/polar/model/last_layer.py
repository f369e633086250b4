"""The last layer, computed only where a reward is read.

Keys and values of the last layer are needed of all tokens, but nothing reads its output anywhere else than at the score
tokens. So queries, the output projection and the feed-forward part are computed for these alone: hooks on the parts
take the rows out before and put the results back among zeros. In a model of 10 layers this saves almost a tenth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from polar.model.products import few_lengths

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers have the parts that are named below."""

_READ: ContextVar[tuple[Tensor, int, int] | None] = ContextVar("read", default=None)
"""Where the rewards of this thread's row are read, how many of these places count, and the length of the row."""


def has_narrow_last_layer(model: PreTrainedModel) -> bool:
    """Whether the model's last layer can be computed at some tokens alone."""
    return model.config.model_type in ARCHITECTURES


def add_hooks(model: PreTrainedModel) -> None:
    """Make the context below work for a model: once, before any thread uses it. Outside the context they do nothing."""
    if not has_narrow_last_layer(model):
        return
    layer = getattr(model, model.base_model_prefix).layers[-1]
    for part in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp):
        part.register_forward_pre_hook(_take)
        part.register_forward_hook(_put_back)


@contextmanager
def last_layer_only_at(
    model: PreTrainedModel, scores_N: Tensor, tokens: int, *, few_shapes: bool = False
) -> Iterator[None]:
    """A context in which the last hidden states of a row of `tokens` are right at `scores_N` and nowhere else.

    Other threads that use the model at the same time are not affected.

    Args:
        model: The model.
        scores_N: Where its rewards are read.
        tokens: Length of the row.
        few_shapes: Compute one of few numbers of places (`polar.model.products`); further ones are thrown away.
    """
    if not has_narrow_last_layer(model):
        yield
        return
    count = len(scores_N)
    computed = pad(scores_N, (0, few_lengths(count) - count)) if few_shapes else scores_N
    token = _READ.set((computed, count, tokens))
    try:
        yield
    finally:
        _READ.reset(token)


def _take(part: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    read = _READ.get()
    if read is None:
        return None
    values_1TX, *others = arguments
    return values_1TX[:, read[0]], *others


def _put_back(part: torch.nn.Module, arguments: tuple[Any, ...], output_1NX: Tensor) -> Tensor | None:
    read = _READ.get()
    if read is None:
        return None
    computed, count, tokens = read
    output_1TX = output_1NX.new_zeros(1, tokens, output_1NX.shape[-1])
    output_1TX[:, computed[:count]] = output_1NX[:, :count]
    return output_1TX
