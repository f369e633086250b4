from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar.core.errors import InputError
from polar.core.records import Trajectory, Triple, text_of
from polar.corpus.pair import pair
from polar.corpus.strategies import Lineage, PairReport, candidate_negatives, read_lineages

LINEAGES = {
    "a10": Lineage("a", 10),
    "a20": Lineage("a", 20),
    "a20b": Lineage("a", 20),
    "a40": Lineage("a", 40),
    "a": Lineage("a"),
    "b10": Lineage("b", 10),
    "stray": Lineage(None, 10),
}


def corpus(prompts: int, **samples: int) -> list[Trajectory]:
    return [
        Trajectory(f"prompt {n}", policy, f"{policy} {i}", i)
        for n in range(prompts)
        for policy, number in samples.items()
        for i in range(number)
    ]


def pairs_of(triples: list[Triple]) -> set[tuple[str | None, str | None]]:
    return {(triple.policy, triple.negative_policy) for triple in triples}


@pytest.mark.parametrize(
    ("policy", "family", "checkpoint"),
    [
        ("a10", {"a20", "a20b", "a40", "a"}, {"a20", "a20b"}),
        ("a20", {"a10", "a20b", "a40", "a"}, {"a10", "a40"}),
        ("a40", {"a10", "a20", "a20b", "a"}, {"a20", "a20b"}),
        ("a", {"a10", "a20", "a20b", "a40"}, set()),
        ("b10", set(), set()),
        ("stray", set(), set()),
    ],
)
def test_whom_each_strategy_takes_the_negative_from(policy: str, family: set[str], checkpoint: set[str]) -> None:
    others = [name for name in LINEAGES if name != policy]
    assert candidate_negatives("random", policy, others, LINEAGES) == others
    assert set(candidate_negatives("family", policy, others, LINEAGES)) == family
    assert set(candidate_negatives("checkpoint", policy, others, LINEAGES)) == checkpoint


def test_a_neighbouring_checkpoint_is_sought_among_the_policies_of_the_prompt() -> None:
    triples = pair(corpus(1, a10=2, a40=2, b10=2), strategy="checkpoint", lineages=LINEAGES)
    assert pairs_of(list(triples)) == {("a10", "a40"), ("a40", "a10")}


def test_a_strict_strategy_without_a_rival_gives_no_triple_and_is_counted() -> None:
    report = PairReport()
    trajectories = [*corpus(3, a10=2, a20=1, b10=2), Trajectory("alone", "b10", "1"), Trajectory("alone", "b10", "2")]
    trajectories.append(Trajectory("alone", "a10", "3"))
    triples = list(pair(trajectories, strategy="family", lineages=LINEAGES, report=report))
    assert pairs_of(triples) == {("a10", "a20")}
    assert {triple.strategy for triple in triples} == {"family"}
    assert (report.draws, report.draws_without_rival, report.prompts_without_rival) == (3, 4, 1)


def test_mixed_takes_each_possible_strategy_equally_often() -> None:
    report = PairReport()
    trajectories = corpus(900, a10=2, a20=1, a=1, b10=1)
    triples = list(pair(trajectories, strategy="mixed", lineages=LINEAGES, balance=False, report=report))
    counts = Counter(triple.strategy for triple in triples)
    assert counts == report.strategies
    assert all(abs(counts[rule] - 300) < 75 for rule in ("random", "family", "checkpoint")), counts  # deviation 14
    assert pairs_of([t for t in triples if t.strategy == "checkpoint"]) == {("a10", "a20")}
    only_random = list(pair(corpus(20, b10=2, stray=1, a=1), strategy="mixed", lineages=LINEAGES))
    assert {triple.strategy for triple in only_random} == {"random"}


