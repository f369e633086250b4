"""Settings of the reward: arguments first, then the environment, never a guess."""

from __future__ import annotations

import pytest

from polar import InputError
from polar.rft.reward import Settings, read_settings


def test_nothing_given_is_whatever_is_served_on_this_machine() -> None:
    assert read_settings({}) == Settings(address="127.0.0.1:30000", model=None, scale="raw", floor=None)


def test_the_environment_fills_what_arguments_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_REWARD_ADDRESS", "10.0.0.1:30000,10.0.0.2:30000")
    monkeypatch.setenv("POLAR_REWARD_CONCURRENCY", "16")
    monkeypatch.setenv("POLAR_REWARD_FLOOR", "-12.5")
    monkeypatch.setenv("POLAR_REWARD_SCALE", "zscore")
    found = read_settings({"scale": "probability", "model": None})
    assert (found.address, found.concurrency, found.floor) == ("10.0.0.1:30000,10.0.0.2:30000", 16, -12.5)
    assert (found.scale, found.model) == ("probability", None)


def test_a_list_of_addresses() -> None:
    assert read_settings({"address": ["a:1", "b:2"]}).address == "a:1,b:2"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adress": "a:1"}, "reward setting adress: unknown; expected one of address, model"),
        (
            {"scale": "sigmoid"},
            "reward setting scale: Input should be 'raw', 'zscore' or 'probability', found 'sigmoid'",
        ),
        ({"floor": float("nan")}, "reward setting floor: Input should be a finite number"),
        ({"floor": "low"}, "reward setting floor: .*valid number.*found 'low'"),
        ({"concurrency": 0}, "reward setting concurrency: .*greater than 0, found 0"),
        ({"thinking": True}, "reward setting thinking"),
    ],
)
def test_a_wrong_argument(given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_settings(given)


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_REWARD_DEADLINE", "soon")
    with pytest.raises(InputError, match="environment variable POLAR_REWARD_DEADLINE: .*found 'soon'"):
        read_settings({})
    monkeypatch.setenv("POLAR_REWARD_ADRESS", "a:1")
    with pytest.raises(InputError, match="environment variable POLAR_REWARD_ADRESS: unknown"):
        read_settings({})
