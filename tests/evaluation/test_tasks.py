import json
from pathlib import Path
from typing import Any

import pytest

from polar import InputError
from polar.core.records import text_of
from polar.data.readers import ReadReport
from polar.data.writers import record_to_dict
from polar.evaluation.datasets import read_items
from polar.evaluation.records import Item, sample, stretches
from polar.evaluation.suites import Dataset, ReferenceSource
from tests.evaluation.evaluating import triples, write_rows

REFERENCE = {"reference": "It is 4."}


def items(tmp_path: Path, rows: list[dict[str, Any]], report: ReadReport | None = None, **settings: Any) -> list[Item]:
    path = write_rows(tmp_path / "data.jsonl", rows)
    dataset = Dataset(**{"name": "data", "path": path, "task": "preference accuracy", **settings})
    return list(read_items(dataset, "error", ReadReport() if report is None else report))


@pytest.mark.parametrize(
    ("row", "candidates", "quality"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, ["4", "5"], [1, 0]),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5", "output": "another"}, ["4", "5"], [1, 0]),
        ({"prompt": "2+2?", "ranked": ["4", "4.1", "5"]}, ["4", "4.1", "5"], [2, 1, 0]),
        ({"prompt": "2+2?", "candidates": ["5", "4"], "quality": [False, True]}, ["5", "4"], [0, 1]),
        (
            {"prompt": "2+2?", "chosen": ["4", "four"], "rejected": ["5"], "subset": "Ties"},
            ["4", "four", "5"],
            [1, 1, 0],
        ),
        (
            {"question": "2+2?", "response_A": "5", "response_B": "4", "label": "B>A", "source": "math"},
            ["5", "4"],
            [0, 1],
        ),
        (
            {"prompt": "2+2?", "response_1": "5", "response_2": "4", "response_3": "6", "scores": [0, 1, 0]},
            ["5", "4", "6"],
            [0, 1, 0],
        ),
        ({"prompt": "2+2?", "response_1": "5", "response_2": "4", "winner": "model_b"}, ["5", "4"], [0, 1]),
        (
            {
                "conversation_input": [{"role": "user", "content": "2+2?"}],
                "bon_best": {"answer": "4", "llm_name": "A"},
                "loser_list": [{"answer": "5", "llm_name": "B"}, {"answer": "6", "llm_name": "C"}],
                "bon_uid": "7",
            },
            ["4", "5", "6"],
            [1, 0, 0],
        ),
        (
            {
                "conversation_input": [{"role": "user", "content": "2+2?"}],
                "chosen": {"answer": "4", "llm_name": "A", "score": 4.5},
                "reject": {"answer": "5", "llm_name": "B", "score": 2.5},
            },
            ["4", "5"],
            [1, 0],
        ),
        (
            {"prompt": "2+2?", "completions": [{"text": "5", "score": 1.5}, {"text": "4", "score": 8}]},
            ["5", "4"],
            [1.5, 8],
        ),
        (
            {"context": "2+2?", "completions": [{"completion": "4", "rank": 0}, {"completion": "5", "rank": 1}]},
            ["4", "5"],
            [0, -1],
        ),
        (
            {
                "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4",
                "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5",
            },
            ["4", "5"],
            [1, 0],
        ),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, dict) else "",
)
def test_every_layout_becomes_candidates_with_their_quality(
    tmp_path: Path, row: dict[str, Any], candidates: list[str], quality: list[float]
) -> None:
    (item,) = items(tmp_path, [{**row, **REFERENCE}])
    assert list(map(text_of, item.group.candidates)) == candidates
    assert list(item.quality) == quality
    assert text_of(item.group.prompt) == "2+2?"
    assert text_of(item.group.reference) == "It is 4."


def test_labels_of_a_layout_are_kept(tmp_path: Path) -> None:
    row = {
        "conversation_input": [{"role": "user", "content": "2+2?"}],
        "bon_best": {"answer": "4", "llm_name": "A"},
        "loser_list": [{"answer": "5", "llm_name": "B"}],
        "bon_uid": "7",
        "category_path": "BoN_set/Math",
        **REFERENCE,
    }
    (item,) = items(tmp_path, [row])
    assert (item.policies, item.group.id, item.domain) == (("A", "B"), "7", "BoN_set/Math")


def test_columns_where_and_slices_look_into_objects_lists_and_json_text(tmp_path: Path) -> None:
    meta = {"models": ["judge", "A", "B"], "level": "hard", "split": "test"}
    rows = [
        {"prompt": "p", "chosen": "4", "rejected": "5", **REFERENCE, "meta": json.dumps(meta)},
        {"prompt": "q", "chosen": "4", "rejected": "5", **REFERENCE, "meta": json.dumps({**meta, "split": "train"})},
    ]
    (item,) = items(
        tmp_path,
        rows,
        columns={"policies": ["meta.models.1", "meta.models.2"], "reference_policy": "meta.models.0"},
        where={"meta.split": ["test", "dev"]},
        slices=("meta.level", "meta.nothing"),
    )
    assert (item.policies, item.reference_policy, item.slices) == (("A", "B"), "judge", ("hard",))


def test_consecutive_outputs_of_one_prompt_are_one_item(tmp_path: Path) -> None:
    rows = [
        {"prompt": prompt, "output": f"{prompt}{n}", "policy": f"P{n}", "quality": n == 1, **REFERENCE}
        for prompt in "ab"
        for n in range(3)
    ]
    first, second = items(tmp_path, rows, task="best of N")
    assert (first.quality, first.policies) == ((0, 1, 0), ("P0", "P1", "P2"))
    assert list(map(text_of, second.group.candidates)) == ["b0", "b1", "b2"]


