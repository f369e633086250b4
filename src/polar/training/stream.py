"""The micro-batches of a run, from the first to the last step.

The stream is a pure function of the lengths, the seed and the number of machines: every epoch is shuffled anew. A
position in it is one number, so a run that was stopped goes on exactly where it was, in whichever epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from polar.core.errors import InputError

WINDOW_BATCHES = 50
"""Batches' worth of shuffled examples that are sorted by length together."""


@dataclass(frozen=True)
class BatchStream:
    """Micro-batches of one of several processes, as lists of example numbers; a batch sampler for PyTorch.

    A turn gives every process one micro-batch. Either all processes together take `batch_size * processes` examples of
    similar length in a turn, the same ones whatever the number of processes is as long as that product stays; or each
    process takes as many of the shuffled examples as `batch_tokens` hold, so that all have the same work. What is left
    at the end of an epoch and does not suffice for every process is left out in that epoch.
    """

    lengths: NDArray[np.int64]
    """Tokens of every example's row."""
    batch_size: int = 8
    """Examples per micro-batch and process."""
    batch_tokens: int | None = None
    """Tokens per micro-batch and process, in place of `batch_size`; a longer example has a micro-batch of its own."""
    turns: int = 0
    """Micro-batches of the whole run, for each process."""
    seed: int = 0
    process: int = 0
    processes: int = 1

    def __len__(self) -> int:
        return self.turns

    def __iter__(self) -> Iterator[list[int]]:
        epoch = done = 0
        while done < self.turns:
            for turn in self._epoch(epoch)[: self.turns - done]:
                yield turn[self.process].tolist()
                done += 1
            epoch += 1

    def for_epochs(self, epochs: float) -> BatchStream:
        """Return the same stream over a number of epochs, one turn at least.

        Raises:
            InputError: there are fewer examples than processes.
        """
        whole = int(epochs)
        turns = sum(len(self._epoch(number)) for number in range(whole))
        if epochs > whole or not whole:
            turns += round((epochs - whole) * len(self._epoch(whole)))
        return replace(self, turns=max(1, turns))

    def _epoch(self, number: int) -> list[list[NDArray[np.int64]]]:
        """Return the turns of an epoch, each with one micro-batch per process."""
        random = np.random.default_rng((self.seed, number))
        order = random.permutation(len(self.lengths))
        turns = self._sorted_turns(order) if self.batch_tokens is None else self._packed_turns(order, self.batch_tokens)
        shuffled = [turns[place] for place in random.permutation(len(turns))]
        if not shuffled:
            raise InputError(f"{len(order)} examples are too few for {self.processes} processes")
        tokens = [sum(int(self.lengths[part].sum()) for part in turn) for turn in shuffled]
        largest = tokens.index(max(tokens))
        # The largest turn comes first: if memory does not suffice, that shows at once.
        return [shuffled.pop(largest), *shuffled]

    def _sorted_turns(self, order: NDArray[np.int64]) -> list[list[NDArray[np.int64]]]:
        together = self.batch_size * self.processes
        turns = []
        for start in range(0, len(order), WINDOW_BATCHES * together):
            part = order[start : start + WINDOW_BATCHES * together]
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            turns += [part[first : first + together] for first in range(0, len(part), together)]
        # The last turn may be smaller.
        return [
            [turn[process :: self.processes] for process in range(self.processes)]
            for turn in turns
            if len(turn) >= self.processes
        ]

    def _packed_turns(self, order: NDArray[np.int64], budget: int) -> list[list[NDArray[np.int64]]]:
        rows = packed(order, self.lengths, budget)
        whole = len(rows) - len(rows) % self.processes
        return [rows[first : first + self.processes] for first in range(0, whole, self.processes)]


def held_out_batches(lengths: NDArray[np.int64], batch_size: int, batch_tokens: int | None = None) -> list[list[int]]:
    """Return batches of all examples once, the longest first."""
    order = np.argsort(-lengths, kind="stable")
    if batch_tokens is None:
        return [order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size)]
    return [row.tolist() for row in packed(order, lengths, batch_tokens)]


def packed(order: NDArray[np.int64], lengths: NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """Cut a sequence of examples into rows of at most `budget` tokens; a longer example has a row of its own."""
    ends = np.cumsum(lengths[order])
    starts: list[int] = []
    start = 0
    while start < len(order):
        starts.append(start)
        used = int(ends[start - 1]) if start else 0
        start = max(start + 1, int(np.searchsorted(ends, used + budget, side="right")))
    return np.split(order, starts[1:])
