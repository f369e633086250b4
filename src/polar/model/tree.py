"""Groups packed into one row, `[prefix][branch 1]...[branch K]` each, so that every prefix is computed once.

Positions of every branch restart at the end of its prefix and a branch attends to its prefix and to itself
(`polar.model.attention`), so the hidden states equal those of separate sequences. There is no padding.

That is so where attention is all that joins tokens. A model with anything else, such as a recurrent state, computes a
batch of separate sequences instead; which way a model goes is found out when it is built (`polar.model.backbone`).

Shape legend: T tokens of the row, N candidates of the row, S segments, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutput

from polar.core.errors import InputError
from polar.core.template import EncodedGroup
from polar.model.attention import (
    block_mask,
    has_flash_attention,
    has_flex_attention,
    segment_table,
    varlen_arguments,
)
from polar.model.cpu import few_lengths


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """Groups laid out as one row."""

    ids_1T: Tensor
    positions_1T: Tensor
    table_11S4: Tensor
    """Segments of the row (`polar.model.attention`); always on the CPU."""
    scores_N: Tensor
    """Indices of the score tokens, candidates in the order of the groups: found by length, never by a search."""
    onednn: bool = False
    """The products are oneDNN's (`polar.model.cpu`): no gradients, and every new shape costs time and memory."""

    def to(self, device: torch.device | str) -> TreeBatch:
        """The same batch on another device."""
        return replace(
            self,
            ids_1T=self.ids_1T.to(device),
            positions_1T=self.positions_1T.to(device),
            scores_N=self.scores_N.to(device),
        )


def row_length(group: EncodedGroup) -> int:
    """Return the tokens of the group in a row."""
    return len(group.prefix) + sum(map(len, group.branches))


def tree_batch(groups: Sequence[EncodedGroup], *, onednn: bool = False) -> TreeBatch:
    """Lay groups out one after the other; every group has at least one branch.

    Args:
        groups: The groups.
        onednn: For scoring by this kernel: the row has one of few lengths. No segment holds what it is padded with, so
            that sees nothing and nothing sees it.
    """
    ids: list[int] = []
    positions: list[int] = []
    segments: list[tuple[int, int, int, int]] = []
    scores: list[int] = []
    for group in groups:
        first, length = len(ids), len(group.prefix)
        ids += chain(group.prefix, *group.branches)
        positions += chain(range(length), *(range(length, length + len(branch)) for branch in group.branches))
        ends = list(accumulate(map(len, group.branches), initial=first + length))
        if len(group.branches) == 1:  # prefix and branch are an ordinary sequence
            ends[0] = first
        elif group.prefix:
            segments.append((first, first, first, ends[0]))
        segments += [(first, ends[0], start, end) for start, end in pairwise(ends)]
        scores += [end - 1 for end in ends[1:]]
    if onednn:
        padding = [0] * (few_lengths(len(ids)) - len(ids))
        ids, positions = ids + padding, positions + padding
    return TreeBatch(
        torch.tensor([ids]),
        torch.tensor([positions]),
        segment_table(segments),
        torch.tensor(scores, dtype=torch.long),
        onednn,
    )


def hidden_states(model: Any, batch: TreeBatch, **kwargs: Any) -> Any:
    """Return the backbone's output for a batch; `last_hidden_state` has shape (1, T, H).

    Args:
        model: It went through `polar.model.backbone.prepare`.
        batch: The groups.
        kwargs: For the backbone.

    Raises:
        InputError: An input is longer than the model can take here.
    """
    first, last, start, end = batch.table_11S4[0, 0].unbind(1)
    require_fit(model, int((last - first + end - start).max()))
    if not model.takes_rows:
        return separate_states(model, batch, **kwargs)
    return row_states(model, batch, **_attention(model, batch), **kwargs)


def row_states(model: Any, batch: TreeBatch, **kwargs: Any) -> Any:
    """Return the backbone's output for a batch as one row, with the attention that is given in `kwargs`."""
    backbone = getattr(model, model.base_model_prefix)
    return backbone(input_ids=batch.ids_1T, position_ids=batch.positions_1T, use_cache=False, **kwargs)


def separate_states(model: Any, batch: TreeBatch, **kwargs: Any) -> Any:
    """Return the same output from one ordinary sequence for every branch, in one batch, laid out like the row.

    The sequences are padded at the end, which no causal model sees.
    """
    table = batch.table_11S4[0, 0].tolist()
    prefixes = {(first, last) for first, last, *_ in table}
    seen = [
        [*range(first, last), *range(start, end)] for first, last, start, end in table if (start, end) not in prefixes
    ]
    length = max(map(len, seen))
    tokens_NL = torch.tensor([places + places[-1:] * (length - len(places)) for places in seen])
    places_T = torch.zeros(batch.ids_1T.shape[1], dtype=torch.long)
    for number, places in enumerate(seen):  # a prefix is in all of its sequences, which give it the same states
        places_T[places] = torch.arange(number * length, number * length + len(places))
    backbone, device = getattr(model, model.base_model_prefix), batch.ids_1T.device
    output = backbone(input_ids=batch.ids_1T[0, tokens_NL.to(device)], use_cache=False, **kwargs)

    def as_row(states_NLH: Tensor) -> Tensor:
        return states_NLH.flatten(0, 1)[places_T.to(device)][None]

    layers = getattr(output, "hidden_states", None)
    return BaseModelOutput(
        last_hidden_state=as_row(output.last_hidden_state),
        hidden_states=None if layers is None else tuple(map(as_row, layers)),
    )


