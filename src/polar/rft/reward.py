"""The reward of a sample, the same in every framework: without thinking, against every reference, on one scale.

Frameworks ask for one sample at a time from an event loop, from many threads, or for a batch. All of them end here. A
process has one client for each set of settings, on a thread of its own, in which single samples share requests. Where
there is no reward, that is an error, or a floor that was asked for; never another default.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from polar.client.engines import ServerType
from polar.client.sync import RewardModelClient, fetch_checkpoint
from polar.client.transport import Limits
from polar.core.checkpoint import Scale, read_calibration, scaling, served_directory
from polar.core.errors import EngineError, InputError, RewardError
from polar.core.records import Aggregate, Comparison, Text, aggregated, text_of
from polar.core.template import Compat
from polar.core.text import strip_thinking
from polar.data.dialogues import split
from polar.data.fields import Row, as_string, text_at
from polar.data.formats import named, references_at

log = logging.getLogger(__name__)

PREFIX = "POLAR_REWARD_"
"""Beginning of the environment variables, as in POLAR_REWARD_ADDRESS."""
MODEL_VARIABLE = f"{PREFIX}MODEL"

Thinking = Literal["strip", "opened", "keep"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Settings:
    """Source and scale of the rewards.

    The key of the servers is no setting: it is read from the environment variable POLAR_API_KEY.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    address: str = "127.0.0.1:30000"
    """host:port or a URL of the reward server; several separated by commas."""
    model: str | None = None
    """The checkpoint that is served there: a directory on every machine that asks, or "polar-nano". None: the
    checkpoint of the `polar serve` there; other servers do not name theirs."""
    server_type: ServerType = "auto"
    """Kind of the servers; "auto" detects it."""
    compat: Compat | None = None
    """"seed" builds the inputs exactly as the original POLAR client does."""
    scale: Scale = "raw"
    """"zscore" and "probability" use the calibration of the checkpoint (`polar calibrate`)."""
    aggregate: Aggregate = "max"
    """How the rewards against several references become one."""
    thinking: Thinking = "strip"
    """"strip": <think> blocks are taken out (`polar.core.text`). "opened": so they are, and the chat template of the
    policy opens the first one itself. "keep": texts are scored as they are."""
    floor: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """The reward of a sample whose reward could not be had, on the scale above; None: that is an error."""
    concurrency: Annotated[int, Field(gt=0)] = 8
    """Requests in flight at each address, per process."""
    timeout: Positive = 300
    """Seconds for one request."""
    deadline: Positive = 1800
    """Seconds until a reward that cannot be had counts as failed; a restart of the server should fit in."""


def read_settings(given: Mapping[str, Any]) -> Settings:
    """Return the settings of some arguments; missing ones are looked up in the environment.

    Raises:
        InputError: an argument or variable is unknown or has a wrong value.
    """
    names = [field.name for field in dataclasses.fields(Settings)]
    variables = {name: f"{PREFIX}{name.upper()}" for name in names}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in variables.values())
    if unknown:
        raise InputError(f"environment variable {unknown[0]}: unknown; expected one of {', '.join(variables.values())}")
    values: dict[str, Any] = {
        name: os.environ[variable] for name, variable in variables.items() if os.environ.get(variable)
    }
    values |= {name: value for name, value in given.items() if value is not None}
    if isinstance(address := values.get("address"), Sequence) and not isinstance(address, str):
        values["address"] = ",".join(map(str, address))
    try:
        return TypeAdapter(Settings).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if name not in names:
            raise InputError(f"reward setting {name}: unknown; expected one of {', '.join(names)}") from error
        place = f"reward setting {name}" if name in given else f"environment variable {variables[name]}"
        raise InputError(f"{place}: {first['msg']}, found {first['input']!r}") from error


@dataclass(frozen=True, slots=True)
class Sample:
    """One output of a policy, with its prompt and references."""

    prompt: Text
    references: tuple[Text, ...]
    """One or more."""
    output: str
    place: str
    """Its name in messages."""
    opened: bool = False
    """The prompt, as the policy saw it, ends with an open block of thinking."""


def read_sample(
    fields: Mapping[str, Any],
    output: object,
    *,
    prompt: str,
    references: tuple[str, ...],
    source: str,
    number: int = 0,
    opened: bool = False,
) -> Sample:
    """Return the sample in some fields; arrays of NumPy, which Parquet readers make of lists, count as lists.

    Args:
        fields: Values by their names.
        output: The text of the policy.
        prompt: The name of the prompt.
        references: Names of the reference, the first that is there; a list that is not one of messages holds several
            references.
        source: Origin of the sample, for messages.
        number: Its number there.
        opened: See `Sample`.

    Raises:
        InputError: there is no prompt, no reference, or a value is no text.
    """
    row = Row(source, number, {name: _plain(value) for name, value in fields.items()})
    name = next((name for name in references if row.has(name)), None)
    if name is None:
        raise InputError(
            f"{row.place}: expected a reference in one of {', '.join(references)}, found none: POLAR scores against one"
        )
    asked, several = split(row, text_at(row, prompt), named(name, references_at(row, name)))
    return Sample(asked, several, as_string(row, "output", output), row.place, opened)


