"""Which examples stand in which micro-batch, from the first to the last step of a run.

The stream is a pure function of the lengths, the seed and the number of machines: every epoch is shuffled anew, and
examples of similar length are put together, so that little is padded. A position in it is one number, so a run that was
stopped goes on exactly where it was, in whichever epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW = 50
"""Batches' worth of shuffled examples that are sorted by length together."""


@dataclass(frozen=True)
class BatchStream:
    """Micro-batches of one of several processes, as lists of example numbers; a batch sampler for PyTorch.

    All processes together take `batch_size * processes` examples at a time, the same ones whatever the number of
    processes is as long as that product stays. The last batch of an epoch may be smaller; of it, what cannot be dealt
    to every process is left out in that epoch.
    """

    lengths: NDArray[np.int64]
    """Tokens of every example's row."""
    batch_size: int
    """Examples per micro-batch and process."""
    batches: int
    """Micro-batches of the whole run, for each process."""
    seed: int = 0
    process: int = 0
    processes: int = 1

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        epoch = done = 0
        while done < self.batches:
            for batch in self._epoch(epoch)[: self.batches - done]:
                yield batch[self.process :: self.processes].tolist()
                done += 1
            epoch += 1

    def _epoch(self, number: int) -> list[NDArray[np.int64]]:
        random = np.random.default_rng((self.seed, number))
        order = random.permutation(len(self.lengths))
        together = self.batch_size * self.processes
        window = WINDOW * together
        batches = []
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            batches += [part[first : first + together] for first in range(0, len(part), together)]
        batches = [batch for batch in batches if len(batch) >= self.processes]
        turns = random.permutation(len(batches))
        shuffled = [batches[turn] for turn in turns]
        longest = max(range(len(shuffled)), key=lambda turn: int(self.lengths[shuffled[turn]].max()))
        # The longest batch comes first: if memory does not suffice, that shows at once.
        return [shuffled.pop(longest), *shuffled]


def batches_per_epoch(examples: int, batch_size: int, processes: int = 1) -> int:
    """Micro-batches of one epoch for each process."""
    together = batch_size * processes
    whole, rest = divmod(examples, together)
    return whole + (rest >= processes)
