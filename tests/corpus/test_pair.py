import random
from collections import Counter
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar.core.errors import InputError
from polar.core.records import Message, Text, Trajectory, Triple, prompt_id, text_of
from polar.corpus.pair import pair
from polar.corpus.strategies import PairReport

settings.register_profile("sorting", max_examples=15, deadline=None)  # every example opens a database
SORTING = settings.get_profile("sorting")

SAMPLES = st.builds(
    Trajectory,
    prompt=st.sampled_from(["What is 2+2?", "what is  2+2?", "Why?", (Message("user", "Why?"),), "Name a colour."]),
    policy=st.sampled_from("ABCD"),
    output=st.sampled_from(["1", "2", "3", "4", "5", (Message("assistant", "1"),)]),
    sample=st.integers(0, 3),
    wrapper=st.sampled_from(["sft", "sft", "pretrain"]),
)
CORPORA = st.lists(SAMPLES, max_size=40)
OPTIONS = st.fixed_dictionaries({"balance": st.booleans(), "match_length": st.booleans()})
Place = tuple[str, str]
"""A prompt id and a wrapper: what trajectories share that may meet in a triple."""


def samples(prompt: Text, **outputs: list[str]) -> list[Trajectory]:
    return [
        Trajectory(prompt, policy, output, number)
        for policy, texts in outputs.items()
        for number, output in enumerate(texts)
    ]


def place_of(record: Trajectory | Triple) -> Place:
    return prompt_id(record.prompt), record.wrapper


def texts_by_policy(trajectories: list[Trajectory]) -> dict[Place, dict[str, set[str]]]:
    """Place, policy, distinct texts."""
    prompts: dict[Place, dict[str, set[str]]] = {}
    for trajectory in trajectories:
        outputs = prompts.setdefault(place_of(trajectory), {})
        outputs.setdefault(trajectory.policy, set()).add(text_of(trajectory.output))
    return prompts


def can_reward(policy: str, outputs: dict[str, set[str]]) -> bool:
    """By brute force: can this policy give a reference and a positive that some other policy's text differs from?"""
    other_texts = set().union(*(texts for name, texts in outputs.items() if name != policy))
    own = outputs[policy]
    return any(other_texts - {first, second} for first in own for second in own if first != second)


def draws_of(triples: list[Triple]) -> list[list[Triple]]:
    """Consecutive triples with the same prompt, policy, reference and positive."""
    keys = lambda t: (place_of(t), t.policy, text_of(t.reference), text_of(t.positive))  # noqa: E731
    return [list(group) for _, group in groupby(triples, key=keys)]


@settings(SORTING)
@given(CORPORA, st.integers(1, 6), st.none() | st.integers(1, 3), st.integers(0, 5), OPTIONS)
def test_every_triple_obeys_the_rules(
    trajectories: list[Trajectory], negatives: int, per_prompt: int | None, seed: int, options: dict[str, Any]
) -> None:
    triples = list(pair(trajectories, negatives=negatives, per_prompt=per_prompt, seed=seed, **options))
    prompts = texts_by_policy(trajectories)
    for triple in triples:
        outputs = prompts[place_of(triple)]
        reference, positive, negative = map(text_of, (triple.reference, triple.positive, triple.negative))
        assert triple.policy is not None
        assert triple.negative_policy is not None
        assert triple.policy != triple.negative_policy
        assert {reference, positive} <= outputs[triple.policy]
        assert negative in outputs[triple.negative_policy]
        assert len({reference, positive, negative}) == 3
    drawn = draws_of(triples)
    for draw in drawn:
        assert len(draw) <= negatives
        assert len({text_of(triple.negative) for triple in draw}) == len(draw)
    # One draw for every policy that can give one, up to the limit.
    per_policy = Counter((place_of(draw[0]), draw[0].policy) for draw in drawn)
    assert set(per_policy.values()) <= {1}
    drawn_prompts = Counter(prompt for prompt, _ in per_policy)
    for prompt, outputs in prompts.items():
        able = sum(can_reward(policy, outputs) for policy in outputs)
        assert drawn_prompts[prompt] == (able if per_prompt is None else min(able, per_prompt))


