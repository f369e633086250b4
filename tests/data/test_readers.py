import gc
import gzip
import io
import json
import logging
import subprocess
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polar.core.errors import InputError
from polar.core.records import Comparison, Group, Message, Preference, Trajectory, Triple
from polar.data import sources
from polar.data.readers import (
    ReadReport,
    read_comparisons,
    read_groups,
    read_groups_by_reference,
    read_preferences,
    read_trajectories,
    read_triples,
    rows,
)

COMPARISON = {"prompt": "p", "reference": "r", "output": "o"}
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "g"), ("assistant", "b"))
)
PROMPT, BEST, WORST = (Message("user", "q"),), (Message("assistant", "g"),), (Message("assistant", "b"),)


def save(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def message_of(iterator):
    with pytest.raises(InputError) as caught:
        list(iterator)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# Our own formats


def test_comparisons_and_groups(tmp_path):
    data = save(
        tmp_path / "a.jsonl",
        {**COMPARISON, "id": 7, "wrapper": "pretrain", "polar_7b": -3.1},
        {**COMPARISON, "prompt": [USER], "reference": "", "output": [GOOD, BAD], "id": None, "wrapper": None},
    )
    assert list(read_comparisons(data)) == [
        Comparison("p", "r", "o", 7, "pretrain"),
        Comparison(PROMPT, "", BEST + WORST),
    ]
    save(tmp_path / "b.jsonl", COMPARISON, {"prompt": "p", "reference": "r", "candidates": ["", [GOOD]], "id": "x"})
    report = ReadReport()
    assert list(read_groups(tmp_path / "b.jsonl", report=report)) == [
        Group("p", "r", ("o",)),
        Group("p", "r", ("", BEST), "x"),
    ]
    assert report == ReadReport(read=2, format="comparison; group")


def test_reference_column_of_comparisons(tmp_path):
    data = save(tmp_path / "a.jsonl", {"prompt": "p", "gold": "r", "output": "o", "reference": "not this one"})
    assert list(read_comparisons(data, reference_column="gold")) == [Comparison("p", "r", "o")]
    assert list(read_groups(data, reference_column="gold")) == [Group("p", "r", ("o",))]


def test_triples_and_trajectories(tmp_path):
    triple = {"prompt": "p", "reference": "r", "positive": "+", "negative": "-"}
    data = save(tmp_path / "t.jsonl", triple, {**triple, "policy": "A", "negative_policy": "B", "wrapper": "pretrain"})
    assert list(read_triples(data)) == [Triple("p", "r", "+", "-"), Triple("p", "r", "+", "-", "A", "B", "pretrain")]
    trajectory = {"prompt": [USER], "policy": "A", "output": "o"}
    data = save(
        tmp_path / "s.jsonl",
        trajectory,
        {**trajectory, "sample": 3, "decoding": {"top_p": 0.9}, "meta": '{"ignored": 1}'},
        {**trajectory, "meta": '{"temperature": 1.0}'},
        {**trajectory, "meta": "[1]"},
    )
    assert list(read_trajectories(data)) == [
        Trajectory(PROMPT, "A", "o"),
        Trajectory(PROMPT, "A", "o", 3, {"top_p": 0.9}),
        Trajectory(PROMPT, "A", "o", 0, {"temperature": 1.0}),
        Trajectory(PROMPT, "A", "o"),
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", ""),
        (json.dumps([USER]), PROMPT),
        ("[]", "[]"),
        ("[1, 2]", "[1, 2]"),
        ('[{"role": "user"}]', '[{"role": "user"}]'),
        ('[{"role": "user", "content": "q"}] and more', '[{"role": "user", "content": "q"}] and more'),
        ("[" * 100_000, "[" * 100_000),
        ([{"role": "user", "content": [{"type": "text", "text": "q"}], "name": None}], PROMPT),
        (
            [{"role": "u", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            (Message("u", "ab"),),
        ),
    ],
)
def test_text_values(tmp_path, value, expected):
    data = save(tmp_path / "a.jsonl", {**COMPARISON, "prompt": value})
    assert next(read_comparisons(data)).prompt == expected


# Foreign preference data: row, reference column, format, preferences

HH = "\n\nHuman: q\n\nAssistant:"
ARENA = {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 0, "gold": "r"}
TWO_TURNS = {"prompt": '["q", "w"]', "response_a": '["x", "y"]', "response_b": '["x", "z"]'}
FOREIGN = {
    "POLAR pairs": (
        {"prompt": "p", "reference": "r", "chosen": "g", "rejected": [BAD], "margin": 2, "domain": "math"},
        None,
        [Preference("p", "r", ("g", WORST), 2.0, "math")],
    ),
    "ranked list": (
        {"prompt": "p", "reference": "r", "ranked": ["a", "b", "c"], "wrapper": "pretrain", "chosen": None},
        None,
        [Preference("p", "r", ("a", "b", "c"), wrapper="pretrain")],
    ),
    "TRL explicit prompt": (
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "gold": "r", "margin": 0.5},
        "gold",
        [Preference(PROMPT, "r", (BEST, WORST), 0.5)],
    ),
    "TRL explicit prompt, repeated in the answers": (
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "gold": "r"},
        "gold",
        [Preference(PROMPT, "r", (BEST, WORST))],
    ),
    "TRL implicit prompt": (
        {"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD], "gold": "r"},
        "gold",
        [Preference(PROMPT + WORST + PROMPT, "r", (BEST, WORST))],
    ),
    "NeMo-RL": (
        {
            "context": [USER],
            "completions": [{"rank": 2, "completion": [BAD]}, {"rank": 0, "completion": [GOOD]}],
            "reference": "r",
        },
        None,
        [Preference(PROMPT, "r", (BEST, WORST))],
    ),
    "RewardBench": (
        {"prompt": "p", "chosen": "g", "rejected": "b", "subset": "donotanswer", "id": 3, "gold": "r"},
        "gold",
        [Preference("p", "r", ("g", "b"), domain="donotanswer")],
    ),
    "RewardBench 2": (
        {"prompt": "p", "chosen": ["g", "h"], "rejected": ["b", "c"], "subset": "Ties", "gold": "r"},
        "gold",
        [Preference("p", "r", pair, domain="Ties") for pair in (("g", "b"), ("g", "c"), ("h", "b"), ("h", "c"))],
    ),
    "HH-RLHF transcripts": (
        {"chosen": f"{HH} x\n\nHuman: \n\nAssistant: g", "rejected": f"{HH} x\n\nHuman: \n\nAssistant:", "gold": "r"},
        "gold",
        [
            Preference(
                (*PROMPT, Message("assistant", "x"), Message("user", "")), "r", (BEST, (Message("assistant", ""),))
            )
        ],
    ),
    "arena pairs": (
        {"prompt": "q", "response_a": "b", "response_b": "g", **ARENA, "winner_model_b": 1},
        "gold",
        [Preference(PROMPT, "r", (BEST, WORST))],
    ),
    "scored answers": (
        {
            "prompt": "p",
            "completions": [{"text": "c", "score": 1}, {"response": "a", "score": 4.5}, {"text": "b", "score": 1}],
            "reference": "r",
        },
        None,
        [Preference("p", "r", ("a", "c"), 3.5), Preference("p", "r", ("a", "b"), 3.5)],
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_preference_formats(tmp_path, caplog, name):
    row, reference_column, expected = FOREIGN[name]
    data, report = save(tmp_path / "a.jsonl", row, row), ReadReport()
    with caplog.at_level(logging.INFO):
        assert list(read_preferences(data, reference_column=reference_column, report=report)) == expected * 2
    assert report == ReadReport(read=2, format=name)
    assert caplog.text.count(f"format: {name}") == 1
    if reference_column is not None:
        message = message_of(read_preferences(data))
        assert message.startswith(
            f'{data}:1: field "reference": expected a string or a list of messages, found no such'
        )
        assert message.endswith(
            "; POLAR scores against a reference: name the column that holds it with reference_column"
        )


def test_arena_dialogues_of_several_turns(tmp_path):
    data = save(tmp_path / "a.jsonl", {**TWO_TURNS, **ARENA, "winner_model_a": True})
    shared = (*PROMPT, Message("assistant", "x"), Message("user", "w"))
    expected = Preference(shared, "r", ((Message("assistant", "y"),), (Message("assistant", "z"),)))
    assert list(read_preferences(data, reference_column="gold")) == [expected]


def test_shared_ranks_become_pairs(tmp_path):
    completions = [{"rank": rank, "completion": text} for rank, text in ((1, "b"), (0, "a"), (1, "c"))]
    data = save(tmp_path / "a.jsonl", {"context": "p", "completions": completions, "reference": "r"})
    assert [record.ranked for record in read_preferences(data)] == [("a", "b"), ("a", "c")]


@pytest.mark.parametrize("column", ["chosen", "rejected", "ranked", "completions"])
def test_no_answer_becomes_the_reference(tmp_path, column):
    row = {"prompt": "p", "reference": "r", "chosen": "g", "rejected": "b"}
    message = message_of(read_preferences(save(tmp_path / "a.jsonl", row), reference_column=column))
    assert f'field "{column}": expected reference_column to name an independent reference' in message


def test_ties_are_skipped_and_counted_even_under_error(tmp_path, caplog):
    tie = {"prompt": "q", "response_a": "a", "response_b": "b", **ARENA, "winner_tie": 1}
    same = {"prompt": "q", "completions": [{"text": "a", "score": 1}, {"text": "b", "score": 1}], "gold": "r"}
    win = {**tie, "winner_tie": 0, "winner_model_a": 1}
    data, report = save(tmp_path / "a.jsonl", tie, win, same), ReadReport()
    assert len(list(read_preferences(data, reference_column="gold", report=report))) == 1
    reasons = [f"{data}:{number}: a tie: all answers have the same quality" for number in (1, 3)]
    assert report == ReadReport(1, 2, "arena pairs", reasons)
    assert all(reason in caplog.text for reason in reasons)
    save(data, tie)
    assert "expected rows to use, found none: all were skipped" in message_of(
        read_preferences(data, reference_column="gold")
    )


# Every mistake has one line that names file, row and field

PAIR = {"prompt": "p", "reference": "r", "chosen": "g", "rejected": "b"}
GRADED = {"prompt": "p", "reference": "r"}
DUEL = {"prompt": "q", "reference": "r", "response_a": "a", "response_b": "b", **ARENA}
TEXT = "expected a string or a list of messages"
TURNS = "expected turns of Human and Assistant in alternation, Assistant last"
MISTAKES = [
    (read_comparisons, {**COMPARISON, "reference": None}, f'field "reference": {TEXT}, found null'),
    (read_comparisons, {"prompt": "p", "reference": "r"}, f'field "output": {TEXT}, found no such field; this row has'),
    (read_comparisons, {**COMPARISON, "output": 72}, f'field "output": {TEXT}, found the number 72'),
    (read_comparisons, {**COMPARISON, "output": True}, f'field "output": {TEXT}, found true'),
    (read_comparisons, {**COMPARISON, "prompt": []}, f'field "prompt": {TEXT}, found an empty list'),
    (read_comparisons, {**COMPARISON, "prompt": USER}, f'field "prompt": {TEXT}, found an object'),
    (read_comparisons, {**COMPARISON, "prompt": ["x"]}, 'field "prompt[0]": expected a message with role and content'),
    (
        read_comparisons,
        {**COMPARISON, "prompt": [USER, {"role": "user", "content": None}]},
        'field "prompt[1].content": expected a string, found null',
    ),
    (
        read_comparisons,
        {**COMPARISON, "prompt": json.dumps([{"role": 1, "content": "c"}])},
        'field "prompt[0].role": expected a string, found the number 1',
    ),
    (
        read_comparisons,
        {**COMPARISON, "prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        'field "prompt[0].content[0].type": expected "text" (only text can be scored), found the string "image"',
    ),
    (
        read_comparisons,
        {**COMPARISON, "prompt": [{"role": "user", "content": ["x"]}]},
        'field "prompt[0].content[0]": expected a part of type "text", found the string "x"',
    ),
    (
        read_comparisons,
        {**COMPARISON, "output": [{**GOOD, "tool_calls": [{"id": 1}]}]},
        'field "output[0].tool_calls": expected the whole text of the message in its content, found tool calls',
    ),
    (
        read_comparisons,
        {**COMPARISON, "output": "ab\ud800"},
        'field "output": expected valid Unicode, found a lone surrogate at character 3',
    ),
    (
        read_comparisons,
        {**COMPARISON, "wrapper": "chat"},
        'field "wrapper": expected "sft" or "pretrain", found the string "chat"',
    ),
    (
        read_comparisons,
        {**COMPARISON, "id": 1.5},
        'field "id": expected a string or a whole number, found the number 1.5',
    ),
    (read_groups, {**GRADED, "candidates": []}, 'field "candidates": expected a list of texts, 1 or more, found 0'),
    (read_groups, {**GRADED, "candidates": "c"}, 'field "candidates": expected a list of texts, found the string "c"'),
    (read_groups, {**GRADED, "candidates": ["c", None]}, f'field "candidates[1]": {TEXT}, found null'),
    (read_triples, {**GRADED, "positive": "+"}, f'field "negative": {TEXT}, found no such field'),
    (
        read_triples,
        {**GRADED, "positive": "+", "negative": "-", "policy": 4},
        'field "policy": expected a string, found the number 4',
    ),
    (read_trajectories, {"prompt": "p", "output": "o"}, 'field "policy": expected a string, found no such field'),
    (
        read_trajectories,
        {"prompt": "p", "output": "o", "policy": "A", "sample": -1},
        'field "sample": expected a whole number from 0, found the number -1',
    ),
    (
        read_trajectories,
        {"prompt": "p", "output": "o", "policy": "A", "decoding": "greedy"},
        'field "decoding": expected an object, found the string "greedy"',
    ),
    (
        read_preferences,
        {**PAIR, "margin": float("nan")},
        'field "margin": expected a finite number, found the number nan',
    ),
    (read_preferences, {**PAIR, "margin": 10**400}, 'field "margin": expected a finite number, found the number 1000'),
    (
        read_preferences,
        {**PAIR, "margin": -1},
        'field "margin": expected 0 or more (chosen is the better answer), found -1',
    ),
    (read_preferences, {**PAIR, "margin": "2"}, 'field "margin": expected a finite number, found the string "2"'),
    (read_preferences, {**PAIR, "domain": ["x"]}, 'field "domain": expected a string, found a list'),
    (read_preferences, {**PAIR, "rejected": None}, f'field "rejected": {TEXT}, found null'),
    (read_preferences, {**PAIR, "reference": None}, f'field "reference": {TEXT}, found null'),
    (read_preferences, {**GRADED, "ranked": ["a"]}, 'field "ranked": expected a list of texts, 2 or more, found 1'),
    (
        read_preferences,
        {"instruction": "i"},
        'expected a field "prompt", or a preference (chosen and rejected, ranked, response_a and',
    ),
    (
        read_preferences,
        {"chosen": "a", "rejected": "b", "reference": "r"},
        "expected a list of messages that begins with",
    ),
    (
        read_preferences,
        {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "w"}, GOOD], "reference": "r"},
        "expected conversations that begin with the same prompt, found nothing in common",
    ),
    (read_preferences, {"chosen": HH, "rejected": "b"}, f'field "rejected": {TURNS}, found the string "b"'),
    (
        read_preferences,
        {"chosen": HH, "rejected": f"{HH} a{HH}x\n\nHuman: ?"},
        f'field "rejected": {TURNS}, found Assist',
    ),
    (
        read_preferences,
        {"chosen": f"{HH}\n\nAssistant: a", "rejected": HH},
        f'"chosen": {TURNS}, found Human, Assistant, A',
    ),
    (read_preferences, {"chosen": HH}, "expected two answers or more"),
    (read_preferences, {**COMPARISON}, "expected two answers or more"),
    (
        read_preferences,
        DUEL,
        'field "winner_*": expected 1 in one of winner_model_a, winner_model_b, winner_tie, found it',
    ),
    (read_preferences, {**DUEL, "winner_tie": 1, "winner_model_a": 1}, "found it in 2"),
    (
        read_preferences,
        {**DUEL, "winner_model_a": 1, "response_b": '["a", "b"]'},
        'field "response_b": expected as many turns as the prompt has (1), found 2',
    ),
    (
        read_preferences,
        {**DUEL, "winner_model_a": 1, "response_b": "[null]"},
        'field "response_b[0]": expected a string, found null',
    ),
    (
        read_preferences,
        {**DUEL, "winner_model_a": 1, "prompt": None},
        'field "prompt": expected a string or a list of str',
    ),
    (
        read_preferences,
        {**GRADED, "completions": [{"text": "a"}]},
        "expected a list of completions, 2 or more, found 1",
    ),
    (
        read_preferences,
        {**GRADED, "completions": ["a", "b"]},
        'field "completions[0]": expected an object, found the stri',
    ),
    (
        read_preferences,
        {**GRADED, "completions": [{"text": "a", "score": 1}, {"text": "b", "score": None}]},
        'field "completions[1].score": expected a finite number, found null',
    ),
    (
        read_preferences,
        {**GRADED, "completions": [{"score": 1}, {"score": 2}]},
        f'field "completions[0].text": {TEXT}, foun',
    ),
]


@pytest.mark.parametrize(("reader", "row", "problem"), MISTAKES)
def test_mistakes_name_file_row_and_field(tmp_path, reader, row, problem):
    message = message_of(reader(save(tmp_path / "data.jsonl", b"\n" * 16, row)))
    assert message.startswith(f"{tmp_path / 'data.jsonl'}:17: ")
    assert problem in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([HH, "[]", '["a"]']),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "score", "rank", "completion"]), inner)
    ),
    max_leaves=8,
)
NAMES = sorted({name for row, _, _ in FOREIGN.values() for name in row} | {"output", "candidates", "policy", "sample"})


