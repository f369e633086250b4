import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from polar.core.metrics import (
    Estimate,
    area_under_curve,
    clustered_mean,
    ordered_shares,
    outcomes,
    paired_difference,
    pairwise_accuracy,
    rank_correlations,
)

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


GRADED = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=7)


@settings(deadline=None)  # the first example imports
@given(st.lists(GRADED, min_size=1, max_size=6))
def test_ordered_shares_and_correlations_equal_counting_and_scipy(items: list[list[tuple[int, int]]]) -> None:
    quality, rewards = ([[pair[place] for pair in item] for item in items] for place in (0, 1))
    shares, correlations = ordered_shares(quality, rewards), rank_correlations(quality, rewards)
    for item, share, correlation in zip(items, shares, correlations, strict=True):
        points = [
            (first[1] > second[1]) + (first[1] == second[1]) / 2
            for first in item
            for second in item
            if first[0] > second[0]
        ]
        if not points:
            assert np.isnan(share)
            assert np.isnan(correlation)
            continue
        assert share == pytest.approx(np.mean(points))
        tau = kendalltau(*zip(*item, strict=True)).statistic
        assert correlation == pytest.approx(0 if np.isnan(tau) else tau)


def test_ordered_shares_of_pairs_are_outcomes_and_take_any_number_of_items() -> None:
    random = np.random.default_rng(0)
    rewards = random.integers(0, 3, (1500, 2)).astype(float)
    shares = ordered_shares([(1, 0)] * 1500, rewards.tolist())
    assert shares == pytest.approx(outcomes(rewards[:, 0], rewards[:, 1]))


def test_a_reward_that_is_not_finite_or_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        ordered_shares([(1, 0)], [(1, math.nan)])
    with pytest.raises(ValueError, match="a reward for every candidate"):
        rank_correlations([(1, 0)], [(1, 0, 2)])


@settings(deadline=None)  # the first example imports
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3), st.sampled_from("abcd")), min_size=2, max_size=30))
def test_the_area_under_the_curve_equals_counting_pairs(answers: list[tuple[bool, int, str]]) -> None:
    right, rewards, prompts = map(list, zip(*answers, strict=True))
    if len(set(right)) == 1:
        with pytest.raises(ValueError, match="only one kind"):
            area_under_curve(right, rewards, prompts)
        return
    points = [
        (first > second) + (first == second) / 2
        for first, good in zip(rewards, right, strict=True)
        for second, other in zip(rewards, right, strict=True)
        if good and not other
    ]
    assert area_under_curve(right, rewards, prompts).mean == pytest.approx(np.mean(points))


def test_the_area_equals_that_of_scikit_learn() -> None:
    roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score
    random = np.random.default_rng(0)
    right, rewards = random.random(500) < 0.3, random.integers(0, 20, 500)
    found = area_under_curve(right.tolist(), rewards.tolist(), range(500))
    assert found.mean == pytest.approx(roc_auc_score(right, rewards))


def test_the_error_of_the_area_is_its_spread_over_samples_of_prompts() -> None:
    random = np.random.default_rng(0)
    areas, errors = [], []
    for _ in range(200):
        difficulty = np.repeat(random.normal(0, 1, 60), 4)  # shared by the answers of a prompt
        right = np.tile([True, False, False, True], 60)
        rewards = difficulty + right + random.normal(0, 0.5, 240)
        found = area_under_curve(right.tolist(), rewards.tolist(), np.repeat(range(60), 4).tolist())
        assert found.standard_error is not None
        areas.append(found.mean)
        errors.append(found.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(areas), rel=0.2)
