"""Continuous batching by token budget over the model of this process.

One thread computes, the event loop collects: while a batch runs requests queue up, and what came first is in the next
one. Nothing waits when the thread is idle. Requests that are larger than a batch are spread over several, and requests
that share a prefix and meet in a batch share its computation.

Requests of many clients arrive one text at a time, as at any other server, and do not say that eight of them belong to
one prompt and one reference. In sorted order sequences are neighbours of those they share most with, so the longest
common prefixes of neighbours give the trees (`polar.model.tree`).
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from polar.core.template import EncodedGroup
from polar.model.reward_model import RewardModel
from polar.serving.checkpoint import Checkpoint
from polar.serving.errors import NoRewardError
from polar.serving.metrics import Metrics

log = logging.getLogger(__name__)

SHORTEST = 8
"""Tokens. Sharing less, such as a BOS token, is not worth an attention call of its own."""
LARGEST = 256
"""Most sequences of one tree, so that the search for trees stays linear; computing a prefix once more costs little."""


@dataclass(eq=False, slots=True)
class _Job:
    """The sequences of one request. They are all scored by the checkpoint that encoded them."""

    model: RewardModel
    done: asyncio.Future[list[float]]
    rewards: list[float]
    left: int


@dataclass(frozen=True, slots=True)
class _Unit:
    """Part of a request that is computed in one go: a shared prefix and branches, as many as fit into a batch."""

    job: _Job
    prefix: list[int]
    branches: list[list[int]]
    numbers: list[int]
    """Indices of the branches among the request's sequences."""

    def sequences(self) -> list[list[int]]:
        return [self.prefix + branch for branch in self.branches]


@dataclass(slots=True)
class Batcher:
    """The queue in front of the model.

    Args:
        batch_tokens: Tokens of one batch; a single sequence may be longer.
        metrics: Counts batches and tokens.
    """

    batch_tokens: int
    metrics: Metrics
    _queue: deque[_Unit] = field(default_factory=deque)
    _worker: asyncio.Task[None] | None = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "polar-model"))

    async def score(self, checkpoint: Checkpoint, groups: Sequence[EncodedGroup]) -> list[list[float]]:
        """Rewards of every branch of every group, in their order.

        When the caller is cancelled, what has not been computed yet leaves the queue.

        Raises:
            NoRewardError: A sequence has no reward; it says which one, counted over all groups, and why.
        """
        assert checkpoint.model is not None
        total = sum(len(group.branches) for group in groups)
        job = _Job(checkpoint.model, asyncio.get_running_loop().create_future(), [0.0] * total, total)
        units = await asyncio.to_thread(lambda: list(_units(job, groups, self.batch_tokens)))
        if not units:
            return [[] for _ in groups]
        self._queue.extend(units)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        try:
            rewards = iter(await job.done)
        finally:
            if job.left:  # cancelled or failed
                self._queue = deque(unit for unit in self._queue if unit.job is not job)
        return [[next(rewards) for _ in group.branches] for group in groups]

    async def _work(self) -> None:
        """Compute until the queue is empty."""
        loop = asyncio.get_running_loop()
        try:
            while units := self._take():
                results = await loop.run_in_executor(self._thread, self._compute, units)
                for unit, result in zip(units, results, strict=True):
                    _deliver(unit, result)
        finally:
            self._worker = None

    def _take(self) -> list[_Unit]:
        """The next batch: in order of arrival, of one checkpoint, as much as fits."""
        taken: list[_Unit] = []
        row, tokens = Row(), 0
        while self._queue:
            unit = self._queue[0]
            if taken and unit.job.model is not taken[0].job.model:
                break
            shared = row.add(unit.prefix + unit.branches[0])
            if len(unit.branches) > 1:
                shared = min(shared, len(unit.prefix))
            added = len(unit.prefix) + sum(map(len, unit.branches)) - shared
            if taken and tokens + added > self.batch_tokens:
                break
            taken.append(self._queue.popleft())
            tokens += added
        return taken

    def _compute(self, units: list[_Unit]) -> list[list[float] | Exception]:
        """Rewards of each unit, or why it has none. Runs in the thread."""
        sequences = [ids for unit in units for ids in unit.sequences()]
        values = iter(self._rewards(units[0].job.model, sequences))
        results: list[list[float] | Exception] = []
        for unit in units:
            own = [(number, next(values)) for number in unit.numbers]
            failures = [NoRewardError(number, value) for number, value in own if isinstance(value, Exception)]
            results.append(failures[0] if failures else [value for _, value in own if isinstance(value, float)])
        return results

    def _rewards(self, model: RewardModel, sequences: list[list[int]]) -> list[float | Exception]:
        """Return one result per sequence. A batch that fails is halved until the sequence at fault is alone."""
        try:
            trees = shared_trees(sequences)
            groups = [_group(sequences, tree.prefix, tree.members) for tree in trees]
            scored = model.score_encoded(groups, batch_tokens=self.batch_tokens)
        except Exception as error:  # a reward that is not finite, no memory, a fault of the model
            if len(sequences) == 1:
                log.error("an input of %d tokens has no reward: %s", len(sequences[0]), error)
                self.metrics.count_failure()
                return [error]
            half = len(sequences) // 2
            return self._rewards(model, sequences[:half]) + self._rewards(model, sequences[half:])
        self.metrics.count_batch(
            sequences=len(sequences),
            tokens=sum(map(len, sequences)),
            forwarded=sum(len(group.prefix) + sum(map(len, group.branches)) for group in groups),
        )
        rewards: list[float | Exception] = [0.0] * len(sequences)
        for tree, values in zip(trees, scored, strict=True):
            for member, value in zip(tree.members, values, strict=True):
                rewards[member] = value
        return rewards