@settings(SORTING)
@given(CORPORA, st.integers(1, 3), st.randoms(use_true_random=False), OPTIONS)
def test_the_order_of_the_input_changes_nothing(
    trajectories: list[Trajectory], negatives: int, shuffle: random.Random, options: dict[str, Any]
) -> None:
    shuffled = shuffle.sample(trajectories, len(trajectories))
    triples = list(pair(trajectories, negatives=negatives, seed=7, **options))
    assert triples == list(pair(shuffled, negatives=negatives, seed=7, **options))


@settings(SORTING)
@given(CORPORA, CORPORA)
def test_without_balance_other_prompts_change_nothing(trajectories: list[Trajectory], more: list[Trajectory]) -> None:
    mine = {prompt_id(trajectory.prompt) for trajectory in trajectories}
    others = [trajectory for trajectory in more if prompt_id(trajectory.prompt) not in mine]
    alone = list(pair(trajectories, balance=False))
    among = [triple for triple in pair([*others, *trajectories], balance=False) if prompt_id(triple.prompt) in mine]
    assert alone == among


@settings(SORTING)
@given(CORPORA, st.integers(1, 3), st.none() | st.integers(1, 2))
def test_the_report_adds_up(trajectories: list[Trajectory], negatives: int, per_prompt: int | None) -> None:
    report = PairReport()
    triples = list(
        pair(trajectories, negatives=negatives, per_prompt=per_prompt, exclude_policies="^D$", report=report)
    )
    prompts = texts_by_policy([trajectory for trajectory in trajectories if trajectory.policy != "D"])
    distinct = sum(len(texts) for outputs in prompts.values() for texts in outputs.values())
    assert report.trajectories == len(trajectories)
    assert report.left_out == sum(trajectory.policy == "D" for trajectory in trajectories)
    assert report.trajectories - report.left_out - report.identical == distinct
    assert report.policies == len({policy for outputs in prompts.values() for policy in outputs})
    assert report.prompts == len(prompts)
    with_triples = len({place_of(triple) for triple in triples})
    without = report.prompts_with_one_policy + report.prompts_without_two_outputs + report.prompts_without_negative
    assert report.prompts == with_triples + without
    assert report.triples == len(triples)
    assert report.draws == len(draws_of(triples))


def test_the_reasons_for_no_triple() -> None:
    report = PairReport()
    trajectories = [
        *samples("one policy", A=["1", "2"]),
        *samples("no two outputs", A=["1", "1"], B=["2"]),
        *samples("no negative", A=["1", "2"], B=["1"]),
    ]
    assert list(pair(trajectories, report=report)) == []
    assert report == PairReport(
        trajectories=8,
        identical=1,
        policies=2,
        policies_with_two_outputs=1,
        prompts=3,
        prompts_with_one_policy=1,
        prompts_without_two_outputs=1,
        prompts_without_negative=1,
        draws_without_negative=1,
    )


def test_negatives_come_from_different_policies_first() -> None:
    corpus = samples("p", A=["a1", "a2"], B=["b1", "b2", "b3"], C=["c1"], D=["d1", "d2"])
    for seed in range(10):
        triples = pair(corpus, negatives=3, seed=seed, balance=False)
        policies = [triple.negative_policy for triple in triples if triple.policy == "A"]
        assert sorted(policies, key=str) == ["B", "C", "D"]
    more = [triple.negative_policy for triple in pair(corpus, negatives=5, balance=False) if triple.policy == "A"]
    assert sorted(more[:3], key=str) == ["B", "C", "D"]
    assert sorted(more[3:], key=str) == ["B", "D"]
    everything = [triple.negative for triple in pair(corpus, negatives=99) if triple.policy == "A"]
    assert sorted(map(text_of, everything)) == ["b1", "b2", "b3", "c1", "d1", "d2"]