@settings(max_examples=100, deadline=None)
@given(row=st.dictionaries(st.sampled_from(NAMES), JSON))
def test_any_json_is_a_record_or_one_line(tmp_path_factory, row):
    data, problems = save(tmp_path_factory.getbasetemp() / "any.jsonl", row), []
    for reader in (read_comparisons, read_groups, read_preferences, read_trajectories, read_triples):
        try:
            list(reader(data))
        except InputError as error:
            problems.append(str(error))
    assert all(len(problem.splitlines()) == 1 for problem in problems)


# Skipping


def test_skipped_rows_are_counted_and_explained(tmp_path, caplog):
    bad = [{**COMPARISON, "output": n} for n in range(7)]
    data, report = tmp_path / "a.jsonl", ReadReport()
    save(data, COMPARISON, b"{not json}\n", b'{"prompt": "\xff"}\n', b"[1]\n", *bad, COMPARISON)
    assert len(list(read_comparisons(data, on_bad_row="skip", report=report))) == 2
    assert (report.read, report.skipped, report.format) == (2, 10, "comparison")
    assert [reason.split(": ")[0] for reason in report.first_reasons] == [f"{data}:{n}" for n in range(2, 7)]
    assert "invalid JSON at character 2" in report.first_reasons[0]
    assert "invalid UTF-8 at byte 13" in report.first_reasons[1]
    assert "expected a JSON object, found a list" in report.first_reasons[2]
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 6  # five rows, and that there are more
    assert message_of(read_comparisons(data)).startswith(f"{data}:2: expected a JSON object on one line, found invalid")


