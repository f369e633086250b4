"""The reward of ms-swift.

Register it in a file that is given as --external_plugins::

    from swift.rewards import orms
    from polar.rft.swift import PolarReward
    orms["polar"] = PolarReward

and then `--reward_funcs polar`. Settings are in the environment (`polar.rft.reward`). The reference is a column of
the data set: `references`, `reference` or `solution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polar.core.errors import InputError
from polar.rft.reward import read_sample, reward_for

REFERENCES = ("references", "reference", "solution")


class PolarReward:
    """A reward function of ms-swift, in the shape of its class ORM.

    Args:
        args: The training arguments, which ms-swift hands over; not used.
        settings: `polar.rft.reward.Settings`, for use from Python.
    """

    def __init__(self, args: Any = None, **settings: Any) -> None:
        self._settings = settings

    def __call__(
        self, completions: Sequence[str], messages: Sequence[Any] | None = None, **columns: Any
    ) -> list[float]:
        """Return the rewards of completions, in their order.

        Args:
            completions: Texts of the policy.
            messages: The conversations; the completion is the last message of each.
            columns: The columns of the data set, one value per completion.

        Raises:
            InputError: a row has no reference or no prompt.
            RewardError: a reward failed, and no floor is set.
        """
        if messages is None:
            raise InputError("ms-swift: expected the conversations of the completions in messages, found none")
        rows = [
            {
                "prompt": _prompt(conversation, number),
                **{name: columns[name][number] for name in REFERENCES if name in columns},
            }
            for number, conversation in enumerate(messages)
        ]
        samples = [
            read_sample(row, output, prompt="prompt", references=REFERENCES, source="ms-swift", number=number)
            for number, (row, output) in enumerate(zip(rows, completions, strict=True))
        ]
        return [scored.reward for scored in reward_for(self._settings).score_all(samples)]


def _prompt(conversation: Any, number: int) -> Any:
    """Return the messages before the completion."""
    if not conversation or conversation[-1].get("role") != "assistant":
        raise InputError(f"ms-swift:{number}: expected messages that end with the completion, a turn of the assistant")
    return conversation[:-1]
