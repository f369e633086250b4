"""Errors that are not the program's own: wrong input, servers without an answer, a terminated process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class InputError(ValueError):
    """Bad input from a user: a file, a row, an argument or a checkpoint.

    The message is one line that says what is wrong, where, what was expected and what to do. The command line
    prints it without a traceback and exits with code 2; anything else that is raised is our own fault (code 1).
    """


class TerminatedError(Exception):
    """SIGTERM stopped a run after it was saved; the message says how to go on. The command line exits with code 143."""


MAX_FAILURES_SHOWN = 3
"""In the message of a `RewardError`."""


class EngineError(InputError):
    """No server can be used: its rewards differ from this checkpoint's, or none answers.

    The message is one line: what the server does instead, and which of its flags changes that.
    """


class RewardError(Exception):
    """Some rewards failed; the others are kept.

    Args:
        rewards: One per input, in order (groups one after the other); None where it failed.
        failures: Reasons by the input's place in `rewards`.
    """

    def __init__(self, rewards: Sequence[float | None], failures: Mapping[int, str]) -> None:
        self.rewards: list[float | None] = list(rewards)
        self.failures: dict[int, str] = dict(failures)
        shown = [f"input {index}: {reason}" for index, reason in list(self.failures.items())[:MAX_FAILURES_SHOWN]]
        more = ["..."] if len(self.failures) > MAX_FAILURES_SHOWN else []
        super().__init__(f"{len(self.failures)} of {len(self.rewards)} rewards failed: {'; '.join([*shown, *more])}")


def first_mistake(error: ValidationError) -> str:
    """Return the first mistake of a validation with its place, on one line, and the number of further ones."""
    mistakes = error.errors(include_url=False, include_input=False)
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in mistakes[0]["loc"]).lstrip(".")
    message = " ".join(mistakes[0]["msg"].removeprefix("Value error, ").split())
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return f"{place}: {message}{more}" if place else f"{message}{more}"


def reason(error: Exception) -> str:
    """Return the first line of an error's message, or its type when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