def require_fit(model: Any, longest: int) -> None:
    """Check that a model can take an input of so many tokens.

    Raises:
        InputError: its attention slides over fewer, or its positions change from fewer on.
    """
    config = model.config
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    slides = model.takes_rows and set(getattr(config, "layer_types", None) or ["every layer"]) != {"full_attention"}
    if window is not None and slides and longest > window:
        raise InputError(
            f"an input has {longest} tokens, but the model's attention slides over {window}; "
            f"lower max_length to {window}"
        )
    original = _length_that_changes_positions(config)
    if original is not None and longest > original:
        raise InputError(
            f"an input has {longest} tokens, but from {original} on the model's rotary positions (longrope) depend on "
            f"the longest input of a batch; lower max_length to {original}"
        )


def _length_that_changes_positions(config: Any) -> int | None:
    """Return the longest input with the same rotary positions as shorter ones; None if there is no such limit."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [
        parameters,
        *(kind for kind in parameters.values() if isinstance(kind, dict)),
    ]  # one, or one per layer type
    limits = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(limits, default=None)


def _attention(model: Any, batch: TreeBatch) -> dict[str, Any]:
    """Return the segments as arguments of this device's attention; no mask for a single, plainly causal sequence."""
    device = batch.ids_1T.device
    if batch.onednn:
        read = set(batch.scores_N.tolist()) if has_narrow_last_layer(model) else None
        return {"attention_mask": batch.table_11S4, "onednn": True, "read": read}
    if len(batch.table_11S4[0, 0]) == 1:
        return {"attention_mask": None}
    if has_flash_attention(device, model.dtype):
        return {"attention_mask": batch.table_11S4, **varlen_arguments(batch.table_11S4, device)}
    drops = model.training and getattr(model.config, "attention_dropout", 0.0) > 0  # FlexAttention has no dropout
    if has_flex_attention(device) and not drops:
        return {"attention_mask": block_mask(batch.table_11S4, device)}
    return {"attention_mask": batch.table_11S4}


def rewards(model: Any, batch: TreeBatch, last_hidden_1TH: Tensor | None = None) -> Tensor:
    """Return the rewards of all candidates, shape (N,), float32; the score head is applied in float32.

    Args:
        model: A `*ForSequenceClassification` model with one label that went through `polar.model.backbone.prepare`.
        batch: The groups.
        last_hidden_1TH: The backbone's output, when the caller has it already.
    """
    if last_hidden_1TH is None:
        with only_where_read(model, batch):
            last_hidden_1TH = hidden_states(model, batch).last_hidden_state
    hidden_NH = last_hidden_1TH[0, batch.scores_N]
    head = model.score
    with torch.autocast(hidden_NH.device.type, enabled=False):
        rewards_N: Tensor = hidden_NH.float() @ head.weight[0].float()
        return rewards_N if head.bias is None else rewards_N + head.bias.float()


NARROW_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers have the parts that are named below."""

_READ: ContextVar[tuple[Tensor, int, int] | None] = ContextVar("read", default=None)
"""Indices of the score tokens of this thread's row, how many of them count, and the length of the row."""


def has_narrow_last_layer(model: Any) -> bool:
    """Return whether the model's last layer can be computed at some tokens alone."""
    return model.config.model_type in NARROW_ARCHITECTURES


def add_hooks(model: Any) -> None:
    """Make `only_where_read` work for a model: once, before any thread uses it.

    Keys and values of the last layer are needed of all tokens, but nothing reads its output anywhere else than at the
    score tokens. So its queries, output projection and feed-forward part are computed for these alone: hooks on the
    parts take the rows out before and put the results back among zeros. In a model of 10 layers this saves almost a
    tenth.
    """
    if not has_narrow_last_layer(model):
        return
    layer = getattr(model, model.base_model_prefix).layers[-1]
    for part in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp):
        part.register_forward_pre_hook(_take)
        part.register_forward_hook(_put_back)


@contextmanager
def only_where_read(model: Any, batch: TreeBatch) -> Iterator[None]:
    """Compute the last layer without gradients only at the batch's score tokens; the other states are then wrong.

    Other threads that use the model at the same time are not affected.
    """
    if not (model.takes_rows and torch.is_inference_mode_enabled() and has_narrow_last_layer(model)):
        yield
        return
    count = len(batch.scores_N)
    computed = pad(batch.scores_N, (0, few_lengths(count) - count)) if batch.onednn else batch.scores_N
    token = _READ.set((computed, count, batch.ids_1T.shape[1]))
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