def test_nothing_left_after_skipping_is_an_error(tmp_path):
    data = save(tmp_path / "a.jsonl", {"x": 1}, b"{\n")
    message = message_of(read_comparisons(data, on_bad_row="skip"))
    assert message.startswith(f"{data}: expected rows to use, found none: all were skipped; the first: {data}:1: field")
    assert message_of(read_comparisons(data, on_bad_row="skpi"))  # a typo is as strict as "error"


def test_skipping_does_not_hide_a_truncated_file(tmp_path):
    data = tmp_path / "a.jsonl.gz"
    data.write_bytes(gzip.compress(json.dumps(COMPARISON).encode() + b"\n")[:-4])
    assert "Truncated" in message_of(read_comparisons(data, on_bad_row="skip"))


# Files


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": }\n', "found invalid JSON at character 7: Expecting value"),
        (b'{"a": "\xc3"}\n', "found invalid UTF-8 at byte 8"),
        (b"[" * 100_000 + b"\n", "found maximum recursion depth exceeded"),
        (b'{"a": ' + b"1" * 5000 + b"}\n", "found Exceeds the limit"),
        (b'"text"\n', 'expected a JSON object, found the string "text"'),
    ],
)
def test_bad_lines(tmp_path, line, problem):
    data = save(tmp_path / "a.ndjson", COMPARISON, b"\r\n \n", line)
    message = message_of(rows(data))
    assert message.startswith(f"{data}:4: ")
    assert problem in message