def _units(job: _Job, groups: Sequence[EncodedGroup], batch_tokens: int) -> Iterator[_Unit]:
    """Cut a request into units. Groups without a prefix are searched for trees first."""
    first = 0
    for group in groups:
        if group.prefix or len(group.branches) == 1:
            trees = [(group, list(range(len(group.branches))))]
        else:
            trees = [
                (_group(group.branches, tree.prefix, tree.members), tree.members)
                for tree in shared_trees(group.branches)
            ]
        for tree, members in trees:
            begin, tokens = 0, len(tree.prefix)
            for place, branch in enumerate(tree.branches):
                if place > begin and tokens + len(branch) > batch_tokens:
                    numbers = [first + member for member in members[begin:place]]
                    yield _Unit(job, tree.prefix, tree.branches[begin:place], numbers)
                    begin, tokens = place, len(tree.prefix)
                tokens += len(branch)
            if tree.branches:
                yield _Unit(job, tree.prefix, tree.branches[begin:], [first + member for member in members[begin:]])
        first += len(group.branches)


def _group(sequences: Sequence[list[int]], prefix: int, members: Sequence[int]) -> EncodedGroup:
    branches = [sequences[member][prefix:] for member in members]
    return EncodedGroup(sequences[members[0]][:prefix], branches, truncations=[])


def _deliver(unit: _Unit, result: list[float] | Exception) -> None:
    job = unit.job
    if job.done.done():  # the client is gone, or another part failed
        return
    if isinstance(result, Exception):
        job.done.set_exception(result)
        return
    for number, reward in zip(unit.numbers, result, strict=True):
        job.rewards[number] = reward
    job.left -= len(result)
    if not job.left:
        job.done.set_result(job.rewards)


@dataclass(frozen=True, slots=True)
class Tree:
    """Sequences that begin with the same `prefix` tokens."""

    prefix: int
    members: list[int]
    """Numbers of the sequences."""


def shared_trees(sequences: Sequence[Sequence[int]]) -> list[Tree]:
    """Put sequences together so that few tokens are left to compute: one shared prefix and the rest of each member.

    Members of a tree are neighbours in sorted order, and among such choices the best one is found. Every member
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
