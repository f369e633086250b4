import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar.core.records import AGGREGATES, Aggregate, Group, aggregated, groups_of

REWARD = st.floats(-50, 50)
REWARDS = st.integers(1, 4).flatmap(
    lambda candidates: st.lists(st.lists(REWARD, min_size=candidates, max_size=candidates), min_size=1, max_size=5)
)


def test_values_by_hand() -> None:
    rewards = [[0.0, -2.0], [math.log(3), -2.0]]  # two references, two candidates
    assert aggregated(rewards, "max") == [math.log(3), -2.0]
    assert aggregated(rewards, "mean") == [math.log(3) / 2, -2.0]
    assert aggregated(rewards, "softmax") == pytest.approx([0.75 * math.log(3), -2.0])


@given(REWARDS)
def test_softmax_lies_between_mean_and_max(rewards: list[list[float]]) -> None:
    for low, middle, high in zip(*(aggregated(rewards, how) for how in ("mean", "softmax", "max")), strict=True):
        assert low - 1e-9 <= middle <= high + 1e-9


@given(REWARDS, st.sampled_from(AGGREGATES), st.floats(-1000, 1000))
def test_a_constant_stays_outside(rewards: list[list[float]], how: Aggregate, shift: float) -> None:
    shifted = aggregated([[reward + shift for reward in row] for row in rewards], how)
    assert shifted == pytest.approx([reward + shift for reward in aggregated(rewards, how)], abs=1e-9)


@given(REWARDS, st.sampled_from(AGGREGATES))
def test_the_order_of_references_does_not_matter(rewards: list[list[float]], how: Aggregate) -> None:
    assert aggregated(rewards[::-1], how) == pytest.approx(aggregated(rewards, how), abs=1e-12)


@pytest.mark.parametrize("how", AGGREGATES)
def test_one_reference_changes_nothing_and_none_is_an_error(how: Aggregate) -> None:
    assert aggregated([[-7.25, 1e6]], how) == [-7.25, 1e6]
    with pytest.raises(ValueError, match="at least one reference"):
        aggregated([], how)
    with pytest.raises(ValueError, match="shorter"):
        aggregated([[1.0, 2.0], [1.0]], how)


def test_a_group_per_reference() -> None:
    assert groups_of("p", ["a", "b"], ("c",), 7, "pretrain") == (
        Group("p", "a", ("c",), 7, "pretrain"),
        Group("p", "b", ("c",), 7, "pretrain"),
    )