def test_lines_end_at_newlines_only_and_a_byte_order_mark_is_tolerated(tmp_path):
    odd = {**COMPARISON, "output": "a\u2028b\x85c\x0bd\r\ne\x00"}
    line = json.dumps(odd, ensure_ascii=False).encode()
    data = save(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + line + b"\r\n", line)
    found = list(rows(data))
    assert [row.fields for row in found] == [odd, odd]
    assert [(row.file, row.number) for row in found] == [(str(data), 1), (str(data), 2)]


LINES = b"".join(json.dumps({**COMPARISON, "id": n, "output": "é" * n}).encode() + b"\n" for n in range(40))
COMPRESSED = {".gz": gzip.compress(LINES), ".zst": zstandard.compress(LINES)}


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_compressed_files_may_consist_of_several_parts(tmp_path, suffix):
    data = tmp_path / f"a.jsonl{suffix}"
    data.write_bytes(COMPRESSED[suffix] * 2)
    assert [row.fields["id"] for row in rows(data)] == [*range(40)] * 2


@settings(max_examples=60, deadline=None)
@given(suffix=st.sampled_from([*COMPRESSED]), part=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_never_taken_for_a_short_one(tmp_path_factory, suffix, part):
    whole = COMPRESSED[suffix]
    data = tmp_path_factory.getbasetemp() / f"cut.jsonl{suffix}"
    data.write_bytes(whole[: int(len(whole) * part)])
    message = message_of(rows(data))
    assert message.startswith(str(data))
    assert "cannot be read: Truncated compressed stream" in message or "found none" in message


def test_a_file_that_is_not_compressed_says_so(tmp_path):
    data = save(tmp_path / "a.jsonl.gz", COMPARISON)
    assert message_of(rows(data)).startswith(f"{data}:1: cannot be read: zlib inflate failed")


# JSON arrays

ELEMENTS = st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=3), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    elements=ELEMENTS, chunk=st.integers(1, 40), indent=st.none() | st.just(1), mark=st.booleans(), part=st.floats(0, 1)
)
def test_arrays_are_read_whole_or_not_at_all(tmp_path, monkeypatch, elements, chunk, indent, mark, part):
    monkeypatch.setattr(sources, "CHUNK_SIZE", chunk)
    data, array = tmp_path / "a.json", json.dumps(elements, indent=indent)
    data.write_text(" \n" + array + "\n", encoding="utf-8-sig" if mark else "utf-8")
    assert repr([row.fields for row in rows(data)]) == repr(elements)  # repr, because nan != nan
    data.write_text(array[: int((len(array) - 1) * part)])
    assert message_of(rows(data)).startswith(str(data))


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        ("[]", ": expected at least one row, found none"),
        ("[{}, 1]", ":2: expected a JSON object, found the number 1"),
        ("[{} {}]", ":2: expected the next element of a JSON array, found no comma after the last element"),
        ("[{},]", ":2: expected the next element of a JSON array, found Expecting value"),
        ("[{}] {}", ":2: expected nothing after the JSON array, found more text"),
        ('[{}, {"a": oops}' + " " * 99 + "]", ":2: expected the next element of a JSON array, found Expecting value"),
        ("[" * 100_000, ":1: expected a JSON object, found one that is nested too deeply"),
        ('[{"a": "\udcff"}]', ": expected UTF-8, found an invalid byte in row 1 or later"),
    ],
)
def test_bad_arrays(tmp_path, array, problem):
    data = tmp_path / "a.json"
    data.write_bytes(array.encode(errors="surrogateescape"))
    assert message_of(rows(data)).startswith(f"{data}{problem}")