def test_family_and_step_of_the_rows_count_and_the_table_overrides_them() -> None:
    rows = [replace(t, family="f", step=int(t.policy)) for t in corpus(1, **{"1": 2, "2": 1, "3": 1})]
    assert pairs_of(list(pair(rows, strategy="checkpoint"))) == {("1", "2")}
    assert pairs_of(list(pair(rows, strategy="checkpoint", lineages={"2": Lineage(step=9)}))) == {("1", "3")}
    assert pairs_of(list(pair(rows, strategy="family", lineages={"3": Lineage("g")}))) == {("1", "2")}


@pytest.mark.parametrize(
    ("strategy", "lineages", "words"),
    [
        ("family", {}, "strategy family: expected policies with a known family, found none; give the trajectories"),
        ("mixed", {}, "strategy mixed: .* known family"),
        ("checkpoint", {"a10": Lineage("a")}, "strategy checkpoint: .* known step"),
    ],
)
def test_a_strategy_that_knows_nothing_is_refused(strategy: str, lineages: dict[str, Lineage], words: str) -> None:
    with pytest.raises(InputError, match=words):
        list(pair(corpus(1, a10=2, a20=1), strategy=strategy, lineages=lineages))  # type: ignore[arg-type]


def test_a_policy_with_two_steps_is_refused_unless_the_table_decides() -> None:
    rows = [replace(t, family="f", step=n) for n, t in enumerate(corpus(1, a=2, b=1))]
    assert len(list(pair(rows))) == 1
    with pytest.raises(InputError, match="expected one step for policy 'a', found 0 and 1; give every checkpoint"):
        list(pair(rows, strategy="family"))
    assert len(list(pair(rows, strategy="family", lineages={"a": Lineage(step=3)}))) == 1


def test_the_table_of_the_policies_is_read_and_checked(tmp_path: Path) -> None:
    table = tmp_path / "policies.jsonl"
    table.write_text('{"policy":"a","family":"f","step":3}\n{"policy":"a","family":"f"}\n{"policy":"b","step":null}\n')
    assert read_lineages(table) == {"a": Lineage("f", 3), "b": Lineage()}
    for line, words in (
        ('{"policy":"a","step":-1}', ':1: field "step": expected a whole number from 0, found the number -1'),
        ('{"family":"f"}', ':1: field "policy": expected a string'),
        ('{"policy":"a","family":"f"}\n{"policy":"a","family":"g"}', ": expected one family for policy 'a'"),
    ):
        table.write_text(line + "\n")
        with pytest.raises(InputError, match=f"policies.jsonl{words}"):
            read_lineages(table)


def uneven(prompts: int) -> list[Trajectory]:
    """Policies that are sampled twice with a chance of their own, "rare" nearly never and "never" never."""
    random = Random(5)
    chances = {"often": 0.9, "half": 0.5, "some": 0.3, "rare": 0.1, "never": 0.0}
    return [
        Trajectory(f"prompt {n}", policy, f"{policy} {i}")
        for n in range(prompts)
        for policy, chance in chances.items()
        for i in range(1 + (random.random() < chance))
    ]


def test_balance_makes_policies_positive_as_often_as_negative() -> None:
    balanced, random = PairReport(), PairReport()
    list(pair(uneven(400), report=balanced))
    list(pair(uneven(400), balance=False, report=random))
    assert random.frequency_accuracy() == pytest.approx(0.83, abs=0.06)  # the shortcut that there would be
    assert balanced.frequency_accuracy() == pytest.approx(0.5, abs=0.03)
    assert balanced.triples == random.triples
    positives, negatives = balanced.positives(), balanced.negatives()
    assert all(abs(positives[policy] - negatives[policy]) < 0.1 * positives[policy] for policy in positives)
    assert negatives["never"] == balanced.negatives_never_positive == 0
    assert random.negatives_never_positive == random.negatives()["never"] > 50


