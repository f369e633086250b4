"""Attention over rows of trees, as an attention implementation of transformers, so that no model code is copied.

A row holds segments, and a segment is described by one line of a small table: `[prefix start, prefix end, start, end]`.
Its tokens see the tokens of the prefix and, causally, each other; nothing else. An empty prefix makes it an ordinary
sequence. The table takes the place of the attention mask, which transformers hands through to every layer as it is.
Without a table (anybody calls the model as usual) attention is `sdpa`.

- CPU, with gradients: batched products in both directions (`polar.model.row_attention`).
- CPU otherwise, and where FlexAttention is missing: scaled dot product attention segment by segment. No mask is larger
  than `QUERY_BLOCK` queries by the keys that one branch sees.
- GPU: FlexAttention with a block mask made from the same table; flash-attn where it is installed, for 16-bit types.

Shape legend: S segments, T tokens of the row, H heads, D dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from polar.core.errors import InputError
from polar.model.blocks import Blocks, block_attention
from polar.model.row_attention import RowAttention, fits

TREE_ATTENTION = "polar_tree"
"""The name to give as `attn_implementation`."""

QUERY_BLOCK = 256
"""Queries of a branch that share one call. Smaller blocks skip more of the keys that lie in the future."""


def segment_table(segments: list[tuple[int, int, int, int]]) -> Tensor:
    """The table as an attention mask, shape (1, 1, S, 4); it stays on the CPU."""
    return torch.tensor(segments)[None, None]


def block_mask(table_11S4: Tensor, device: torch.device) -> BlockMask:
    """The same attention as a block mask of FlexAttention."""
    table_S4 = table_11S4[0, 0]
    lengths_S = table_S4[:, 3] - table_S4[:, 2]
    first_T, last_T, start_T, _ = table_S4.repeat_interleave(lengths_S, dim=0).to(device).unbind(1)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (key >= start_T[query]) & (key <= query)
        return own | ((key >= first_T[query]) & (key < last_T[query]))

    tokens = start_T.shape[0]
    create = _compiled_block_mask() if device.type == "cuda" else create_block_mask
    return create(sees, None, None, tokens, tokens, device=str(device))


@cache
def _compiled_block_mask() -> Callable[..., BlockMask]:
    """Uncompiled, a mask of all tokens by all tokens would be made first."""
    compiled: Callable[..., BlockMask] = torch.compile(create_block_mask)
    return compiled


def has_flex_attention(device: torch.device) -> bool:
    """Whether FlexAttention runs as a fused kernel there."""
    return device.type == "cuda" and find_spec("triton") is not None


def varlen_arguments(table_11S4: Tensor, device: torch.device) -> dict[str, Any]:
    """The same attention as arguments for flash-attn: every segment with a copy of the keys that it sees.

    The first four have the names that transformers gives them.
    """
    table_S4 = table_11S4[0, 0]
    first_S, last_S, start_S, end_S = table_S4.unbind(1)
    queries_S, keys_S = end_S - start_S, last_S - first_S + end_S - start_S
    seen = [torch.arange(*bounds) for line in table_S4.tolist() for bounds in (line[:2], line[2:])]
    return {
        "cu_seq_lens_q": pad(queries_S.cumsum(0, dtype=torch.int32), (1, 0)).to(device),
        "cu_seq_lens_k": pad(keys_S.cumsum(0, dtype=torch.int32), (1, 0)).to(device),
        "max_length_q": int(queries_S.max()),
        "max_length_k": int(keys_S.max()),
        "seen_K": torch.cat(seen).to(device),  # the prefix of a segment, then itself
    }


def has_flash_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the flash-attn package is installed and computes in this type."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    halves = (torch.bfloat16, torch.float16)
    return device.type == "cuda" and dtype in halves and find_spec("flash_attn") is not None


def tree_attention(
    module: torch.nn.Module,
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls in every layer; see `AttentionInterface`.

    Args:
        module: The attention layer.
        query_1HTD: Queries of all tokens.
        key_1HTD: Keys; they may have fewer heads.
        value_1HTD: Values.
        attention_mask: A segment table, a block mask, or what `sdpa` takes.
        dropout: Dropout of the attention weights.
        scaling: Factor of the products.
        kwargs: What else transformers passes.

    Returns:
        The output, heads after tokens, and no weights.

    Raises:
        InputError: The model needs more than scaled products (soft caps, sinks, position biases).
    """
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise InputError(f"{type(module).__name__}: attention with {', '.join(unknown)} cannot be computed in rows")
    if "seen_K" in kwargs:
        return _flash_attention(query_1HTD, key_1HTD, value_1HTD, dropout, scaling, **kwargs), None
    blocks: Blocks | None = kwargs.pop("blocks", None)
    more = {"dropout": dropout, "scaling": scaling, **kwargs}
    if isinstance(attention_mask, BlockMask):
        return _library("flex_attention")(module, query_1HTD, key_1HTD, value_1HTD, attention_mask, **more)
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return _library("sdpa")(module, query_1HTD, key_1HTD, value_1HTD, attention_mask, **more)
    if blocks is not None:
        config: Any = getattr(module, "config", None)
        last = getattr(module, "layer_idx", None) == getattr(config, "num_hidden_layers", 0) - 1
        row = blocks.of(query_1HTD.shape[1], key_1HTD.shape[1], last=last)
        return block_attention(query_1HTD, key_1HTD, value_1HTD, row, scaling), None
    # Split and not sliced: the gradient of a slice is as long as the row, and there are as many as segments.
    table = attention_mask[0, 0].tolist()
    if _has_gradients(query_1HTD) and not dropout and fits(table, query_1HTD.shape[1]):
        parts = [query_1HTD, key_1HTD, value_1HTD]
        if torch.is_autocast_enabled("cpu"):  # what autocast does to `scaled_dot_product_attention`
            parts = [part.to(torch.get_autocast_dtype("cpu")) for part in parts]
        scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
        output_1THD: Tensor = RowAttention.apply(*parts, table, scale)  # type: ignore[no-untyped-call]
        return output_1THD, None
    lengths = [end - start for *_, start, end in table]
    padding = query_1HTD.shape[2] - sum(lengths)  # behind the last segment
    queries, keys, values = (
        torch.split(part, [*lengths, padding], dim=2) for part in (query_1HTD, key_1HTD, value_1HTD)
    )
    segment_at = {start: number for number, (*_, start, _) in enumerate(table)}
    outputs = []
    for (first, last, start, end), query, own_key, own_value in zip(table, queries, keys, values, strict=False):
        if first == last:
            outputs.append(_attend(query, own_key, own_value, None, dropout, scaling))
            continue
        prefix = segment_at[first]
        key, value = (torch.cat([keys[prefix], own_key], dim=2), torch.cat([values[prefix], own_value], dim=2))
        for begin in range(0, end - start, QUERY_BLOCK):
            stop = min(begin + QUERY_BLOCK, end - start)
            block, seen = query[:, :, begin:stop], last - first + stop
            bias = causal_bias(block, seen)
            outputs.append(_attend(block, key[:, :, :seen], value[:, :, :seen], bias, dropout, scaling))
    output_1HTD = torch.cat(outputs, dim=2)
    if padding:
        output_1HTD = pad(output_1HTD, (0, 0, 0, padding))
    return output_1HTD.transpose(1, 2), None