def test_a_mistake_in_a_large_array_is_found_before_its_end(monkeypatch):
    class Stream(io.BytesIO):
        def close(self):
            ends.append(self.tell())
            super().close()

    monkeypatch.setattr(sources, "CHUNK_SIZE", 100)
    ends = []
    assert message_of(sources._array(Stream(b"[{}, {a" + b"x" * 10**6 + b"]"), "a")).startswith(
        "a:2: expected the next"
    )
    gc.collect()
    assert ends[0] < 10**5


def test_json_with_one_object_per_line(tmp_path):
    assert len(list(rows(save(tmp_path / "a.json", COMPARISON, COMPARISON)))) == 2


# Parquet


def test_parquet_rows_are_numbered_over_batches_and_row_groups(tmp_path):
    data, count = tmp_path / "a.parquet", 3 * sources.PARQUET_BATCH + 1
    messages = json.dumps([USER])
    table = pa.table(
        {"id": range(count), "prompt": [messages] * count, "reference": [[GOOD]] * count, "output": ["o"] * count}
    )
    pq.write_table(table, data, row_group_size=100)
    assert [row.number for row in rows(data)] == [*range(1, count + 1)]
    records = list(read_comparisons(data))
    assert records[-1] == Comparison(PROMPT, BEST, "o", count - 1)


