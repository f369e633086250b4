"""The reward of ms-swift, called with the columns that it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polar import Comparison, InputError, Message, Template
from polar.rft.swift import PolarReward
from tests.client.fakes import Fake, reward

OUTPUTS = ["Beijing.", "<think>hm</think>Shanghai."]
MESSAGES = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of China?"},
        {"role": "assistant", "content": output},
    ]
    for output in OUTPUTS
]


@pytest.mark.parametrize(
    "columns",
    [
        {"solution": ["It is Beijing."] * 2},
        {"reference": ["It is Beijing."] * 2, "solution": ["no"] * 2},
        {"references": [["It is Beijing."]] * 2},
        {"references": [None, ["It is Beijing."]], "solution": ["It is Beijing.", None]},
    ],
)
def test_rewards_of_completions(fake: Fake, served: Path, template: Template, columns: dict[str, Any]) -> None:
    orm = PolarReward(args=object(), address=fake.address, model=str(served))
    found = orm(OUTPUTS, messages=MESSAGES, trainer_state=None, finish_reason=["stop"] * 2, **columns)
    prompt = (Message("system", "Be brief."), Message("user", "What is the capital of China?"))
    assert found == [
        reward(template.encode(Comparison(prompt, "It is Beijing.", output)).sequences()[0])
        for output in ("Beijing.", "Shanghai.")
    ]


def test_settings_from_the_environment(fake: Fake, served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_REWARD_ADDRESS", fake.address)
    monkeypatch.setenv("POLAR_REWARD_MODEL", str(served))
    assert len(PolarReward()(OUTPUTS, messages=MESSAGES, solution=["It is Beijing."] * 2)) == 2


def test_a_row_without_a_reference_is_named(fake: Fake, served: Path) -> None:
    orm = PolarReward(address=fake.address, model=str(served))
    with pytest.raises(InputError, match="ms-swift:1: expected a reference in one of references, reference, solution"):
        orm(OUTPUTS, messages=MESSAGES, solution=["It is Beijing.", None])
    with pytest.raises(InputError, match='ms-swift:0: field "prompt"'):
        orm(OUTPUTS[:1], messages=[MESSAGES[0][-1:]], solution=["It is Beijing."])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "ms-swift: expected the conversations of the completions in messages"),
        ([MESSAGES[0], MESSAGES[1][:-1]], "ms-swift:1: expected messages that end with the completion"),
        ([MESSAGES[0], []], "ms-swift:1: expected messages that end with the completion"),
    ],
)
def test_without_the_conversation_there_is_no_prompt(fake: Fake, served: Path, messages: Any, message: str) -> None:
    orm = PolarReward(address=fake.address, model=str(served))
    with pytest.raises(InputError, match=message):
        orm(OUTPUTS, messages, solution=["It is Beijing."] * 2)
