"""Groups packed into one row, `[prefix][branch 1]...[branch K]` each, so that every prefix is computed once.

Positions of every branch restart at the end of its prefix and a branch attends to its prefix and to itself
(`polar.model.attention`), so the hidden states equal those of separate sequences. There is no padding.

That is so where attention is all that joins tokens. A model with anything else, such as a recurrent state, computes a
batch of separate sequences instead; which way a model goes is found out when it is built (`polar.model.backbone`).

Shape legend: T tokens of the row, N candidates of the row, S segments, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor
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
from polar.model.blocks import Blocks
from polar.model.last_layer import has_narrow_last_layer, last_layer_only_at
from polar.model.products import few_lengths


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """Groups laid out as one row."""

    ids_1T: Tensor
    positions_1T: Tensor
    table_11S4: Tensor
    """Who sees whom (`polar.model.attention`); always on the CPU."""
    scores_N: Tensor
    """Where the score tokens stand, candidates in the order of the groups: found by length, never by a search."""
    in_blocks: bool = False
    """Attention is computed by blocks (`polar.model.blocks`), without a gradient and at the end only for `scores_N`."""

    def to(self, device: torch.device | str) -> TreeBatch:
        """The same batch on another device."""
        return replace(
            self,
            ids_1T=self.ids_1T.to(device),
            positions_1T=self.positions_1T.to(device),
            scores_N=self.scores_N.to(device),
        )


def row_length(group: EncodedGroup) -> int:
    """Tokens of the group in a row."""
    return len(group.prefix) + sum(map(len, group.branches))


def tree_batch(groups: Sequence[EncodedGroup], *, in_blocks: bool = False) -> TreeBatch:
    """Lay groups out one after the other; every group has at least one branch.

    Args:
        groups: The groups.
        in_blocks: For scoring on a CPU: attention by blocks, and a row of one of few lengths. No segment holds what the
            row is padded with, so it sees nothing and nothing sees it.
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
    if in_blocks:
        padding = [0] * (few_lengths(len(ids)) - len(ids))
        ids, positions = ids + padding, positions + padding
    return TreeBatch(
        torch.tensor([ids]),
        torch.tensor([positions]),
        segment_table(segments),
        torch.tensor(scores, dtype=torch.long),
        in_blocks,
    )


def hidden_states(model: Any, batch: TreeBatch, **kwargs: Any) -> Any:
    """The backbone's output for a batch; `last_hidden_state` has shape (1, T, H).

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
    """The backbone's output for a batch as one row, with the attention that is given in `kwargs`."""
    backbone = getattr(model, model.base_model_prefix)
    return backbone(input_ids=batch.ids_1T, position_ids=batch.positions_1T, use_cache=False, **kwargs)


def separate_states(model: Any, batch: TreeBatch, **kwargs: Any) -> Any:
    """The same output from one ordinary sequence for every branch, in one batch, laid out like the row.

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
    """Up to which length rotary positions are the same for all inputs; None if they always are."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [
        parameters,
        *(kind for kind in parameters.values() if isinstance(kind, dict)),
    ]  # one, or one per layer type
    limits = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(limits, default=None)


def _attention(model: Any, batch: TreeBatch) -> dict[str, Any]:
    """Who sees whom, in the form that this device takes; no mask for a single sequence, which is plainly causal."""
    device = batch.ids_1T.device
    if batch.in_blocks:
        read = set(batch.scores_N.tolist()) if has_narrow_last_layer(model) else None
        blocks = Blocks(batch.table_11S4, batch.ids_1T.shape[1], read)
        return {"attention_mask": batch.table_11S4, "blocks": blocks}
    if len(batch.table_11S4[0, 0]) == 1:
        return {"attention_mask": None}
    if has_flash_attention(device, model.dtype):
        return {"attention_mask": batch.table_11S4, **varlen_arguments(batch.table_11S4, device)}
    drops = model.training and getattr(model.config, "attention_dropout", 0.0) > 0  # FlexAttention has no dropout
    if has_flex_attention(device) and not drops:
        return {"attention_mask": block_mask(batch.table_11S4, device)}
    return {"attention_mask": batch.table_11S4}


def _last_layer(model: Any, batch: TreeBatch) -> AbstractContextManager[None]:
    """Without gradients the last layer is only computed where it is read."""
    if not (model.takes_rows and torch.is_inference_mode_enabled()):
        return nullcontext()
    return last_layer_only_at(model, batch.scores_N, batch.ids_1T.shape[1], few_shapes=batch.in_blocks)


def rewards(model: Any, batch: TreeBatch, last_hidden_1TH: Tensor | None = None) -> Tensor:
    """Rewards of all candidates, shape (N,), float32; the score head is applied in float32.

    Args:
        model: A `*ForSequenceClassification` model with one label that went through `polar.model.backbone.prepare`.
        batch: The groups.
        last_hidden_1TH: The backbone's output, when the caller has it already.
    """
    if last_hidden_1TH is None:
        with _last_layer(model, batch):
            last_hidden_1TH = hidden_states(model, batch).last_hidden_state
    hidden_NH = last_hidden_1TH[0, batch.scores_N]
    head = model.score
    with torch.autocast(hidden_NH.device.type, enabled=False):
        rewards_N: Tensor = hidden_NH.float() @ head.weight[0].float()
        return rewards_N if head.bias is None else rewards_N + head.bias.float()
