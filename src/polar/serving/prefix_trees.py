"""Which token sequences share a beginning, so that it is computed once.

Requests of many clients arrive one text at a time, as they would at any other server; that eight of them belong to one
prompt and one reference is nowhere said. Sorted sequences stand beside those they share most with, so the longest
common prefixes of neighbours tell the trees (`polar.model.tree`).
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

SHORTEST = 8
"""Tokens. Sharing less, such as a BOS token, is not worth an attention call of its own."""
LARGEST = 256
"""Most sequences of one tree, so that the search for trees stays linear; computing a prefix once more costs little."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Sequences that begin with the same `prefix` tokens."""

    prefix: int
    members: list[int]
    """Numbers of the sequences."""


def shared_trees(sequences: Sequence[Sequence[int]]) -> list[Tree]:
    """Put sequences together so that few tokens are left to compute: one shared prefix and the rest of each member.

    Members of a tree stand side by side in sorted order, and among such choices the best one is found. Every member
    keeps at least its last token for itself, since the reward is read there. Identical sequences may therefore share
    all but that.

    Args:
        sequences: Token ids, none empty.

    Returns:
        Trees that hold every sequence once.
    """
    keys = [_key(ids) for ids in sequences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    common = [0, *(_common(keys[left], keys[right]) for left, right in pairwise(order))]
    # saved[j]: most tokens saved by the first j sequences in order; start[j]: where the last tree of that choice begins
    saved, start = [0] * (len(order) + 1), list(range(-1, len(order)))
    for stop in range(1, len(order) + 1):
        saved[stop] = saved[stop - 1]
        prefix = common[stop - 1]
        for begin in range(stop - 2, max(-1, stop - 1 - LARGEST), -1):
            prefix = min(prefix, common[begin + 1])
            if prefix < SHORTEST:
                break
            if saved[begin] + (stop - begin - 1) * prefix > saved[stop]:
                saved[stop], start[stop] = saved[begin] + (stop - begin - 1) * prefix, begin
    trees, stop = [], len(order)
    while stop:
        begin = start[stop]
        trees.append(Tree(min(common[begin + 1 : stop], default=0), order[begin:stop]))
        stop = begin
    return trees[::-1]


class Row:
    """A row that is being filled, and what each further sequence would add to it."""

    def __init__(self) -> None:
        self._keys: list[bytes] = []

    def add(self, ids: Sequence[int]) -> int:
        """Put a sequence in; returns how many of its tokens some other one already begins with."""
        key = _key(ids)
        place = bisect(self._keys, key)
        # In sorted order the longest common prefix is with a neighbour.
        shared = max((_common(key, other) for other in self._keys[max(0, place - 1) : place + 1]), default=0)
        self._keys.insert(place, key)
        return shared if shared >= SHORTEST else 0


def _key(ids: Sequence[int]) -> bytes:
    """Bytes that sort as the ids do, at the speed of memcmp."""
    return np.asarray(ids, dtype=">u4").tobytes()


def _common(left: bytes, right: bytes) -> int:
    """Length of the longest common prefix in tokens, without the last token of either."""
    length = min(len(left), len(right)) // 4 - 1
    if left[: 4 * length] == right[: 4 * length]:
        return length
    differs = np.frombuffer(left, np.uint32, length) != np.frombuffer(right, np.uint32, length)
    return int(differs.argmax())