def test_parquet_rows_that_are_not_utf8(tmp_path):
    data, report = tmp_path / "a.parquet", ReadReport()
    texts = pa.array([b"x", b"\xff", b"z"]).view(pa.string())
    pq.write_table(pa.table({"prompt": texts, "reference": texts, "output": texts}), data)
    assert [record.output for record in read_comparisons(data, on_bad_row="skip", report=report)] == ["x", "z"]
    assert report.first_reasons == [f"{data}:2: expected UTF-8 in every string, found invalid bytes"]
    message_of(read_comparisons(data))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (pa.array([4 * 10**17, 0], pa.timestamp("us")), "14645-06-30 15:06:40.000000"),
        (pa.array([3 * 10**6, 0], pa.date32()), "10183-09-21"),
        (pa.array([0, 0], pa.timestamp("us", "Mars/Olympus")), "1970-01-01 00:00:00.000000"),
    ],
)
def test_dates_that_python_cannot_express_are_text(tmp_path, values, text):
    data = tmp_path / "a.parquet"
    pq.write_table(pa.table({**{name: ["x", "y"] for name in COMPARISON}, "when": values}), data)
    assert next(rows(data)).fields["when"] == text
    assert [record.output for record in read_comparisons(data)] == ["x", "y"]


def test_dates_inside_lists_that_python_cannot_express_name_the_row(tmp_path):
    turns = pa.array([[{"when": 0}], [{"when": 4 * 10**17}]], pa.list_(pa.struct([("when", pa.timestamp("us"))])))
    data, report = tmp_path / "a.parquet", ReadReport()
    pq.write_table(pa.table({"turns": turns}), data)
    assert len(list(rows(data, on_bad_row="skip", report=report))) == 1
    assert report.first_reasons[0].startswith(f"{data}:2: expected values that Python can express, found a list<")


