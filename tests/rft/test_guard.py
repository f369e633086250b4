"""The guard stops exactly when the reward has risen while the accuracy has fallen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar.rft.guard import Measurement, has_parted


def measured(rewards: list[float], accuracies: list[float]) -> list[Measurement]:
    pairs = zip(rewards, accuracies, strict=True)
    return [
        Measurement(10 * n, reward, 1.0, accuracy, None, None, 5.0, 100) for n, (reward, accuracy) in enumerate(pairs)
    ]


@pytest.mark.parametrize(
    ("rewards", "accuracies", "parted"),
    [
        ([0, 1, 2, 3], [0.9, 0.8, 0.5, 0.4], True),
        ([0, 1, 2, 3], [0.4, 0.5, 0.8, 0.9], False),  # both rise
        ([3, 2, 1, 0], [0.9, 0.8, 0.5, 0.4], False),  # both fall
        ([0, 1, 2, 3], [0.5, 0.5, 0.5, 0.49], False),  # within the tolerance
        ([1, 1, 1, 1], [0.9, 0.8, 0.5, 0.4], False),  # the reward stays
        ([0, 0, 1], [0.9, 0.5, 0.1], False),  # not enough measurements
        ([9, 9, 0, 1, 2, 3], [0.0, 0.0, 0.9, 0.8, 0.5, 0.4], True),  # what was before the window does not count
    ],
)
def test_by_hand(rewards: list[float], accuracies: list[float], parted: bool) -> None:
    assert has_parted(measured(rewards, accuracies), window=4, tolerance=0.02) is parted


curves = st.integers(1, 4).flatmap(
    lambda half: st.tuples(
        st.just(2 * half),
        st.lists(st.integers(-100, 100), min_size=2 * half, max_size=2 * half + 3),
        st.data(),
    )
)


@given(curves)
def test_only_a_rise_of_the_reward_with_a_fall_of_the_accuracy(drawn: tuple[int, list[int], st.DataObject]) -> None:
    window, rewards, data = drawn
    accuracies = data.draw(st.lists(st.integers(0, 100), min_size=len(rewards), max_size=len(rewards)))
    parted = has_parted(measured([float(r) for r in rewards], [a / 100 for a in accuracies]), window, tolerance=0.0)
    half = window // 2
    rise = sum(rewards[-half:]) - sum(rewards[-window:-half])
    fall = sum(accuracies[-window:-half]) - sum(accuracies[-half:])
    if abs(fall) > 0:  # sums of hundredths round, so an exact tie is not decided here
        assert parted == (rise > 0 and fall > 0)
    else:
        assert not parted or rise > 0
