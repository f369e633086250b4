"""Groups packed into one row, `[prefix][branch 1]...[branch K]` each, so that every prefix is computed once.

Positions of every branch restart at the end of its prefix and a branch attends to its prefix and to itself
(`polar.model.attention`), so the hidden states equal those of separate sequences. There is no padding.

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
from transformers import PreTrainedModel

from polar.errors import InputError
from polar.model.attention import (
    TREE_ATTENTION,
    block_mask,
    has_flash_attention,
    has_flex_attention,
    segment_table,
    varlen_arguments,
)
from polar.model.blocks import row_blocks
from polar.model.last_layer import last_layer_only_at
from polar.model.products import few_lengths
from polar.template import EncodedGroup


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


def hidden_states(model: PreTrainedModel, batch: TreeBatch, **kwargs: Any) -> Any:
    """The backbone's output for a batch; `last_hidden_state` has shape (1, T, H).

    Raises:
        InputError: The model's attention has a sliding window that is shorter than an input.
    """
    first, last, start, end = batch.table_11S4[0, 0].unbind(1)
    longest, window = int((last - first + end - start).max()), getattr(model.config, "sliding_window", None)
    if window is not None and longest > window:
        raise InputError(
            f"an input has {longest} tokens, but the model's attention slides over {window}; "
            f"lower max_length of its template to {window}"
        )
    backbone = getattr(model, model.base_model_prefix)
    return backbone(
        input_ids=batch.ids_1T, position_ids=batch.positions_1T, use_cache=False, **_attention(model, batch), **kwargs
    )


def _attention(model: PreTrainedModel, batch: TreeBatch) -> dict[str, Any]:
    """Who sees whom, in the form that this device takes; no mask for a single sequence, which is plainly causal."""
    if model.config._attn_implementation != TREE_ATTENTION:
        model.set_attn_implementation(TREE_ATTENTION)
    device = batch.ids_1T.device
    if batch.in_blocks:
        heads = model.config.num_attention_heads
        shape = batch.ids_1T.shape[1], heads, getattr(model.config, "num_key_value_heads", heads)
        last_layer = row_blocks(batch.table_11S4, *shape, only_at=set(batch.scores_N.tolist()))
        blocks = (row_blocks(batch.table_11S4, *shape), last_layer)
        return {"attention_mask": batch.table_11S4, "blocks": blocks}
    if len(batch.table_11S4[0, 0]) == 1:
        return {"attention_mask": None}
    if has_flash_attention(device, model.dtype):
        return {"attention_mask": batch.table_11S4, **varlen_arguments(batch.table_11S4, device)}
    drops = model.training and getattr(model.config, "attention_dropout", 0.0) > 0  # FlexAttention has no dropout
    if has_flex_attention(device) and not drops:
        return {"attention_mask": block_mask(batch.table_11S4, device)}
    return {"attention_mask": batch.table_11S4}


def _last_layer(model: PreTrainedModel, batch: TreeBatch) -> AbstractContextManager[None]:
    """Without gradients the last layer is only computed where it is read."""
    if not torch.is_inference_mode_enabled():
        return nullcontext()
    return last_layer_only_at(model, batch.scores_N, batch.ids_1T.shape[1], few_shapes=batch.in_blocks)


def rewards(model: PreTrainedModel, batch: TreeBatch, last_hidden_1TH: Tensor | None = None) -> Tensor:
    """Rewards of all candidates, shape (N,), float32; the score head is applied in float32.

    Args:
        model: A `*ForSequenceClassification` model with one label.
        batch: The groups.
        last_hidden_1TH: The backbone's output, when the caller has it already.
    """
    if last_hidden_1TH is None:
        with _last_layer(model, batch):
            last_hidden_1TH = hidden_states(model, batch).last_hidden_state
    hidden_NH = last_hidden_1TH[0, batch.scores_N]
    head: Any = model.score
    with torch.autocast(hidden_NH.device.type, enabled=False):
        rewards_N: Tensor = hidden_NH.float() @ head.weight[0].float()
        return rewards_N if head.bias is None else rewards_N + head.bias.float()
