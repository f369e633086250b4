import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar.cli.main import main
from polar.core.errors import InputError
from polar.core.records import Message, Trajectory, prompt_id
from polar.core.text import blank
from polar.corpus import statistics as module
from polar.corpus.report import Report
from polar.corpus.statistics import Sample, Subset, read_samples, statistics
from polar.data.readers import ReadReport

TINY = [
    {"prompt": "Hi there", "policy": "b", "output": "one two", "sample": 0},
    {"prompt": "hi  there", "policy": "b", "output": "one two", "sample": 1},  # another spelling, the same prompt
    {"prompt": "Hi there", "policy": "b", "output": "one", "sample": 2},
    {"prompt": "Hi there", "policy": "a", "output": "one two", "family": "F", "step": 5, "wrapper": "pretrain"},
    {"prompt": "Why?", "policy": "a", "output": " \u200b\n", "family": "F", "step": 5, "wrapper": "pretrain"},
    {"prompt": "Why?", "policy": "a", "output": "no!", "family": "G", "step": 5},
]


def samples(rows: list[dict[str, object]]) -> list[Sample]:
    counted = ("prompt_tokens", "output_tokens", "finish_reason")
    return [
        Sample(
            Trajectory(**{name: value for name, value in row.items() if name not in counted}),  # type: ignore[arg-type]
            **{name: row[name] for name in counted if name in row},  # type: ignore[arg-type]
        )
        for row in rows
    ]


def report_on(rows: list[dict[str, object]]) -> Report:
    return statistics(samples(rows))


def corpus(prompts: int, outputs: dict[str, list[str]]) -> list[dict[str, object]]:
    return [
        {"prompt": f"prompt {number}", "policy": policy, "output": text, "sample": sample}
        for number in range(prompts)
        for policy, texts in outputs.items()
        for sample, text in enumerate(texts)
    ]


def accuracies(report: Report) -> dict[str, float]:
    return {feature.name: feature.accuracy.mean for feature in report.discrimination.features}


def test_the_overview_of_a_tiny_corpus_is_what_one_counts_by_hand() -> None:
    overview = report_on(TINY).overview
    assert (overview.trajectories, overview.prompts, overview.policies, overview.families) == (6, 2, 2, 2)
    assert (overview.cells, overview.cells_with_two_outputs, overview.prompts_with_two_policies) == (3, 2, 1)
    assert overview.samples_per_cell == ((1, 1), (2, 1), (3, 1))
    assert overview.prompts_per_policy[2] == 1.5  # policies with 1 and 2 prompts
    assert (overview.unit, overview.prompt_units, overview.output_units) == ("words", 12, 10)
    assert (overview.prompt_characters, overview.output_characters) == (8 * 3 + 9 + 4 * 2, 7 * 3 + 3 + 3 + 3)
    assert overview.finish_reasons == ()


def test_the_duplicates_of_a_tiny_corpus_are_what_one_counts_by_hand() -> None:
    duplicates = report_on(TINY).duplicates
    assert duplicates.within_policy == 1
    assert (duplicates.shared_texts, duplicates.shared_trajectories) == (1, 3)
    assert duplicates.empty == 1
    (repeated,) = duplicates.most_repeated
    assert (repeated.excerpt, repeated.characters, repeated.count) == ("one two", 7, 3)
    assert (repeated.prompts, repeated.policies) == (1, 2)


def test_the_policies_of_a_tiny_corpus_are_what_one_counts_by_hand() -> None:
    first, second = report_on(TINY).policies
    assert (first.policy, first.families, first.steps, first.wrappers) == ("a", ("F", "G"), (5,), ("pretrain", "sft"))
    assert (first.prompts, first.prompts_with_two_outputs, first.trajectories, first.distinct) == (2, 1, 3, 3)
    assert (first.duplicates, first.empty, first.median, first.output_units) == (0, 1, 3, 5)
    assert (second.policy, second.families, second.steps, second.wrappers) == ("b", (), (), ("sft",))
    assert (second.trajectories, second.distinct, second.duplicates, second.median) == (3, 2, 1, 7)
    assert second.lengths == pytest.approx((3.4, 5, 7, 7, 7))


def test_the_histogram_holds_every_output_once_in_the_right_bin() -> None:
    lengths = [0, 1, 2, 3, 4, 5, 6, 1 << 20, (1 << 20) + 1]
    report = report_on([{"prompt": "p", "policy": "a", "output": "x" * length} for length in lengths])
    histogram = {low: count for low, _, count in report.lengths.histogram if count}
    assert histogram == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 6: 1, 1 << 20: 2}
    assert report.lengths.histogram[-1][1] == (1 << 20) + 2
    assert report.lengths.quantiles[2] == 4


