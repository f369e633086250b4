import tracemalloc
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar.core.metrics import clustered_mean
from polar.evaluation.analysis import Diagnosis, Point, best_of
from polar.evaluation.manifest import Manifest
from polar.evaluation.records import Record
from polar.evaluation.summary import Summary, summary_of, survey_of
from tests.evaluation.evaluating import manifest, record


def summary(of: Manifest, records: Iterable[Record]) -> Summary:
    return summary_of(survey_of(of, records), ".")


def diagnosis(records: list[Record]) -> Diagnosis:
    (found,) = summary(manifest(), records).diagnoses
    return found


def curve_of(records: list[Record]) -> list[Point]:
    (found,) = summary(manifest("best of N"), records).best_of_n
    return found.curves["model"]


def test_accuracies_are_taken_by_domain_and_by_slice() -> None:
    records = [
        record((1, 0), (2, 1), number=0, domain="b", slices=("hard",)),
        record((1, 0), (1, 1), number=1, domain="b"),
        record((1, 0), (0, 1), number=2, domain="a", slices=("hard", "unseen")),
        record((1, 1), (0, 1), number=3, domain="a"),  # nothing to be right about
    ]
    results = summary(manifest(), records).results
    assert [(each.domain, each.slice, each.items, each.accuracy["model"].mean) for each in results] == [
        (None, None, 3, 0.5),
        ("a", None, 1, 0),
        ("b", None, 2, 0.75),
        (None, "hard", 2, 0.5),
        (None, "unseen", 1, 0),
    ]
    whole = results[0]
    assert whole.difference == clustered_mean(np.array([0, -0.5, -1]), ["0", "1", "2"])
    assert whole.rank_correlation is None  # pairs have no ranks
    assert whole.area is None


def test_rankings_have_a_correlation_and_answers_an_area_over_all_prompts() -> None:
    ranked = summary(manifest(), [record((2, 1, 0), (3, 1, 2))]).results[0]
    assert ranked.accuracy["model"].mean == pytest.approx(2 / 3)
    assert ranked.rank_correlation is not None
    assert ranked.rank_correlation["model"].mean == pytest.approx(1 / 3)
    task = "verifiable correctness"
    answers = [record((1, 0), (1, 0), number=0, task=task), record((1, 0), (3, 2), number=1, task=task)]
    result = summary(manifest(task), answers).results[0]
    assert result.accuracy["model"].mean == 1  # within each prompt
    assert result.area is not None
    assert result.area["model"].mean == 0.75  # 1 beats 0 but not 2, and 3 beats both


def test_a_perturbation_is_compared_with_the_same_items_before() -> None:
    perturbed = [
        record((1, 0, 0), rewards, number=number, task="sensitivity", domain="prompt injection")
        for number, rewards in enumerate([(2, 1, 3), (2, 1, 0), (2, 3, 4), (2, 1, 2)])
    ]
    found = summary(manifest(), [record((1, 0), (1, 0)), *perturbed])
    (sensitivity,) = found.sensitivity
    assert sensitivity.before["model"].mean == 0.75
    assert sensitivity.after["model"].mean == (0 + 1 + 0 + 0.5) / 4
    assert sensitivity.change["model"].mean == pytest.approx(-0.375)
    assert len(found.results) == 1  # perturbed items are no further preferences


def test_a_perturbation_may_change_the_better_candidate() -> None:
    # The better one in other words has the third reward; the worse one is beaten by it in two of three.
    perturbed = [
        record((1, 0, 1), rewards, number=number, task="sensitivity", domain="reworded")
        for number, rewards in enumerate([(2, 1, 3), (2, 1, 0), (2, 3, 4)])
    ]
    (sensitivity,) = summary(manifest(), [record((1, 0), (1, 0)), *perturbed]).sensitivity
    assert sensitivity.before["model"].mean == pytest.approx(2 / 3)
    assert sensitivity.after["model"].mean == pytest.approx(2 / 3)
    assert sensitivity.change["model"] == clustered_mean([0, -1, 1], range(3))


def test_several_references_are_reported_by_every_aggregate() -> None:
    # Against the first reference the worse one wins, against the second one the better one by far.
    by_reference = ((0.0, 1.0), (3.0, 0.0))
    item = record((1, 0), (3, 1), number=0)
    several = replace(item, by_reference=dict.fromkeys(item.rewards, by_reference))
    single = record((1, 0), (0, 1), number=1)
    found = summary(manifest(), [several, single])
    (shown,) = found.several_references
    assert {how: each["model"].mean for how, each in shown.accuracy.items()} == {
        "the first reference alone": 0,
        "max": 1,
        "mean": 1,
        "softmax": 1,
    }
    assert {each["model"].count for each in shown.accuracy.values()} == {1}
    assert found.results[0].accuracy["model"].mean == 0.5  # of both items, as they were aggregated
    assert summary(manifest(), [single]).several_references == ()