def _has_gradients(query_1HTD: Tensor) -> bool:
    return query_1HTD.device.type == "cpu" and torch.is_grad_enabled() and query_1HTD.requires_grad


def causal_bias(query_1HQD: Tensor, keys: int) -> Tensor:
    """Hides the future from queries that are the last ones of `keys` tokens, shape (Q, keys)."""
    queries = query_1HQD.shape[2]
    future = torch.full((queries, queries), float("-inf"), dtype=query_1HQD.dtype, device=query_1HQD.device)
    return pad(future.triu_(1), (keys - queries, 0))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """Causal attention, or attention with a bias of shape (queries, keys)."""
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias,
        dropout_p=dropout,
        is_causal=bias is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _flash_attention(
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    dropout: float,
    scaling: float | None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    seen_K: Tensor,
    **_: Any,
) -> Tensor:
    """Since version 2.1 causal means that the last query sees the last key, which is what a branch needs."""
    from flash_attn import flash_attn_varlen_func

    query_THD, key_THD, value_THD = (part[0].transpose(0, 1) for part in (query_1HTD, key_1HTD, value_1HTD))
    output_THD: Tensor = flash_attn_varlen_func(
        query_THD,
        key_THD[seen_K],
        value_THD[seen_K],
        cu_seqlens_q=cu_seq_lens_q,
        cu_seqlens_k=cu_seq_lens_k,
        max_seqlen_q=max_length_q,
        max_seqlen_k=max_length_k,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
    )
    return output_THD[None]


def _library(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """An attention function of transformers."""
    function: Callable[..., tuple[Tensor, Tensor | None]] = AttentionInterface()[name]
    return function


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
