"""The state of a server: the checkpoint in use, what is in flight, whether it is draining."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from polar.core.errors import EngineError, InputError, RewardError
from polar.core.template import EncodedGroup
from polar.serving.checkpoint import Checkpoint
from polar.serving.errors import NoRewardError, RefusalError
from polar.serving.metrics import Metrics

log = logging.getLogger(__name__)

Score = Callable[[Checkpoint, Sequence[EncodedGroup]], Awaitable[list[list[float]]]]
"""Rewards of every branch of every group; raises `NoRewardError` or `RefusalError`."""

LONGEST_WAIT = 120
"""Seconds; longest wait that a refusal names."""


@dataclass(slots=True)
class Service:
    """Server state shared by all routes.

    Args:
        name: The model's name in requests and answers; it stays when another checkpoint is loaded.
        checkpoint: The first checkpoint.
        load: Loads another one, blocking.
        score: The engine.
        metrics: Counters.
        max_queue: While so many inputs are in flight (waiting or being computed) further requests are refused. A
            request that is accepted is accepted whole, so one request may be larger than this.
    """

    name: str
    checkpoint: Checkpoint
    load: Callable[[str], Checkpoint]
    score: Score
    metrics: Metrics
    max_queue: int
    draining: bool = False
    in_flight: int = 0
    _requests: Counter[Checkpoint] = field(default_factory=Counter)
    _seconds_per_input: float = 0.0
    _reloading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.metrics.watch(lambda: self.in_flight, lambda: not self.draining)

    @property
    def idle(self) -> bool:
        """True if no request is in flight."""
        return not self._requests

    @asynccontextmanager
    async def admit(self, inputs: int) -> AsyncIterator[Checkpoint]:
        """Hold a place for a request while it is encoded and scored.

        Args:
            inputs: How many rewards it asks for.

        Raises:
            RefusalError: 429 when too much is in flight, 503 when the server is going away; both say when to come back.
        """
        if self.draining:
            raise RefusalError(503, "the server is shutting down; ask another one", headers={"Retry-After": "1"})
        if self.in_flight >= self.max_queue:
            seconds = self.wait()
            raise RefusalError(
                429,
                f"{self.in_flight} inputs are in flight and {self.max_queue} may be; try again in about {seconds} s",
                headers={"Retry-After": str(seconds)},
            )
        checkpoint = self.checkpoint
        self.in_flight += inputs
        self._requests[checkpoint] += 1
        ahead, start = self.in_flight, time.monotonic()
        try:
            yield checkpoint
            # First come, first served: whatever was in flight at the arrival has been computed in this time.
            measured = (time.monotonic() - start) / max(1, ahead)
            self._seconds_per_input += (measured - self._seconds_per_input) * (0.1 if self._seconds_per_input else 1)
        finally:
            self.in_flight -= inputs
            self._requests[checkpoint] -= 1
            await self._close_if_done(checkpoint)

    async def rewards(
        self, checkpoint: Checkpoint, groups: Sequence[EncodedGroup], place: Callable[[int], str]
    ) -> list[list[float]]:
        """Return the rewards of every branch of every group, for a request that was admitted.

        Args:
            checkpoint: As `admit` gave it.
            groups: What to score.
            place: The field of the request that holds the n-th branch, counted over all groups, for messages.

        Raises:
            RefusalError: An input has no reward, or a server behind this one failed.
        """
        try:
            rewards = await self.score(checkpoint, groups)
        except NoRewardError as failure:
            where = place(failure.number)
            raise RefusalError(422, f"{where}: {failure}", where) from failure  # asking again would not help
        truncated = sum(bool(truncation) for group in groups for truncation in group.truncations)
        self.metrics.count_rewards(sum(map(len, rewards)), truncated)
        return rewards

    def require_model(self, name: str | None) -> None:
        """Refuse a request for another model than the one that is served.

        Raises:
            RefusalError: 404.
        """
        if name not in (None, self.name, self.checkpoint.source):
            raise RefusalError(404, f"The model `{name}` does not exist; this server has `{self.name}`", "model")

    def wait(self) -> int:
        """Return the seconds until half of what is in flight will have been answered, by the speed so far."""
        return max(1, min(LONGEST_WAIT, math.ceil(self.in_flight * self._seconds_per_input / 2)))

    async def reload(self, source: str | None = None) -> Checkpoint:
        """Load a checkpoint beside the present one and use it for all requests that come from then on.

        Requests that are in flight end with the checkpoint that they began with. The servers behind a gateway are
        proven for the new one first.

        Args:
            source: Default: the place of the present one.

        Raises:
            RefusalError: The checkpoint is broken, or the servers behind this one do not give its rewards; the present
                one stays in use.
        """
        async with self._reloading:
            source = source or self.checkpoint.source
            try:
                checkpoint = await asyncio.to_thread(self.load, source)
                await self._prove(checkpoint)
            except Exception as error:
                self.metrics.count_reload(succeeded=False)
                log.error("%s: not loaded, the present checkpoint stays: %s", source, error)
                why = str(error) if isinstance(error, InputError) else f"{source}: {type(error).__name__}: {error}"
                raise RefusalError(422, f"{why} (the present checkpoint stays in use)", "model") from error
            before, self.checkpoint = self.checkpoint, checkpoint
            await self._close_if_done(before)
            self.metrics.count_reload(succeeded=True)
            log.info("%s: loaded; new requests use it", source)
            return checkpoint

    async def _prove(self, checkpoint: Checkpoint) -> None:
        try:
            await checkpoint.connect()
        except BaseException:
            await checkpoint.close()
            raise

    async def _close_if_done(self, checkpoint: Checkpoint) -> None:
        """Close a checkpoint that no request uses any more and none will."""
        if not self._requests[checkpoint]:
            del self._requests[checkpoint]
            if checkpoint is not self.checkpoint:
                await checkpoint.close()


async def score_elsewhere(checkpoint: Checkpoint, groups: Sequence[EncodedGroup]) -> list[list[float]]:
    """Return the rewards of every branch of every group, in their order, from the servers behind a gateway.

    Raises:
        RefusalError: The servers did not give all of them.
    """
    assert checkpoint.servers is not None
    try:
        return await checkpoint.servers.score_encoded(groups)
    except (RewardError, EngineError) as error:
        raise RefusalError(502, str(error)) from error
