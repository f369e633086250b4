"""Parts of several commands: flags, the progress bar, and scoring a stream in constant memory.

Modules of commands import on top what `--help` needs, and the rest in the command, so that help takes half a second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from polar.client.engines import ServerType
from polar.core.errors import InputError

if TYPE_CHECKING:
    from polar.core.records import Group
    from polar.core.template import EncodedGroup
    from polar.data.readers import ReadReport
    from polar.evaluation.scorers import Model

Noun = TypeVar("Noun")

Verbatim = Parameter(allow_leading_hyphen=True, negative="")
"""Texts may begin with a hyphen, and "-" is stdin or stdout."""
Files = Annotated[Sequence[str], Parameter(negative="")]
"""A flag that can be repeated."""
Inputs = Annotated[Sequence[str], Verbatim]
OnBadRow = Literal["error", "skip"]
"""As in `polar.data.readers`, whose import takes longer than `--help`."""

WINDOW = 256
"""Groups that are read, scored and written at a time."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeFlags:
    """Where and how the rewards of a checkpoint are computed: arguments of `polar.evaluation.scorers.open_model`."""

    server_address: str | None = None
    """host:port or URL of servers that give the rewards, by commas; the model is then the checkpoint they serve."""
    engine: ServerType = "auto"
    """Type of these servers; auto finds out. A key is taken from POLAR_API_KEY."""
    device: str | None = None
    """Torch device (default: a GPU if there is one)."""
    dtype: str | None = None
    """float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on a CPU)."""
    batch_tokens: int | None = None
    """Tokens of one forward pass (default: 4096 on a CPU, 16384 elsewhere)."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringFlags(ComputeFlags):
    """The same, with the lengths that are read."""

    max_length: int | None = None
    """Longest input in tokens (default: the checkpoint's)."""
    max_response_length: int | None = None
    """Longest reference and candidate in tokens (default: the checkpoint's)."""


def progress_bar(console: Console | None = None) -> Progress:
    """Return progress on stderr, which is shown on a terminal only and goes away at the end."""
    console = console or Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(
        TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal, transient=True
    )


def checked(items: Iterator[Noun]) -> Iterator[Noun]:
    """Read the first item, so that a mistake in the input shows before a large model is loaded."""
    return chain(list(islice(items, 1)), items)


def scored(
    model: Model, items: Iterator[Noun], groups: Callable[[Noun], Sequence[Group]], progress: Progress
) -> Iterator[tuple[Noun, list[EncodedGroup], list[list[float]]]]:
    """Score the groups of every item; only one window of items is in memory.

    Yields:
        An item, its groups as the model reads them, and the rewards of their candidates.
    """
    task = progress.add_task("scoring", total=None)
    while window := list(islice(items, WINDOW)):
        encoded = [[model.template.encode_group(group) for group in groups(item)] for item in window]
        flat = list(chain.from_iterable(encoded))
        rewards = iter(model.score_encoded(flat, progress=lambda count: progress.advance(task, count)))
        for item, own in zip(window, encoded, strict=True):
            yield item, own, list(islice(rewards, len(own)))


def refuse_unknown_flags(inputs: Sequence[str], command: str) -> None:
    """Refuse words that `Verbatim` takes for files and that can only be flags."""
    if unknown := [word for word in inputs if word.startswith("-") and word != "-"]:
        raise InputError(f"unknown flag {unknown[0]} (see polar {command} --help)")


def require_flags(given: dict[str, bool], what: str) -> None:
    """Refuse a command without files of which not all of these flags are given."""
    if missing := [flag for flag, there in given.items() if not there]:
        raise InputError(f"nothing to {what}: {', '.join(missing)} missing (or name an input file, or - for stdin)")


def renamed_flag(old: str, new: str) -> None:
    """Say on stderr that a flag has another name now."""
    sys.stderr.write(f"polar: warning: {old} is {new} now; the old name ends with the next version\n")


def tell_skipped(inputs: Iterable[str], reports: Iterable[ReadReport], used: str = "used") -> None:
    """Say on stderr how many rows of every input were skipped, if any."""
    for path, report in zip(inputs, reports, strict=True):
        if report.skipped:
            sys.stderr.write(f"{path}: skipped {report.skipped} unreadable rows, {used} {report.read}\n")
