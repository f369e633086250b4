"""Attention over rows of trees, as an attention implementation of transformers, so that no model code is copied.

A row holds segments, and a segment is described by one line of a small table: `[prefix start, prefix end, start, end]`.
Its tokens see the tokens of the prefix and, causally, each other; nothing else. An empty prefix makes it an ordinary
sequence. The table takes the place of the attention mask, which transformers hands through to every layer as it is.
Without a table (anybody calls the model as usual) attention is `sdpa`.

- CPU, with gradients: batched products in both directions (`RowAttention`).
- CPU, for scoring: products by oneDNN, where these are faster (`polar.model.cpu`).
- CPU otherwise, and where FlexAttention is missing: scaled dot product attention segment by segment. No mask is larger
  than `QUERY_BLOCK` queries by the keys that one branch sees.
- GPU: FlexAttention with a block mask made from the same table; flash-attn where it is installed, for 16-bit types.

Shape legend: S segments, T tokens of the row, H heads, G heads of keys and values, R = H / G, D dimensions of a head, Q
queries and K keys of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from polar.model.cpu import onednn_attention

TREE_ATTENTION = "polar_tree"
"""The name to give as `attn_implementation`."""

QUERY_BLOCK = 256
"""Queries of a segment that share one call. Smaller blocks skip more of the keys that lie in the future."""
MAX_WEIGHTS = 2**26
"""Attention weights of a row and layer that are kept for the backward pass: at most 256 MiB in float32."""

Piece = tuple[int, int, int, int, int]
"""Queries [begin, stop) of a segment, its prefix [first, last), and where the segment starts."""


def segment_table(segments: list[tuple[int, int, int, int]]) -> Tensor:
    """Return the table as an attention mask, shape (1, 1, S, 4); it stays on the CPU."""
    return torch.tensor(segments)[None, None]


def block_mask(table_11S4: Tensor, device: torch.device) -> BlockMask:
    """Return the same attention as a block mask of FlexAttention."""
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
    """Return whether FlexAttention runs as a fused kernel there."""
    return device.type == "cuda" and find_spec("triton") is not None


def varlen_arguments(table_11S4: Tensor, device: torch.device) -> dict[str, Any]:
    """Return the same attention as arguments for flash-attn: every segment with a copy of the keys that it sees.

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
    """Return whether the flash-attn package is installed and computes in this type."""
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
    """Attention function that transformers calls in every layer; see `AttentionInterface`.

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
    onednn, read = kwargs.pop("onednn", False), kwargs.pop("read", None)
    more = {"dropout": dropout, "scaling": scaling, **kwargs}
    if isinstance(attention_mask, BlockMask):
        return _library("flex_attention")(module, query_1HTD, key_1HTD, value_1HTD, attention_mask, **more)
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return _library("sdpa")(module, query_1HTD, key_1HTD, value_1HTD, attention_mask, **more)
    table = attention_mask[0, 0].tolist()
    scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    if onednn:
        config: Any = getattr(module, "config", None)
        is_last = getattr(module, "layer_idx", None) == getattr(config, "num_hidden_layers", 0) - 1
        return onednn_attention(query_1HTD, key_1HTD, value_1HTD, table, scale, read if is_last else None), None
    return _attend_segments(query_1HTD, key_1HTD, value_1HTD, table, dropout, scale), None


# Every row has another table: compiled layers call this uncompiled, or each row would be compiled anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_segments(
    query_1HTD: Tensor, key_1HTD: Tensor, value_1HTD: Tensor, table: list[list[int]], dropout: float, scale: float
) -> Tensor:
    """Attention of every segment to its prefix and itself, heads after tokens."""
    if _has_gradients(query_1HTD) and not dropout and fits(table, query_1HTD.shape[1]):
        parts = [query_1HTD, key_1HTD, value_1HTD]
        if torch.is_autocast_enabled("cpu"):  # what autocast does to `scaled_dot_product_attention`
            parts = [part.to(torch.get_autocast_dtype("cpu")) for part in parts]
        output_1THD: Tensor = RowAttention.apply(*parts, table, scale)  # type: ignore[no-untyped-call]
        return output_1THD
    # Split and not sliced: the gradient of a slice is as long as the row, and there are as many as segments.
    lengths = [end - start for *_, start, end in table]
    padding = query_1HTD.shape[2] - sum(lengths)  # behind the last segment
    queries, keys, values = (
        torch.split(part, [*lengths, padding], dim=2) for part in (query_1HTD, key_1HTD, value_1HTD)
    )
    segment_at = {start: number for number, (*_, start, _) in enumerate(table)}
    outputs = []
    for (first, last, start, end), query, own_key, own_value in zip(table, queries, keys, values, strict=False):
        if first == last:
            outputs.append(_attend(query, own_key, own_value, None, dropout, scale))
            continue
        prefix = segment_at[first]
        key, value = (torch.cat([keys[prefix], own_key], dim=2), torch.cat([values[prefix], own_value], dim=2))
        for begin in range(0, end - start, QUERY_BLOCK):
            stop = min(begin + QUERY_BLOCK, end - start)
            block, seen = query[:, :, begin:stop], last - first + stop
            bias = causal_bias(block, seen)
            outputs.append(_attend(block, key[:, :, :seen], value[:, :, :seen], bias, dropout, scale))
    output_1HTD = torch.cat(outputs, dim=2)
    if padding:
        output_1HTD = pad(output_1HTD, (0, 0, 0, padding))
    return output_1HTD.transpose(1, 2)


def _has_gradients(query_1HTD: Tensor) -> bool:
    return query_1HTD.device.type == "cpu" and torch.is_grad_enabled() and query_1HTD.requires_grad


def causal_bias(query_1HQD: Tensor, keys: int) -> Tensor:
    """Return a bias that hides the future from queries that are the last ones of `keys` tokens, shape (Q, keys)."""
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


def fits(table: list[list[int]], heads: int) -> bool:
    """Return whether the attention weights of a row are few enough to be kept."""
    sizes = ((stop - begin) * (last - first + stop - start) for begin, stop, first, last, start in pieces(table))
    return heads * sum(sizes) <= MAX_WEIGHTS


def pieces(table: list[list[int]]) -> Iterator[Piece]:
    """Cut the segments of a row (`polar.model.attention`) into pieces of few queries."""
    for first, last, start, end in table:
        for begin in range(start, end, QUERY_BLOCK):
            yield begin, min(begin + QUERY_BLOCK, end), first, last, start


class RowAttention(torch.autograd.Function):
    """Attention of every segment of a row with gradients, shape (1, T, H, D of the values).

    torch's fused kernel for CPUs spends five times as long on its backward as on its forward, more than a step of
    training spends on all of its linear layers. Here both directions are batched matrix products, which the CPU's
    matrix units take (AMX, AVX512-BF16), and the attention weights are kept from one to the other. Keys and values of a
    prefix get the gradients of all of its branches in one place.
    """

    @staticmethod
    def forward(
        ctx: Any, query_1HTD: Tensor, key_1GTD: Tensor, value_1GTD: Tensor, table: list[list[int]], scale: float
    ) -> Tensor:
        """Compute the output, and keep the attention weights."""
        heads, tokens = query_1HTD.shape[1:3]
        key_heads, width = key_1GTD.shape[1], value_1GTD.shape[-1]  # values may be narrower than keys
        output_THD = query_1HTD.new_empty(tokens, heads, width)
        future_QQ = query_1HTD.new_full((QUERY_BLOCK, QUERY_BLOCK), float("-inf")).triu_(1)
        weights = []
        for begin, stop, first, last, start in pieces(table):
            queries = stop - begin
            key_GKD, value_GKD = _seen(key_1GTD, first, last, start, stop), _seen(value_1GTD, first, last, start, stop)
            query_GQD = _by_key_head(query_1HTD[0, :, begin:stop], key_heads)
            scores = torch.bmm(query_GQD * scale, key_GKD.transpose(1, 2))
            scores.view(key_heads, -1, queries, scores.shape[-1])[..., -queries:].add_(future_QQ[:queries, :queries])
            weights.append(scores.softmax(-1))
            result = torch.bmm(weights[-1], value_GKD).view(heads, queries, width)
            output_THD[begin:stop] = result.transpose(0, 1)
        ctx.save_for_backward(query_1HTD, key_1GTD, value_1GTD, output_THD, *weights)
        ctx.table, ctx.scale = table, scale
        return output_THD[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Give every query, key and value its gradient; those of keys and values are summed in float32."""
        query_1HTD, key_1GTD, value_1GTD, output_THD, *weights = ctx.saved_tensors
        key_heads, gradient_THD = key_1GTD.shape[1], gradients[0][0].to(query_1HTD.dtype)
        query_gradient = torch.empty_like(query_1HTD)
        key_gradient, value_gradient = (
            torch.zeros_like(part[0], dtype=torch.float32) for part in (key_1GTD, value_1GTD)
        )
        for (begin, stop, first, last, start), weights_GQK in zip(pieces(ctx.table), weights, strict=True):
            key_GKD, value_GKD = _seen(key_1GTD, first, last, start, stop), _seen(value_1GTD, first, last, start, stop)
            query_GQD = _by_key_head(query_1HTD[0, :, begin:stop], key_heads)
            gradient_GQD = _by_key_head(gradient_THD[begin:stop].transpose(0, 1), key_heads)
            output_GQD = _by_key_head(output_THD[begin:stop].transpose(0, 1), key_heads)
            own_GQ1 = (gradient_GQD * output_GQD).sum(-1, keepdim=True, dtype=torch.float32).to(gradient_GQD.dtype)
            scores_GQK = torch.bmm(gradient_GQD, value_GKD.transpose(1, 2)).sub_(own_GQ1).mul_(weights_GQK)
            result = torch.bmm(scores_GQK, key_GKD).mul_(ctx.scale)
            query_gradient[0, :, begin:stop] = result.view(-1, stop - begin, result.shape[-1])
            for gradient, part in (
                (key_gradient, torch.bmm(scores_GQK.transpose(1, 2), query_GQD * ctx.scale)),
                (value_gradient, torch.bmm(weights_GQK.transpose(1, 2), gradient_GQD)),
            ):
                gradient[:, first:last] += part[:, : last - first]
                gradient[:, start:stop] += part[:, last - first :]
        return (
            query_gradient,
            key_gradient[None].to(key_1GTD.dtype),
            value_gradient[None].to(value_1GTD.dtype),
            None,
            None,
        )


def _seen(part_1GTD: Tensor, first: int, last: int, start: int, stop: int) -> Tensor:
    """Keys or values that the queries of a piece see, shape (G, K, D)."""
    own_GQD = part_1GTD[0, :, start:stop]
    return own_GQD if first == last else torch.cat([part_1GTD[0, :, first:last], own_GQD], dim=1)


def _by_key_head(part_HQD: Tensor, key_heads: int) -> Tensor:
    """Heads that share keys side by side, shape (G, R * Q, D)."""
    return part_HQD.reshape(key_heads, -1, part_HQD.shape[-1])


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