def as_scored(sample: Sample, thinking: Thinking = "strip") -> Sample:
    """Return the sample as it is scored: only the answers of output and references, unless thinking is kept.

    Raises:
        InputError: a reference has no answer, and nothing can be close to that.
    """
    if thinking != "keep":
        opened = sample.opened or thinking == "opened"
        output = str(strip_thinking(sample.output, opened=opened))
        sample = replace(sample, output=output, references=tuple(map(strip_thinking, sample.references)))
    if not all(text_of(reference).strip() for reference in sample.references):
        raise InputError(f"{sample.place}: expected a reference with an answer, found only thinking or white space")
    return sample


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True, slots=True)
class Scored:
    """The result of scoring one sample."""

    reward: float
    failed: bool
    """The reward is the floor, because there was none from the servers."""
    answered: bool
    """False: the output is only thinking, so that an empty answer was scored."""


class Reward:
    """Rewards of samples from the servers, and on the scale, of some settings.

    Raises:
        InputError: the checkpoint or an address is unusable, or the checkpoint has no calibration for the scale.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        with TemporaryDirectory(prefix="polar-") as fetched:
            directory = (
                _fetched(settings, Path(fetched)) if settings.model is None else served_directory(settings.model)
            )
            self._client = RewardModelClient(
                directory,
                server_address=settings.address,
                server_type=settings.server_type,
                compat=settings.compat,
                limits=Limits(settings.concurrency, timeout=settings.timeout, deadline=settings.deadline),
            )
            self.template = self._client.template
            self._in_scale = scaling(settings.scale, read_calibration(directory))

    async def score(self, sample: Sample) -> Scored:
        """Return the reward of one sample, in any event loop; concurrent calls share requests.

        Raises:
            InputError: a reference has no answer; or a server does not give this checkpoint's rewards.
            RewardError: the reward could not be had, and the settings have no floor.
        """
        sample, futures = self._start(sample)
        outcomes = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        return _complete([self._scored(sample, outcomes)])[0]

    def score_all(self, samples: Sequence[Sample]) -> list[Scored]:
        """Return the rewards of samples, in their order; this thread waits for them.

        Errors as in `score`; `RewardError` keeps the rewards of the other samples.
        """
        started = [self._start(sample) for sample in samples]
        return _complete(
            [
                self._scored(sample, [future.exception() or future.result() for future in futures])
                for sample, futures in started
            ]
        )

    def _start(self, sample: Sample) -> tuple[Sample, list[Future[float]]]:
        """Return the sample as it is scored and its rewards by reference; for probabilities also of the references."""
        sample = as_scored(sample, self.settings.thinking)
        with_own = self.settings.scale == "probability"
        return sample, [
            self._client.start_one(Comparison(sample.prompt, reference, candidate))
            for reference in sample.references
            for candidate in ((sample.output, reference) if with_own else (sample.output,))
        ]

    def _scored(self, sample: Sample, outcomes: Sequence[float | BaseException]) -> Scored | str:
        """Return the result, or why there is none."""
        rewards: list[float] = []
        for outcome in outcomes:
            if isinstance(outcome, RewardError):
                return self._failed(sample, outcome.failures[0])
            if isinstance(outcome, EngineError):
                model = self.settings.model
                source = "not set, and was asked of the server" if model is None else f"{model!r}"
                raise EngineError(f"{outcome}; the reward setting model ({MODEL_VARIABLE}) is {source}") from outcome
            if isinstance(outcome, BaseException):
                raise outcome
            rewards.append(outcome)
        each = len(rewards) // len(sample.references)
        by_reference = [self._in_scale(rewards[i : i + each]) for i in range(0, len(rewards), each)]
        return Scored(aggregated(by_reference, self.settings.aggregate)[0], failed=False, answered=bool(sample.output))

    def _failed(self, sample: Sample, reason: str) -> Scored | str:
        if self.settings.floor is None:
            return f"{sample.place}: {reason}"
        log.warning("%s: no reward, %g (the floor) in its place: %s", sample.place, self.settings.floor, reason)
        return Scored(self.settings.floor, failed=True, answered=bool(sample.output))


def reward_for(given: Mapping[str, Any]) -> Reward:
    """Return the `Reward` for some arguments and the environment; one per settings, shared by all threads.

    Raises:
        InputError: see `read_settings` and `Reward`.
    """
    settings = read_settings(given)
    with _opening:
        return _reward(settings, os.getpid())


_opening = threading.Lock()


@lru_cache(maxsize=8)
def _reward(settings: Settings, process: int) -> Reward:
    """Return the `Reward` of a process; a forked one opens its own, since threads are not forked with it."""
    return Reward(settings)


def _fetched(settings: Settings, directory: Path) -> Path:
    """Return the directory, with the description of the server's checkpoint."""
    try:
        fetch_checkpoint(settings.address, directory, settings.deadline)
    except EngineError as error:
        raise EngineError(
            f"reward setting model ({MODEL_VARIABLE}) is not set, and the server does not tell it: {error}; "
            "set it to the directory of the checkpoint that is served there"
        ) from error
    return directory


def _complete(results: Sequence[Scored | str]) -> list[Scored]:
    failures = {number: result for number, result in enumerate(results) if isinstance(result, str)}
    if failures:
        raise RewardError([None if isinstance(result, str) else result.reward for result in results], failures)
    return [result for result in results if isinstance(result, Scored)]