def test_a_policy_that_is_never_positive_is_a_negative_only_when_there_is_no_other() -> None:
    report = PairReport()
    trajectories = [*corpus(5, a=2, b=2, never=1), *(replace(t, prompt="last") for t in corpus(1, a=2, never=1))]
    triples = list(pair(trajectories, report=report))
    assert [(t.prompt, t.policy) for t in triples if t.negative_policy == "never"] == [("last", "a")]
    assert report.negatives_never_positive == 1


def test_per_prompt_chooses_the_policies_that_were_positive_least() -> None:
    report = PairReport()
    list(pair(corpus(300, a=2, b=2, c=2, d=1), per_prompt=1, report=report))
    assert report.positives() == {"a": 100, "b": 100, "c": 100}
    assert all(abs(count - 100) <= 2 for count in report.negatives().values()), report.negatives()


def test_the_frequency_rule_by_hand() -> None:
    report = PairReport(triples=5)
    report.meetings.update({("a", "b"): 3, ("b", "a"): 1, ("c", "c2"): 1})
    # Shares: a 3/4, b 1/4, c 1, c2 0. The rule is right for a against b (3) and c (1), wrong for b against a (1).
    assert report.frequency_accuracy() == pytest.approx(4 / 5)
    report.meetings.update({("b", "a"): 2})
    report.triples += 2  # now a and b have one half each: ties
    assert report.frequency_accuracy() == pytest.approx((6 / 2 + 1) / 7)
    assert PairReport().frequency_accuracy() is PairReport().length_accuracy() is None


def lengthy(prompts: int, **samples: int) -> list[Trajectory]:
    """Outputs of a length that is typical of their policy, so that unmatched triples are solved by length."""
    random = Random(3)
    return [
        Trajectory(f"prompt {n}", policy, f"{policy} " + "x" * int(random.lognormvariate(3 + number, 0.7)))
        for n in range(prompts)
        for number, policy in enumerate(samples)
        for _ in range(samples[policy])
    ]


@pytest.mark.parametrize("balance", [True, False])
def test_matched_length_solves_nothing_and_loses_no_triple(balance: bool) -> None:
    trajectories = lengthy(150, a=3, b=3, c=3, d=3)
    plain, matched = PairReport(), PairReport()
    list(pair(trajectories, balance=balance, report=plain))
    triples = list(pair(trajectories, balance=balance, match_length=True, report=matched))
    assert (plain.length_accuracy() or 0) > 0.7
    assert matched.length_accuracy() == pytest.approx(0.5, abs=0.01)
    assert matched.triples == plain.triples
    # Counted once more by hand, in another measure of length.
    sizes = [[len(text_of(text)) for text in (t.reference, t.positive, t.negative)] for t in triples]
    closer = sum(abs(positive - reference) < abs(negative - reference) for reference, positive, negative in sizes)
    assert closer / len(sizes) == pytest.approx(0.5, abs=0.1)


def test_matched_length_uses_reference_and_positive_in_either_order_when_there_is_one_negative() -> None:
    # From the reference of length 3 the negative is closer than the positive (6), from that of length 6 it is farther.
    trajectories = [
        Trajectory(f"prompt {n}", policy, letter * size)
        for n in range(40)
        for policy, letter, size in (("a", "x", 3), ("a", "y", 6), ("b", "z", 2))
    ]
    report = PairReport()
    triples = list(pair(trajectories, match_length=True, report=report))
    assert Counter(len(text_of(t.reference)) for t in triples) == {3: 20, 6: 20}
    assert report.length_accuracy() == 0.5


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["random", "family", "checkpoint", "mixed"]), st.booleans())
def test_the_order_of_the_rows_changes_nothing_with_any_strategy(seed: int, strategy: str, match: bool) -> None:
    rows = corpus(6, a10=3, a20=2, a40=1, a=2, b10=2, stray=2)
    shuffled = Random(seed).sample(rows, len(rows))
    options = {"strategy": strategy, "lineages": LINEAGES, "seed": seed, "match_length": match}
    assert list(pair(rows, **options)) == list(pair(shuffled, **options))  # type: ignore[arg-type]
