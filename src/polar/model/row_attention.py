"""Attention over rows of trees with gradients on CPUs: batched products forwards and backwards.

torch's fused kernel for CPUs spends five times as long on its backward as on its forward, more than a step of training
spends on all of its linear layers. Here both directions are batched matrix products, which the CPU's matrix units take
(AMX, AVX512-BF16), and the attention weights are kept from one to the other. Keys and values of a prefix get the
gradients of all of its branches in one place.

Shape legend: T tokens of the row, H heads, G heads of keys and values, R = H / G, D dimensions of a head, Q queries and
K keys of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

QUERIES = 256
"""Of a piece, at most. Smaller pieces skip more of the keys that lie in the future."""
MAX_WEIGHTS = 2**26
"""Attention weights of a row and layer that are kept for the backward pass: at most 256 MiB in float32."""

Piece = tuple[int, int, int, int, int]
"""Queries [begin, stop) of a segment, its prefix [first, last), and where the segment starts."""


def fits(table: list[list[int]], heads: int) -> bool:
    """Return whether the attention weights of a row are few enough to be kept."""
    sizes = ((stop - begin) * (last - first + stop - start) for begin, stop, first, last, start in pieces(table))
    return heads * sum(sizes) <= MAX_WEIGHTS


def pieces(table: list[list[int]]) -> Iterator[Piece]:
    """Cut the segments of a row (`polar.model.attention`) into pieces of few queries."""
    for first, last, start, end in table:
        for begin in range(start, end, QUERIES):
            yield begin, min(begin + QUERIES, end), first, last, start


class RowAttention(torch.autograd.Function):
    """What `scaled_dot_product_attention` gives for every segment of a row, shape (1, T, H, D of the values)."""

    @staticmethod
    def forward(
        ctx: Any, query_1HTD: Tensor, key_1GTD: Tensor, value_1GTD: Tensor, table: list[list[int]], scale: float
    ) -> Tensor:
        """Compute the output, and keep the attention weights."""
        heads, tokens = query_1HTD.shape[1:3]
        key_heads, width = key_1GTD.shape[1], value_1GTD.shape[-1]  # values may be narrower than keys
        output_THD = query_1HTD.new_empty(tokens, heads, width)
        future_QQ = query_1HTD.new_full((QUERIES, QUERIES), float("-inf")).triu_(1)
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
