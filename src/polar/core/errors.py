"""Errors that are not the program's: the input is wrong, or somebody ended it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class InputError(ValueError):
    """Bad input from a user: a file, a row, an argument or a checkpoint.

    The message is one line that says what is wrong, where, what was expected and what to do. The command line
    prints it without a traceback and exits with code 2; anything else that is raised is our own fault (code 1).
    """


class TerminatedError(Exception):
    """SIGTERM came and the work was put by; the message says how to go on. The command line exits with code 143."""


def first_mistake(error: ValidationError) -> str:
    """The first mistake that a validation found, with its place, on one line, and how many more there are."""
    mistakes = error.errors(include_url=False, include_input=False)
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in mistakes[0]["loc"]).lstrip(".")
    message = " ".join(mistakes[0]["msg"].removeprefix("Value error, ").split())
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return f"{place}: {message}{more}" if place else f"{message}{more}"


def reason(error: Exception) -> str:
    """Return the first line of an error's message, or its type when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