def test_references_come_from_a_column_a_file_or_by_name_from_the_answer(tmp_path: Path) -> None:
    rows = [{"id": 7, "prompt": "2 + 2?", "chosen": "4", "rejected": "5", "gold": "four"}]
    references = write_rows(tmp_path / "refs.jsonl", [{"id": "7", "prompt": "2  +  2?", "reference": "from the file"}])
    for source, reference, words in [
        ({"column": "gold"}, "four", 'column "gold"'),
        ({"file": references, "generator": "gpt-4o"}, "from the file", "generated by gpt-4o"),
        ({"file": references, "by": "id"}, "from the file", "refs.jsonl"),
        ({"chosen_as_reference": True}, "4", "gives the answer away"),
    ]:
        (item,) = items(tmp_path, rows, reference=ReferenceSource(**source))
        assert text_of(item.group.reference) == reference
        assert words in item.reference_source


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({}, 'data.jsonl:1: expected a reference in column "reference"'),
        ({"column": "chosen"}, "ask for chosen_as_reference by its name"),
        ({"file": "refs.jsonl"}, "expected a reference for its prompt in .*refs.jsonl, found none"),
    ],
)
def test_an_answer_is_never_taken_for_the_reference(tmp_path: Path, source: dict[str, Any], words: str) -> None:
    write_rows(tmp_path / "refs.jsonl", [{"prompt": "another", "reference": "x"}])
    if "file" in source:
        source = {"file": str(tmp_path / "refs.jsonl")}
    with pytest.raises(InputError, match=words):
        items(tmp_path, [{"prompt": "p", "chosen": "4", "rejected": "5"}], reference=ReferenceSource(**source))


def test_ties_and_bad_rows_are_counted_and_not_lost_silently(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "candidates": ["a", "b"], "quality": [1, 1], **REFERENCE},
        {"prompt": "p", "candidates": ["a", "b"], "quality": [1, 0], **REFERENCE},
    ]
    report = ReadReport()
    assert len(items(tmp_path, rows, report)) == 1
    assert (report.read, report.skipped) == (1, 1)
    assert "a tie" in report.first_reasons[0]
    assert len(items(tmp_path, rows, task="best of N")) == 2  # there a tie is a fact about the candidates
    bad = [*rows, {"prompt": "p", "candidates": ["a", "b"], "quality": [1], **REFERENCE}]
    with pytest.raises(InputError, match=r'data.jsonl:3: field "quality": expected one number for each of 2'):
        items(tmp_path, bad)
    report = ReadReport()
    assert len(items(tmp_path, bad, report, on_bad_row="skip")) == 1
    assert report.skipped == 2
    with pytest.raises(InputError, match="expected rows to use, found none"):
        items(tmp_path, rows[:1])
    with pytest.raises(InputError, match="found none; the first reason: no row has the values"):
        items(tmp_path, rows, where={"split": "test"})


def test_families_and_what_was_seen_in_training_become_slices(tmp_path: Path) -> None:
    made = [record_to_dict(triple) for triple in triples(3, 1)]
    for row, negative in zip(made, ("B", "C", "D"), strict=True):
        row["negative_policy"] = negative
    families = write_rows(
        tmp_path / "families.jsonl",
        [{"policy": p, "family": f} for p, f in [("A", "llama"), ("B", "llama"), ("C", "qwen")]],
    )
    seen = write_rows(tmp_path / "seen.jsonl", [{"prompt": "what?  1", "policy": "A", "negative_policy": "C"}])
    found = items(tmp_path, made, task="policy discrimination", seen=(seen,), families=families)
    assert [item.slices for item in found] == [
        ("same family", "family llama", "unseen prompts", "some unseen"),
        ("other family", "family llama", "seen prompts", "seen policies"),
        ("family llama", "unseen prompts", "some unseen"),
    ]
    assert found[1].families == ("llama", "qwen")
    assert (found[0].quality, found[0].policies, found[0].reference_policy) == ((1, 0), ("A", "B"), "A")


def test_a_limit_draws_the_same_items_from_the_whole_input_in_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "chosen": "4", "rejected": "5", **REFERENCE} for n in range(100)]
    everything = items(tmp_path, rows)
    drawn = list(sample(everything, 10))
    places = [everything.index(item) for item in drawn]
    assert places == sorted(places)
    assert len(set(places)) == 10
    assert places[-1] >= 50  # not just the beginning of the file
    assert list(sample(iter(everything), 10)) == drawn
    assert [item in drawn for item in sample(everything[::-1], 10)] == [True] * 10


def test_stretches_hold_all_items_in_order_and_are_bounded_by_their_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{n}", "chosen": "4" * n, "rejected": "5", **REFERENCE} for n in range(1, 60)]
    everything = items(tmp_path, rows)
    monkeypatch.setattr("polar.evaluation.records.SHARD_ITEMS", 7)
    monkeypatch.setattr("polar.evaluation.records.SHARD_CHARACTERS", 200)
    cut = list(stretches(everything))
    assert [item for stretch in cut for item in stretch] == everything
    assert max(map(len, cut)) == 7
    assert all(sum(item.characters for item in stretch[:-1]) < 200 for stretch in cut)