@settings(deadline=None)  # the first example imports
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6),
    st.integers(1, 6),
)
def test_the_best_of_n_equals_the_mean_over_all_draws(candidates: list[tuple[int, int]], draws: int) -> None:
    from itertools import permutations

    draws = min(draws, len(candidates))
    quality, rewards = zip(*candidates, strict=True)
    # Among equal rewards the first of a random order is chosen: all orders of all draws are as likely.
    chosen = [max(drawn, key=lambda i: rewards[i]) for drawn in permutations(range(len(candidates)), draws)]
    expected = np.mean([quality[i] for i in chosen]), np.mean([rewards[i] for i in chosen])
    assert best_of(quality, rewards, draws) == pytest.approx(expected)


def test_many_draws_lose_no_precision() -> None:
    quality = list(range(2000))
    assert best_of(quality, quality, 1)[0] == pytest.approx(999.5)
    assert best_of(quality, quality, 64)[0] == pytest.approx(64 * 2001 / 65 - 1)  # mean of the highest of 64
    assert best_of(quality, [-q for q in quality], 2000)[0] == 0
    with pytest.raises(ValueError, match="expected 1 to 3 draws, found 4"):
        best_of([1, 2, 3], [1, 2, 3], 4)


def test_over_optimisation_is_seen_where_quality_falls_while_reward_rises() -> None:
    # The second best reward is the best answer; the highest reward is an exploit, which larger N finds.
    rewards, quality = (4, 3, 2, 1), (0.0, 1.0, 0.5, 0.4)
    hacked = [record(quality, rewards, number=number, task="best of N") for number in range(20)]
    points = curve_of(hacked)
    assert [point.draws for point in points] == [1, 2, 4]
    assert [point.reward for point in points] == sorted(point.reward for point in points)
    assert points[0].quality.mean == pytest.approx(0.475)
    assert points[0].gain.mean == pytest.approx(0)
    assert points[2].quality.mean == 0
    assert [point.change for point in points] == [None, "worse", "worse"]
    assert [point.best for point in points] == pytest.approx([0.475, (3 * 1 + 2 * 0.5 + 0.4) / 6, 1])
    short = [record((1, 0), (1, 0), number=20, task="best of N")]
    assert [point.quality.count for point in curve_of([*hacked, *short])] == [21, 21, 20]


def test_mistakes_are_told_apart_by_length_truncation_and_reference() -> None:
    records = [
        record((1, 0), (1, 0), number=0, lengths=(30, 9), reference_quality=0.1),  # right, much longer
        record((1, 0), (1, 0), number=1, lengths=(30, 9), cut=5, reference_quality=0.9),
        record((1, 0), (0, 1), number=2, lengths=(9, 30), cut=5, reference_quality=0.5),  # wrong, much shorter
        record((0, 1), (0, 0), number=3, lengths=(9, 9)),
    ]
    found = diagnosis(records)
    assert [(each.low, each.high, each.accuracy.mean, each.accuracy.count) for each in found.by_length] == [
        (None, 0.5, 0, 1),
        (0.8, 1.25, 0.5, 1),
        (2.0, None, 1, 2),
    ]
    assert {name: each.mean for name, each in found.by_truncation.items()} == {"whole": 0.75, "cut": 0.5}
    assert [(each.mean, each.accuracy.mean) for each in found.by_reference_quality] == [(0.1, 1), (0.5, 0), (0.9, 1)]
    assert found.length_correlation == pytest.approx(1)  # the longer one has the higher reward
    against = diagnosis([record((1, 0), (1, 0), lengths=(9, 30))])
    assert against.length_correlation == pytest.approx(-1)
    alike = diagnosis([record((1, 0), (1, 0))])
    assert alike.length_correlation is None
    assert alike.by_reference_quality == ()


def test_the_calibration_error_of_bradley_terry_rewards_is_small_and_that_of_doubled_ones_is_not() -> None:
    random = np.random.default_rng(0)
    margins = random.normal(0, 2, 1500)
    won = random.random(1500) < 1 / (1 + np.exp(-margins))
    rewards = np.where(won, margins, -margins)  # of the candidate that won
    for scale, low, high in ((1, 0, 0.03), (3, 0.1, 0.3)):
        records = [record((1, 0), (scale * float(margin), 0), number=i) for i, margin in enumerate(rewards)]
        found = diagnosis(records)
        assert low <= found.calibration_error <= high
        assert sum(each.accuracy.count for each in found.by_confidence) == 1500


def test_few_numbers_stay_of_every_record() -> None:
    def held(count: int) -> int:
        """Bytes at the highest moment."""
        made = (record((1, 0), (number % 7, 3), number=number, slices=("hard",)) for number in range(count))
        tracemalloc.start()
        summary(manifest(), made)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    held(100)  # imports
    assert (held(12_000) - held(4_000)) / 8_000 < 400