def test_a_name_that_is_there_twice_is_an_error(tmp_path):
    data = tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array(["x"]), pa.array(["y"])], names=["answer", "answer"]), data)
    assert message_of(rows(data)) == f"{data}: expected columns of different names, found 'answer' twice"
    twice = b'{"prompt": {"a": 1, "b": 2, "a": 3}}\n'
    message = message_of(rows(save(tmp_path / "a.jsonl", COMPARISON, twice)))
    assert message.endswith('a.jsonl:2: expected a JSON object on one line, found the string "a" twice in one object')
    message = message_of(rows(save(tmp_path / "a.json", b"[{}," + twice + b"]")))
    assert message.endswith('a.json:2: expected a JSON object, found the string "a" twice in one object')


def test_damaged_parquet(tmp_path):
    data = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["x" * 1000]}), data)
    whole = data.read_bytes()
    for content in (b"", b"text", whole[:-20], whole[: len(whole) // 2]):
        data.write_bytes(content)
        assert message_of(rows(data)).startswith(f"{data}: cannot be read: ")


# Paths


def test_directories_and_globs_in_sorted_order(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    save(tmp_path / "b.jsonl", {"n": 2})
    save(tmp_path / "a.json", {"n": 1})
    save(tmp_path / "c.jsonl")
    save(tmp_path / "sub" / "d.jsonl", {"n": 4})
    save(tmp_path / "README.md", b"text")
    save(tmp_path / ".hidden.jsonl", b"text")
    pq.write_table(pa.table({"n": [3]}), tmp_path / "c.parquet")
    assert [row.fields["n"] for row in rows(tmp_path)] == [1, 2, 3]
    assert "c.jsonl: no rows" in caplog.text
    assert [row.fields["n"] for row in rows(str(tmp_path / "**" / "*.jsonl"))] == [2, 4]
    assert [row.file for row in rows(tmp_path / "[ab].*")] == [str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    assert len(list(rows(save(tmp_path / "a[1].jsonl", COMPARISON)))) == 1


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("missing.jsonl", "missing.jsonl: expected a file, a directory or a pattern; found no such file"),
        ("missing.parquet", "missing.parquet: expected a file, a directory or a pattern; found no such file"),
        ("*.jsonl.gz", "*.jsonl.gz: expected files that match this pattern, found none"),
        ("notes.txt", "notes.txt: expected a file name that ends in .jsonl, .ndjson, .json (each also with .gz"),
        ("a.parquet.gz", "a.parquet.gz: expected a file name that ends in"),
        ("nothing", "nothing: expected files in this directory that end in .jsonl"),
        ("empty.jsonl", "empty.jsonl: expected at least one row, found none"),
        ("x" * 300 + ".jsonl", "File name too long"),
    ],
)
def test_paths_without_rows(tmp_path, monkeypatch, path, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    save(tmp_path / "notes.txt", b"text")
    save(tmp_path / "empty.jsonl", b"\n\n")
    for reader in (rows, read_groups):
        message = message_of(reader(path))
        assert message.startswith(path)
        assert problem in message


def test_a_file_that_disappears_while_reading(tmp_path):
    first, second = save(tmp_path / "a.jsonl", {"n": 1}), save(tmp_path / "b.jsonl", {"n": 2})
    iterator = rows(tmp_path)
    next(iterator)
    second.unlink()
    assert message_of(iterator).startswith(f"{second}: expected a file")
    assert first.exists()


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(COMPARISON).encode() + b"\n{}")))
    iterator = read_comparisons("-")
    assert next(iterator) == Comparison("p", "r", "o")
    assert message_of(iterator).startswith('stdin:2: field "prompt": ')