def test_policies_are_drawn_uniformly_whatever_their_number_of_samples() -> None:
    corpus = [
        trajectory
        for number in range(1500)
        for trajectory in samples(
            f"prompt {number}", A=["a1", "a2"], B=[f"b{i}" for i in range(20)], C=["c1", "c2", "c3"]
        )
    ]
    pairs = Counter((triple.policy, triple.negative_policy) for triple in pair(corpus, per_prompt=1, balance=False))
    assert len(pairs) == 6
    # 250 expected for each of the six ordered pairs, with a standard deviation of about 14.
    assert all(abs(count - 250) < 70 for count in pairs.values()), pairs


def test_samples_are_drawn_uniformly() -> None:
    corpus = [t for n in range(1200) for t in samples(f"prompt {n}", A=["1", "1", "1", "2", "3"], B=["b1", "b2"])]
    drawn = Counter(t.reference for t in pair(corpus) if t.policy == "A")
    assert all(abs(drawn[text] - 400) < 85 for text in "123"), drawn  # standard deviation 16
    negatives = Counter(t.negative for t in pair(corpus) if t.policy == "A")
    assert abs(negatives["b1"] - 600) < 90  # standard deviation 17


def test_the_seed_matters() -> None:
    corpus = [t for n in range(20) for t in samples(f"prompt {n}", A=list("123"), B=list("456"), C=list("789"))]
    assert list(pair(corpus, seed=0)) != list(pair(corpus, seed=1))


def test_choosing_policies_and_prompts() -> None:
    corpus = [t for n in range(3) for t in samples(f"prompt {n}", A=["1", "2"], B=["3", "4"], C=["5", "6"])]
    report = PairReport()
    wanted = {prompt_id("Prompt  0"), prompt_id("prompt 9")}
    triples = list(pair(corpus, policies={"A", "B", "Z"}, prompt_ids=wanted, exclude_policies="B", report=report))
    assert triples == []
    assert (report.left_out, report.unknown_policies, report.unknown_prompts) == (16, 1, 1)
    triples = list(pair(corpus, policies={"A", "B"}, prompt_ids=wanted))
    assert {(t.prompt, t.policy, t.negative_policy) for t in triples} == {
        ("prompt 0", "A", "B"),
        ("prompt 0", "B", "A"),
    }


def test_the_messages_are_kept_and_the_wrapper_overrides() -> None:
    prompt = (Message("system", "Be kind."), Message("user", "Hello"))
    answer = (Message("assistant", "Hi"),)
    corpus = [Trajectory(prompt, "A", answer), Trajectory(prompt, "A", "Hey"), Trajectory(prompt, "B", "No")]
    (triple,) = pair(corpus, wrapper="pretrain")
    assert triple.prompt == prompt
    assert {triple.reference, triple.positive} == {answer, "Hey"}
    assert (triple.negative, triple.wrapper) == ("No", "pretrain")


def test_trajectories_of_different_wrappers_never_share_a_triple() -> None:
    sft = samples("p", A=["1", "2"], B=["3"])
    pretrain = [replace(t, wrapper="pretrain") for t in samples("p", A=["4"], C=["5", "6"])]
    triples = list(pair([*sft, *pretrain]))
    assert [(t.wrapper, t.policy, t.negative) for t in triples] == [("pretrain", "C", "4"), ("sft", "A", "3")]
    assert {t.wrapper for t in pair([*sft, *pretrain], wrapper="sft")} == {"sft"}
    assert len(list(pair([*sft, *pretrain], wrapper="sft"))) == 2  # A has 1, 2 and 4 now


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"negatives": 0}, "negatives must be at least 1, found 0"),
        ({"per_prompt": 0}, "per_prompt must be at least 1, found 0"),
        ({"exclude_policies": "("}, "exclude_policies '\\('"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        pair(iter([]), **arguments)  # type: ignore[arg-type]
