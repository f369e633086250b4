"""What can go wrong between a client and its servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polar.core.errors import InputError

SHOWN = 3
"""Failures that a message names."""


class EngineError(InputError):
    """No server can be used: it does not give the rewards of this checkpoint, or none answers.

    The message is one line that says what the server does instead and which of its flags mends it.
    """


class RewardError(Exception):
    """Some rewards could not be had; the others are kept.

    Args:
        rewards: One per input, in order (groups one after the other); None where it failed.
        failures: Why, by the input's place in `rewards`.
    """

    def __init__(self, rewards: Sequence[float | None], failures: Mapping[int, str]) -> None:
        self.rewards: list[float | None] = list(rewards)
        self.failures: dict[int, str] = dict(failures)
        shown = [f"input {index}: {reason}" for index, reason in list(self.failures.items())[:SHOWN]]
        more = ["..."] if len(self.failures) > SHOWN else []
        super().__init__(f"{len(self.failures)} of {len(self.rewards)} rewards failed: {'; '.join([*shown, *more])}")
