import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar.metrics import Estimate, clustered_mean, outcomes, paired_difference, pairwise_accuracy

REWARDS = st.floats(-20, 20) | st.integers(-2, 2).map(float)
ITEMS = st.lists(st.tuples(REWARDS, REWARDS, st.sampled_from("abcde")), min_size=1, max_size=30)


def brute_force_error(values: list[float], clusters: list[str]) -> float:
    """Miller 2024, equation 4: the double sum over pairs of items within a cluster."""
    mean = sum(values) / len(values)
    total = 0.0
    for i, first in enumerate(values):
        for j, second in enumerate(values):
            if clusters[i] == clusters[j]:
                total += (first - mean) * (second - mean)
    return math.sqrt(max(total, 0.0)) / len(values)


@given(ITEMS)
def test_accuracy_and_its_error_equal_the_brute_force(items: list[tuple[float, float, str]]) -> None:
    better, worse, clusters = map(list, zip(*items, strict=True))
    points = [1.0 if b > w else 0.0 if b < w else 0.5 for b, w, _ in items]
    estimate = pairwise_accuracy(better, worse, clusters)
    assert estimate.mean == pytest.approx(sum(points) / len(points))
    assert (estimate.count, estimate.clusters) == (len(points), len(set(clusters)))
    if len(set(clusters)) == 1:
        assert estimate.standard_error is None
    else:
        assert estimate.standard_error == pytest.approx(brute_force_error(points, clusters), abs=1e-9)


@given(ITEMS)
def test_without_shared_prompts_it_is_the_usual_standard_error(items: list[tuple[float, float, str]]) -> None:
    values = [better for better, _, _ in items]
    error = clustered_mean(values, range(len(values))).standard_error
    if len(values) > 1:
        assert error == pytest.approx(float(np.std(values)) / math.sqrt(len(values)))


@given(ITEMS, st.integers(2, 4))
def test_repeating_every_item_within_its_prompt_adds_no_certainty(
    items: list[tuple[float, float, str]], times: int
) -> None:
    values, clusters = [item[0] for item in items], [item[2] for item in items]
    once, repeated = clustered_mean(values, clusters), clustered_mean(values * times, clusters * times)
    assert repeated.mean == pytest.approx(once.mean)
    assert repeated.count == times * once.count
    if once.standard_error is not None:
        assert repeated.standard_error == pytest.approx(once.standard_error, abs=1e-9)


def test_golden_values() -> None:
    # Points 1, 1, 0.5, 0; mean 0.625; sums per prompt 0.75 and -0.75.
    estimate = pairwise_accuracy([2.0, -1.0, 3.0, -5.0], [1.0, -1.5, 3.0, -4.0], ["p", "p", "q", "q"])
    assert estimate == Estimate(0.625, pytest.approx(math.sqrt(2 * 0.75**2) / 4), 4, 2)


def test_ties_count_one_half() -> None:
    assert outcomes([1.0, 2.0, 0.0], [1.0, 1.0, 1.0]).tolist() == [0.5, 1.0, 0.0]


@given(ITEMS)
def test_a_paired_difference_is_that_of_the_accuracies(items: list[tuple[float, float, str]]) -> None:
    better, worse, clusters = map(list, zip(*items, strict=True))
    first, second = outcomes(better, worse), outcomes(worse, [0.0] * len(worse))
    difference = paired_difference(first, second, clusters)
    assert difference.mean == pytest.approx(float(first.mean() - second.mean()), abs=1e-12)
    if difference.standard_error is not None:
        expected = brute_force_error((first - second).tolist(), clusters)
        assert difference.standard_error == pytest.approx(expected, abs=1e-9)


def test_what_both_scorers_find_hard_cancels() -> None:
    hard = np.array([0.0, 1.0] * 50)
    difference = paired_difference(hard, hard, range(100))
    assert (difference.mean, difference.standard_error) == (0.0, 0.0)
    assert difference.verdict() == "cannot tell"


@pytest.mark.parametrize(
    ("mean", "error", "clusters", "verdict"),
    [
        (0.1, 0.04, 50, "better"),
        (-0.1, 0.04, 50, "worse"),
        (0.1, 0.05, 50, "cannot tell"),
        (-0.1, 0.06, 50, "cannot tell"),
        (1.0, 0.0, 9, "cannot tell"),
        (1.0, 0.0, 10, "better"),
        (1.0, None, 1, "cannot tell"),
    ],
)
def test_verdicts(mean: float, error: float | None, clusters: int, verdict: str) -> None:
    assert Estimate(mean, error, 100, clusters).verdict() == verdict


def test_a_failed_reward_is_never_a_number() -> None:
    with pytest.raises(ValueError, match="not finite"):
        pairwise_accuracy([float("nan")], [0.0], ["p"])


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rewards of better"):
        outcomes([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="found 1 for 2"):
        clustered_mean([1.0, 2.0], ["p"])
    with pytest.raises(ValueError, match="found 0 for 0"):
        clustered_mean([], [])
    with pytest.raises(ValueError, match="2 items of the first scorer, but 1"):
        paired_difference(np.ones(2), np.ones(1), ["p", "q"])