@pytest.mark.parametrize(
    ("tokens", "unit", "prompt_units", "output_units"),
    [
        ([(3, 10), (4, 20)], "tokens", 7, 30),
        ([(3, 10), (None, None)], "tokens and words", 3 + 2, 10 + 1),
        ([(3, None), (None, 20)], "words", 2 + 2, 1 + 1),
    ],
)
def test_tokens_are_summed_where_rows_tell_them_and_words_elsewhere(
    tokens: list[tuple[int | None, int | None]], unit: str, prompt_units: int, output_units: int
) -> None:
    trajectory = Trajectory("two words", "a", "one")
    overview = statistics([Sample(trajectory, *numbers) for numbers in tokens]).overview
    assert (overview.unit, overview.prompt_units, overview.output_units) == (unit, prompt_units, output_units)


def test_outputs_that_were_cut_are_counted_and_warned_about() -> None:
    rows = [{"prompt": "p", "policy": "a", "output": str(n), "finish_reason": "length"} for n in range(2)]
    report = report_on([*rows, {"prompt": "p", "policy": "b", "output": "x"}])
    assert report.overview.finish_reasons == (("length", 2), (None, 1))
    assert [policy.cut for policy in report.policies] == [2, 0]
    assert any("66.7% (2 of 3) of the outputs were cut" in warning for warning in report.warnings())


def test_one_sample_per_policy_is_said_first_and_plainly() -> None:
    report = report_on(corpus(3, {"a": ["x"], "b": ["y"]}))
    assert report.discrimination.triples == 0
    assert report.warnings()[0] == report.why_no_triples()
    assert report.warnings()[0].startswith(
        "No reference with a positive: each of the 2 policies has only one sample per prompt."
    )


def test_repeated_samples_are_no_positives_either() -> None:
    warning = report_on(corpus(3, {"a": ["x", "x"], "b": ["y"]})).why_no_triples()
    assert warning is not None
    assert "no policy has two different outputs for a prompt" in warning


def test_a_single_policy_gives_no_negatives() -> None:
    warning = report_on(corpus(3, {"a": ["x", "y"]})).why_no_triples()
    assert warning is not None
    assert warning.startswith("No negatives")


def test_policies_that_only_repeat_one_another_give_no_triples() -> None:
    warning = report_on(corpus(3, {"a": ["x", "y"], "b": ["x", "y"]})).why_no_triples()
    assert warning is not None
    assert "the 3 sampled prompts" in warning


def test_a_sound_corpus_has_no_warnings() -> None:
    report = report_on(corpus(12, {"a": ["x y", "z x"], "b": ["y x", "x z"]}))
    assert report.why_no_triples() is None
    assert report.warnings() == ()


def test_features_that_give_the_policy_away_are_right_in_all_triples() -> None:
    report = report_on(corpus(12, {"a": ["aa x", "aa y"], "b": ["bb xyz uvw", "bb yzx vwu"]}))
    assert report.discrimination.triples == 24
    assert accuracies(report) == {"length": 1, "first word": 1, "unigram F1": 1, "chance": 0.5}
    assert [feature.verdict for feature in report.discrimination.features] == ["better"] * 3 + ["cannot tell"]
    assert any(warning.startswith("Length alone") for warning in report.warnings())


def test_features_that_say_nothing_are_at_one_half() -> None:
    report = report_on(corpus(12, {"a": ["x a", "x b"], "b": ["x c", "x d"]}))
    assert accuracies(report) == {"length": 0.5, "first word": 0.5, "unigram F1": 0.5, "chance": 0.5}
    assert {feature.verdict for feature in report.discrimination.features} == {"cannot tell"}


def test_the_hardest_policies_are_those_that_share_words() -> None:
    twins = {"twin 1": ["x a", "x b"], "twin 2": ["x c", "x d"], "odd": ["u v", "u w"]}
    found = report_on(corpus(60, twins)).discrimination
    assert (found.policies.compared, found.pairs.compared) == (3, 3)
    assert found.pairs.hardest[0].policies == ("twin 1", "twin 2")
    assert found.pairs.hardest[0].accuracy.mean == 0.5
    assert found.policies.easiest[0].policies == ("odd",)
    listed = [contrast.policies for contrast in (*found.pairs.hardest, *found.pairs.easiest)]
    assert len(listed) == len(set(listed)) == 3


def test_a_pair_of_policies_with_few_triples_is_not_compared() -> None:
    found = report_on(corpus(9, {"a": ["x", "y"], "b": ["z", "w"]})).discrimination
    assert found.triples == 18
    assert (found.policies.compared, found.pairs.compared) == (0, 0)


ROWS = st.builds(
    Trajectory,
    prompt=st.sampled_from(["What is 2+2?", "what is  2+2?", "Why?", (Message("user", "Why?"),), "Name a colour."]),
    policy=st.sampled_from(["A", "B", "c\x00d"]),
    output=st.sampled_from(["1", "2 a", "3 b", "", "4\x00", (Message("assistant", "1"),)]),
    family=st.none() | st.sampled_from("FG"),
    step=st.none() | st.integers(0, 2),
)