# Data sets


def test_data_sets_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([COMPARISON, {**COMPARISON, "output": None}])
    data.save_to_disk(tmp_path / "one")
    iterator = read_comparisons(tmp_path / "one")
    assert next(iterator) == Comparison("p", "r", "o")
    assert message_of(iterator).startswith(f'{tmp_path / "one"}:2: field "output": ')
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
    choice = f"choose {tmp_path}/two/test or {tmp_path}/two/train"
    assert message_of(read_comparisons(tmp_path / "two")).endswith(choice)
    assert next(read_comparisons(tmp_path / "two" / "train")) == Comparison("p", "r", "o")


def test_data_sets_by_name(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        if args == ("gone",):
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'gone' doesn't exist\non the Hub")
        return [COMPARISON]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_comparisons("hf:org/name:train")) == [Comparison("p", "r", "o")]
    assert list(read_comparisons("hf:org/name:config:test")) == [Comparison("p", "r", "o")]
    assert asked == [
        (("org/name",), {"split": "train", "streaming": True}),
        (("org/name", "config"), {"split": "test", "streaming": True}),
    ]
    assert message_of(rows("hf:gone:train")) == "hf:gone:train: cannot be read: Dataset 'gone' doesn't exist on the Hub"


@pytest.mark.parametrize("path", ["hf:", "hf:name", "hf:name:", "hf::train", "hf:a:b:c:d"])
def test_names_of_data_sets_need_a_split(path):
    assert message_of(rows(path)) == f"{path}: expected hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert message_of(rows("hf:org/name:train")).endswith("pip install 'polar-rm[train]'")


def test_imports_need_neither_torch_nor_datasets():
    code = "import sys; from polar.data import readers, writers; print({'torch', 'datasets'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# Size


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_memory_stays_constant(tmp_path, suffix):
    data, count = tmp_path / f"big{suffix}", 6000
    line = json.dumps({**COMPARISON, "output": "x" * 10_000})
    begin, between, end = ("[", ",\n", "]") if suffix == ".json" else ("", "\n", "\n")
    data.write_text(begin + between.join([line] * count) + end)
    assert data.stat().st_size > 60e6
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_comparisons(data)) == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_one_output_of_ten_megabytes(tmp_path, name):
    output = "é" * 5_000_000
    data = save(
        tmp_path / name, [{**COMPARISON, "output": output}] if name == "a.json" else {**COMPARISON, "output": output}
    )
    assert next(read_comparisons(data)).output == output


def test_groups_by_reference(tmp_path) -> None:
    found = [
        {"id": 1, "prompt": "p", "references": ["a", "b"], "candidates": ["c", "d"], "wrapper": "pretrain"},
        {"prompt": "p", "reference": "a", "output": "c"},
    ]
    path = save(tmp_path / "groups.jsonl", *found)
    assert list(read_groups_by_reference(path)) == [
        (Group("p", "a", ("c", "d"), 1, "pretrain"), Group("p", "b", ("c", "d"), 1, "pretrain")),
        (Group("p", "a", ("c",)),),
    ]
    for change, words in (
        ({"reference": "a"}, "both"),
        ({"references": []}, "1 or more"),
        ({"references": "a"}, "list"),
    ):
        message = message_of(read_groups_by_reference(save(path, found[0] | change)))
        assert "references" in message
        assert words in message
