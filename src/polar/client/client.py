"""`AsyncRewardModelClient`: rewards of comparisons, groups and token ids from one or several servers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, cast

from polar.client.engines import Answer, ServerType, ways_to_ask
from polar.client.probe import diagnose
from polar.client.transport import INPUT_STATUSES, Limits, Server, Transport, open_servers
from polar.core.checkpoint import BUNDLED_NAME, read_probes, served_directory
from polar.core.errors import EngineError, InputError, RewardError
from polar.core.http import NO_SUCH_PATH, RefusedError
from polar.core.records import Comparison, Group
from polar.core.template import Compat, EncodedGroup, Template
from polar.data import record_rows
from polar.data.record_rows import Item

log = logging.getLogger(__name__)

MOST_TRIES = 5
"""Of one request that the servers answer with an error of their own (500) or with nonsense."""
MOST_SPLITS = 32
"""Of one refused request, to find the inputs that are at fault."""
GATHERING = 0.02
"""Seconds that a single input waits for others to share its request."""


class AsyncRewardModelClient:
    """Scores on servers what `RewardModel` scores in this process, with the same inputs and the same rewards.

    Inputs are encoded here and sent as token ids, in requests of bounded size, those that share a prefix beside each
    other. When it connects, the client sends the checkpoint's probes and refuses a server that does not give their
    rewards (`polar.client.probe`). A key in the environment variable POLAR_API_KEY is sent as a bearer token.

    An instance belongs to one event loop. Close it, or use it as a context manager.

    Example:
        >>> async with AsyncRewardModelClient("polar-mini", server_address="127.0.0.1:30000") as client:
        ...     rewards = await client.score([Comparison("2+2?", "It is 4.", "4")])

    Args:
        path: The checkpoint that the servers serve: a directory, or the name of a bundled one. Of it only
            tokenizer.json and polar.json are read.
        server_address: host:port or a URL, several of them in a list or separated by commas. An address can name its
            own type, as in vllm=10.0.0.1:8000.
        server_type: What serves there; "auto" finds out.
        compat: "seed" builds the inputs exactly as the original POLAR client does.
        max_length: Longest input in tokens (default: the checkpoint's).
        max_response_length: Longest reference and output in tokens (default: the checkpoint's).
        limits: How much is sent at a time, and for how long.
        probe: Refuse servers that do not give the rewards of the checkpoint's probes. Only a tool that measures what
            such servers do should turn it off.

    Raises:
        InputError: the checkpoint, an address or the key is unusable.
    """

    def __init__(
        self,
        path: str | Path = BUNDLED_NAME,
        *,
        server_address: str | Sequence[str] = "127.0.0.1:30000",
        server_type: ServerType = "auto",
        compat: Compat | None = None,
        max_length: int | None = None,
        max_response_length: int | None = None,
        limits: Limits | None = None,
        probe: bool = True,
    ) -> None:
        directory = served_directory(path)
        self._path = path
        self.template = Template.load(directory, compat).with_lengths(max_length, max_response_length)
        self.limits = limits or Limits()
        self._probes = read_probes(directory) if probe else []
        if probe and not self._probes:
            log.warning(
                "%s: the checkpoint has no probes, so nothing proves that a server gives its rewards; load it with "
                "RewardModel and save it again",
                directory,
            )
        self._transport = Transport(open_servers(server_address, server_type, self.limits), self.limits, self._prove)
        self._connecting = asyncio.Lock()
        self._connected = False
        self._gatherer = Gatherer(self._answers, self.limits.batch_items)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections; what is still being scored one by one is cancelled."""
        await self._gatherer.close()
        await self._transport.close()

    async def connect(self) -> None:
        """Find out how the servers are asked, and prove that they give the checkpoint's rewards.

        The first request does this by itself; but then it waits for servers that do not answer yet. Servers that were
        refused are tried again, such as one that has loaded another checkpoint since.

        Raises:
            EngineError: a server gives other rewards or is no reward server, or none can be reached.
        """
        self._connected = False
        unreachable = await self._connect()
        if len(unreachable) == len(self._transport.servers):
            raise EngineError(f"no server answers: {'; '.join(unreachable)}")

    async def score(
        self,
        comparisons: Comparison | Item | Iterable[Comparison | Item],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> list[float]:
        """Rewards of independent comparisons, in their order.

        Args:
            comparisons: What to score, also as dictionaries or tuples (`record_rows.Item`); each has its own truncation
                budget.
            progress: Called with the number of inputs that were just finished.

        Raises:
            RewardError: some failed; it says which and why, and keeps the others.
            EngineError: a server does not give this checkpoint's rewards.
        """
        scored = await self.score_groups(record_rows.groups_of_items(comparisons), progress=progress)
        return [reward for rewards in scored for reward in rewards]

    async def score_groups(
        self, groups: Iterable[Group], *, progress: Callable[[int], object] | None = None
    ) -> list[list[float]]:
        """Rewards of every candidate of every group, in their order; candidates share one truncation budget.

        Arguments and errors as in `score`; `RewardError` counts the candidates of one group after the other.
        """
        groups = list(groups)
        encoded = await asyncio.to_thread(self._encode, groups)
        rewards = iter(_complete(await self._answers(encoded, progress)))
        return [[next(rewards) for _ in group.candidates] for group in groups]

    async def score_encoded(
        self, groups: Sequence[EncodedGroup], *, progress: Callable[[int], object] | None = None
    ) -> list[list[float]]:
        """Rewards of groups that `self.template` has encoded already; see `score_groups`."""
        sequences = [ids for group in groups for ids in group.sequences()]
        rewards = iter(await self.score_ids(sequences, progress=progress))
        return [[next(rewards) for _ in group.branches] for group in groups]

    async def score_ids(
        self, sequences: Iterable[list[int]], *, progress: Callable[[int], object] | None = None
    ) -> list[float]:
        """Rewards of inputs that `polar.core.template` has encoded already (`EncodedGroup.sequences`); see `score`."""
        return _complete(await self._answers([ids or "an input without tokens" for ids in sequences], progress))

    async def score_one(self, comparison: Comparison) -> float:
        """The reward of one comparison; calls at the same time share their requests.

        A prompt that is too long is cut as for the longest possible output, so that the outputs of one prompt, which
        come one by one here, all see the same of it.

        Raises:
            InputError: a text is not valid Unicode.
            RewardError: it failed.
            EngineError: a server does not give this checkpoint's rewards.
        """
        (ids,) = self.template.encode(comparison, one_of_many=True).sequences()
        return _complete([await self._gatherer.add(ids)])[0]

    def _encode(self, groups: Sequence[Group]) -> list[list[int] | str]:
        """The inputs of all candidates; a text that cannot be encoded gives reasons instead."""
        encoded: list[list[int] | str] = []
        for group in groups:
            try:
                encoded += self.template.encode_group(group).sequences()
            except InputError as error:
                encoded += [str(error)] * len(group.candidates)
        return encoded

    async def _answers(
        self, inputs: Sequence[list[int] | str], progress: Callable[[int], object] | None = None
    ) -> list[Answer]:
        """One answer per input, in their order; reasons stay as they are."""
        deadline = asyncio.get_running_loop().time() + self.limits.deadline
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._connect()
        answers: list[Answer] = ["" if isinstance(one, list) else one for one in inputs]
        sequences = {index: one for index, one in enumerate(inputs) if isinstance(one, list)}
        parts = batches(sequences, self.limits)

        async def work() -> None:
            for batch in parts:
                found = await self._answer_batch([sequences[index] for index in batch], deadline)
                for index, answer in zip(batch, found, strict=True):
                    answers[index] = answer
                if progress is not None:
                    progress(len(batch))

        await asyncio.gather(*(work() for _ in range(self.limits.concurrency * len(self._transport.servers))))
        return answers

    async def _answer_batch(self, batch: list[list[int]], deadline: float) -> list[Answer]:
        """Answers to one request; if it is refused, halves of it find out who is at fault."""
        splits = MOST_SPLITS

        async def ask(part: list[list[int]]) -> list[Answer]:
            nonlocal splits
            try:
                return await self._transport.ask(part, deadline, MOST_TRIES if len(part) == len(batch) else 2)
            except RefusedError as error:
                if len(part) == 1 or error.status not in INPUT_STATUSES or not splits:
                    among = f" (in a request of {len(part)} inputs)" if len(part) > 1 else ""
                    return [f"{error}{among}"] * len(part)
            splits -= 1
            half = len(part) // 2
            return await ask(part[:half]) + await ask(part[half:])

        return await ask(batch)

    async def _connect(self) -> list[str]:
        async with self._connecting:
            if self._connected:
                return []
            unreachable = await self._transport.connect()
            self._connected = True
            return unreachable

    async def _prove(self, server: Server) -> None:
        """Find the way to ask a server that gives the rewards of the probes (or any rewards, if there are none).

        Raises:
            EngineError: there is none.
        """
        sequences = [probe.ids for probe in self._probes] or self.template.encode(Comparison("?", "!", "!")).sequences()
        engines = await ways_to_ask(server.server_type, lambda path: self._transport.get(server, path))
        for engine in engines:
            try:
                answers = await self._transport.post(server, engine, sequences)
            except RefusedError as error:
                if error.status in NO_SUCH_PATH and engine is not engines[-1]:
                    continue
                raise RefusedError(f"{error} (it was sent the probes of {self._path})", error.status) from None
            if reason := diagnose(self._probes, answers):
                raise EngineError(f"{reason} (the checkpoint here: {self._path})")
            server.engine = engine
            return


def batches(sequences: Mapping[int, list[int]], limits: Limits) -> Iterator[list[int]]:
    """Split inputs, given by their numbers, into requests; sorted, so that those with the same prefix are together."""
    batch: list[int] = []
    tokens = 0
    for number in sorted(sequences, key=sequences.__getitem__):
        length = len(sequences[number])
        if batch and (len(batch) == limits.batch_items or tokens + length > limits.batch_tokens):
            yield batch
            batch, tokens = [], 0
        batch.append(number)
        tokens += length
    if batch:
        yield batch


class Gatherer:
    """Gathers inputs that come one by one.

    Args:
        answer: Answers a list of inputs.
        most: It is called at once for so many.
    """

    def __init__(self, answer: Callable[[Sequence[list[int]]], Awaitable[list[Answer]]], most: int) -> None:
        self._answer = answer
        self._most = most
        self._waiting: list[tuple[list[int], asyncio.Future[Answer]]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def add(self, ids: list[int]) -> Answer:
        """The answer to one input."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((ids, future))
        if len(self._waiting) == self._most:
            self._send()
        elif len(self._waiting) == 1:
            loop.call_later(GATHERING, self._send)
        return await future

    async def close(self) -> None:
        """Give up what is not answered yet; those who wait are cancelled."""
        self._send()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _send(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        task = asyncio.create_task(self._hand_out(waiting))
        self._tasks.add(task)

        def finished(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            for _, future in waiting:
                future.cancel()  # if the task was cancelled; otherwise all of them have their answers

        task.add_done_callback(finished)

    async def _hand_out(self, waiting: list[tuple[list[int], asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self._answer([ids for ids, _ in waiting])
        except Exception as error:  # goes to those who wait
            for _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), answer in zip(waiting, answers, strict=True):
            if not future.done():  # its caller may have gone away
                future.set_result(answer)


def _complete(answers: Sequence[Answer]) -> list[float]:
    """All rewards, or the error that keeps the good ones."""
    failures = {index: answer for index, answer in enumerate(answers) if isinstance(answer, str)}
    rewards = [None if isinstance(answer, str) else answer for answer in answers]
    if failures:
        raise RewardError(rewards, failures)
    return cast(list[float], rewards)