@settings(max_examples=15, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_nothing(trajectories: list[Trajectory], shuffler: random.Random) -> None:
    before = statistics(map(Sample, trajectories)).to_json()
    shuffler.shuffle(trajectories)
    assert statistics(map(Sample, trajectories)).to_json() == before


@pytest.mark.parametrize(("prompts", "characters"), [(7, 10**6), (10**6, 700), (7, 700), (0, 0)])
def test_the_subset_is_a_prefix_of_the_hash_order_and_keeps_to_its_limits(
    monkeypatch: pytest.MonkeyPatch, prompts: int, characters: int
) -> None:
    monkeypatch.setattr(module, "PROMPTS", prompts)
    monkeypatch.setattr(module, "CHARACTERS", characters)
    everything = [Trajectory(f"prompt {n}", "a", "x" * (n % 7) * sample) for n in range(50) for sample in range(3)]
    kept = []
    for seed in range(3):
        random.Random(seed).shuffle(everything)
        found = Subset(seed=5)
        for trajectory in everything:
            found.add(prompt_id(trajectory.prompt), trajectory)
        kept.append({prompt: len(trajectories) for prompt, trajectories in found.prompts.items()})
        assert len(found.prompts) <= prompts
        assert found.characters <= characters
    assert kept[0] == kept[1] == kept[2]
    assert set(kept[0].values()) <= {3}  # a prompt is in it with all its trajectories or not at all
    sizes = {prompt_id(t.prompt): 0 for t in everything}
    for t in everything:
        sizes[prompt_id(t.prompt)] += len(str(t.prompt)) + len(str(t.output))
    ordered = sorted(sizes, key=lambda prompt: module._hash(5, prompt))
    expected = [
        p for i, p in enumerate(ordered, 1) if i <= prompts and sum(sizes[q] for q in ordered[:i]) <= characters
    ]
    assert set(kept[0]) == set(expected)


def test_another_seed_reads_other_examples() -> None:
    rows = samples(corpus(40, {"a": ["x"], "b": ["y"]}))
    first, second = (statistics(rows, seed=seed).examples for seed in (0, 1))
    assert {example.prompt_id for example in first} != {example.prompt_id for example in second}
    assert len(first) == module.EXAMPLES


def test_long_examples_say_what_they_leave_out() -> None:
    (example,) = report_on([{"prompt": "p", "policy": "a", "output": "x" * 5000}]).examples
    ((policy, (output,)),) = example.outputs
    assert (policy, len(output.text), output.left_out) == ("a", 4000, 1000)


def test_blank_texts_show_nothing() -> None:
    assert all(map(blank, ["", " \n\t", "\u200b", "\u200f\u3000\x00"]))
    assert not any(map(blank, ["a", " .", "\u200b字"]))


def test_no_samples_are_an_error() -> None:
    with pytest.raises(InputError, match="expected at least one trajectory, found none"):
        statistics([])


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_rows_bring_what_the_sampler_counted(tmp_path: Path) -> None:
    row = {"prompt": "p", "policy": "a", "output": "o", "prompt_tokens": 3, "output_tokens": 4, "finish_reason": "stop"}
    (sample,) = read_samples(write(tmp_path / "a.jsonl", [row]))
    assert (sample.prompt_tokens, sample.output_tokens, sample.finish_reason) == (3, 4, "stop")


@pytest.mark.parametrize("tokens", [-1, 1.5, "many", True])
def test_wrong_numbers_of_tokens_are_refused_with_their_place(tmp_path: Path, tokens: object) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "policy": "a", "output": "o", "output_tokens": tokens}])
    with pytest.raises(InputError, match=r'a\.jsonl:1: field "output_tokens": expected a whole number from 0'):
        list(read_samples(path))


def test_skipped_rows_are_counted_in_the_report(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "policy": "a", "output": "o"}, {"prompt": "p"}])
    read = ReadReport()
    report = statistics(read_samples(path, on_bad_row="skip", report=read), report=read)
    assert (report.overview.trajectories, report.overview.skipped_rows) == (1, 1)
    assert any("could not be read" in warning for warning in report.warnings())


def test_the_command_writes_the_same_two_files_for_shuffled_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = corpus(20, {"a": ["x a", "x b"], "b": ["y", "z"]})
    first = write(tmp_path / "a.jsonl", rows)
    random.Random(0).shuffle(rows)
    half, rest = write(tmp_path / "b.jsonl", rows[:30]), write(tmp_path / "c.jsonl", rows[30:])
    assert main(["corpus", "report", first, "--output", str(tmp_path / "one")]) == 0
    assert main(["corpus", "report", half, rest, "--output", str(tmp_path / "two" / "deep")]) == 0
    for name in ("report.html", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / "deep" / name).read_bytes()
    written = json.loads((tmp_path / "one" / "report.json").read_text("utf-8"))
    assert written["schema"] == "polar corpus report 1"
    assert written["overview"]["trajectories"] == 80
    assert "80 trajectories of 2 policies for 20 prompts" in capsys.readouterr().err


def test_the_command_refuses_a_file_as_its_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", TINY)
    assert main(["corpus", "report", path, "--output", path]) == 2
    assert "cannot be written" in capsys.readouterr().err
