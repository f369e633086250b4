"""Attention over rows of trees by plain matrix products, for scoring on CPUs (`polar.model.products` says where).

torch's fused kernel is made of MKL calls on a CPU, which leave the AVX-512 units of other makers' CPUs idle. Here the
queries of a row are cut into blocks; a block and the keys that it sees are one oneDNN product, a softmax and another
product, small enough to stay in the cache. Heads that share keys make one product. Where the tokens of all blocks stand
is worked out once per row (`row_blocks`); every layer then gathers them in one go.

Blocks have few shapes, because oneDNN takes a millisecond and some memory for every new one.

Shape legend: T tokens of the row, H heads, G heads of keys and values, D dimensions of a head, Q queries and K keys of
a block, N rows of all blocks of queries, M rows of all keys.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polar.model.products import product

QUERIES = 128
"""Of a block."""
STEP = 32
"""Queries and keys are padded to a multiple of it."""


@dataclass(frozen=True, slots=True)
class Block:
    """Queries that stand side by side, and the keys that the last of them sees."""

    first_query: int
    """Of the first head, among the gathered rows; the other heads follow."""
    queries: int
    first_key: int
    """Of the first head of keys."""
    key_stride: int
    """From one head of keys to the next."""
    keys: int
    diagonal: int
    """The key at which the first query stands itself; what comes after it is hidden step by step."""


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """A row, cut into blocks."""

    blocks: list[Block]
    queries_N: Tensor
    """Which row of the queries, laid out (T, H), is gathered to each place."""
    keys_M: Tensor
    """The same for keys and values, laid out (T, G)."""
    places_TH: Tensor
    """Where the result of each token and head stands among the gathered queries. Padding of the row has any."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A row for all layers of a model: cut once for every number of heads that its layers have."""

    table_11S4: Tensor
    tokens: int
    last_only_at: Collection[int] | None = None
    """Ends of segments, if the result of the last layer is needed at these tokens alone."""
    _cut: dict[tuple[int, int, bool], RowBlocks] = field(default_factory=dict)

    def of(self, heads: int, key_heads: int, *, last: bool) -> RowBlocks:
        """The row for a layer of so many heads."""
        last = last and self.last_only_at is not None
        shape = heads, key_heads, last
        if shape not in self._cut:
            only_at = self.last_only_at if last else None
            self._cut[shape] = row_blocks(self.table_11S4, self.tokens, heads, key_heads, only_at)
        return self._cut[shape]


def row_blocks(
    table_11S4: Tensor, tokens: int, heads: int, key_heads: int, only_at: Collection[int] | None = None
) -> RowBlocks:
    """Cut a row by its table of segments (`polar.model.attention`).

    Args:
        table_11S4: The segments; tokens behind the last one are padding.
        tokens: Length of the row.
        heads: Heads of the queries.
        key_heads: Heads of the keys.
        only_at: Ends of segments, if the result is needed at these tokens alone.
    """
    blocks: list[Block] = []
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    query_rows, key_rows = 0, 0
    head_H, key_head_G = torch.arange(heads), torch.arange(key_heads)
    places_TH = torch.zeros(tokens, heads, dtype=torch.long)
    for first, last, start, end in table_11S4[0, 0].tolist():
        if only_at is not None and end - 1 not in only_at:
            continue
        stride = _padded(last - first + end - start)
        seen_K = torch.cat([torch.arange(first, last), torch.arange(start, start + stride - (last - first))])
        keys.append((seen_K.clamp_(max=end - 1) * key_heads + key_head_G[:, None]).flatten())
        for begin in range(start, end, QUERIES) if only_at is None else (end - 1,):
            stop = min(begin + QUERIES, end)
            diagonal, width = last - first + begin - start, _padded(stop - begin)
            blocks.append(Block(query_rows, width, key_rows, stride, _padded(diagonal + stop - begin), diagonal))
            asked_Q = torch.arange(begin, begin + width)
            places_TH[begin:stop] = query_rows + asked_Q[: stop - begin, None] - begin + head_H * width
            queries.append((asked_Q.clamp_(max=stop - 1) * heads + head_H[:, None]).flatten())
            query_rows += heads * width
        key_rows += key_heads * stride
    return RowBlocks(blocks, torch.cat(queries), torch.cat(keys), places_TH)


def block_attention(
    query_1HTD: Tensor, key_1GTD: Tensor, value_1GTD: Tensor, row: RowBlocks, scale: float | None
) -> Tensor:
    """What `scaled_dot_product_attention` gives for every segment, shape (1, T, H, D of the values). No gradient.

    Scores and their softmax are float32 also where the model is bfloat16.
    """
    _, heads, tokens, width = query_1HTD.shape
    key_heads = key_1GTD.shape[1]
    together = heads // key_heads
    query_ND = _rows(query_1HTD).index_select(0, row.queries_N).float().mul_(scale or width**-0.5)
    key_MD, value_MD = (
        _rows(key_1GTD).index_select(0, row.keys_M).float(),
        _rows(value_1GTD).index_select(0, row.keys_M),
    )
    future_QK = torch.full((QUERIES, QUERIES + STEP), float("-inf")).triu_(1)
    outputs = []
    for block in row.blocks:
        own_QK = future_QK[: block.queries, : block.keys - block.diagonal]
        for key_head in range(key_heads):
            first_query = block.first_query + key_head * together * block.queries
            first_key = block.first_key + key_head * block.key_stride
            keys = slice(first_key, first_key + block.keys)
            scores = product(query_ND[first_query : first_query + together * block.queries], key_MD[keys])
            scores.view(together, block.queries, block.keys)[:, :, block.diagonal :].add_(own_QK)
            outputs.append(product(scores.softmax(-1).to(value_MD.dtype), value_MD[keys].T))
    return torch.cat(outputs).index_select(0, row.places_TH.flatten()).view(1, tokens, heads, -1)


def _padded(length: int) -> int:
    return -(-length // STEP) * STEP


def _rows(part_1HTD: Tensor) -> Tensor:
    """Token by token, head by head, which is how the layers lay them out."""
    return part_1HTD.transpose(1, 2).reshape(-1, part_1HTD.shape[-1])
