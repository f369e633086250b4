import gzip
import io
import json
import random
import resource
import sys

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polar.core.errors import InputError
from polar.core.records import Comparison, Group, Message, Preference, Trajectory, Triple, prompt_id, text_of
from polar.data import writers
from polar.data.readers import (
    read_comparisons,
    read_groups,
    read_preferences,
    read_trajectories,
    read_triples,
    rows,
)
from polar.data.writers import open_writer, record_to_dict

NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]
ROW = {"prompt": "p", "reference": "r", "output": "o"}


def write(path, given):
    with open_writer(path) as writer:
        for row in given:
            writer.write(row)


def message_of(path, given):
    with pytest.raises(InputError) as caught:
        write(path, given)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


strings = st.text(max_size=20)  # any Unicode but surrogates
questions, replies = (
    st.lists(st.builds(Message, st.just(role), strings), min_size=1, max_size=3).map(tuple)
    for role in ("user", "assistant")
)
wrappers = st.sampled_from(["sft", "pretrain"])
maybe = st.none() | strings
decodings = st.dictionaries(
    strings, st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | strings
)


def records_of(prompt, text):
    """Lists of equal nouns whose texts are all strings, or all messages: what a Parquet column can hold."""
    answers = st.lists(text, min_size=2, max_size=4).map(tuple)
    candidates = st.lists(text, min_size=1, max_size=3).map(tuple)
    numbers, margins = st.none() | st.integers(-(2**63), 2**63 - 1), st.none() | st.floats(0, 1e9)
    return st.one_of(
        *(
            st.tuples(st.just(reader), st.lists(noun, min_size=1, max_size=5))
            for reader, noun in (
                (read_comparisons, st.builds(Comparison, prompt, text, text, numbers, wrappers)),
                (read_groups, st.builds(Group, prompt, text, candidates, maybe, wrappers)),
                (read_triples, st.builds(Triple, prompt, text, text, text, maybe, maybe, wrappers)),
                (read_preferences, st.builds(Preference, prompt, text, answers, margins, maybe, wrappers)),
                (read_trajectories, st.builds(Trajectory, prompt, strings, text, st.integers(0, 9), decodings)),
            )
        )
    )


@settings(max_examples=150, deadline=None)
@given(case=records_of(strings, strings) | records_of(questions, replies), name=st.sampled_from(NAMES))
@example(case=(read_triples, [Triple("\u2028\x00\r\n", "\ufeff", "😀", "\x85")]), name="a.jsonl")
@example(case=(read_triples, [Triple("\u2028\x00\r\n", "\ufeff", "😀", "\x85")]), name="a.parquet")
def test_what_is_written_is_read_back(tmp_path_factory, case, name):
    reader, records = case
    data = tmp_path_factory.getbasetemp() / name
    write(data, map(record_to_dict, records))
    assert list(reader(data)) == records


def test_texts_of_both_kinds_in_one_file(tmp_path):
    records = [Comparison("p", (Message("assistant", "r"),), "o"), Comparison((Message("user", "p"),), "r", "o")]
    given = [record_to_dict(record) for record in records]
    write(tmp_path / "a.jsonl", given)
    assert list(read_comparisons(tmp_path / "a.jsonl")) == records
    message = message_of(tmp_path / "a.parquet", given)
    assert message.startswith(
        f'{tmp_path / "a.parquet"}: rows 1 to 2: field "prompt": expected values of one type, found'
    )
    assert message.endswith("; write .jsonl for rows of different shapes")


def test_rows_of_records():
    assert record_to_dict(Preference("p", "r", ("a", "b"), margin=1.0)) == {
        "prompt": "p",
        "reference": "r",
        "chosen": "a",
        "rejected": "b",
        "margin": 1.0,
        "wrapper": "sft",
    }
    assert record_to_dict(Preference("p", "r", ("a", "b", "c")))["ranked"] == ["a", "b", "c"]
    assert record_to_dict(Group((Message("user", "p"),), "r", ("a", (Message("assistant", "b"),)), id=0)) == {
        "prompt": [{"role": "user", "content": "p"}],
        "reference": "r",
        "candidates": ["a", [{"role": "assistant", "content": "b"}]],
        "id": 0,
        "wrapper": "sft",
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_string_that_spells_messages_keeps_its_text(tmp_path, name):
    string = '[{"role": "user", "content": "hello"}]'
    with open_writer(tmp_path / name) as writer:
        writer.write(record_to_dict(Comparison(string, "r", string, id=string)))
    (record,) = read_comparisons(tmp_path / name)
    assert (text_of(record.prompt), text_of(record.output), record.id) == (string, string, string)
    assert prompt_id(record.prompt) == prompt_id(string)


def fail_after(*given):
    yield from given
    raise KeyError


@pytest.mark.parametrize("name", NAMES)
def test_the_file_appears_complete_or_not_at_all(tmp_path, name):
    target = tmp_path / name
    with open_writer(target) as writer:
        writer.write(ROW)
        assert not target.exists()
    before = target.read_bytes()
    with pytest.raises(KeyError):
        write(target, fail_after({**ROW, "output": "other"}))
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]
    write(target, [{**ROW, "output": "other"}])
    assert [row.fields["output"] for row in rows(target)] == ["other"]
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", NAMES)
def test_the_same_rows_give_the_same_bytes(tmp_path, name):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        with open_writer(tmp_path / folder / name) as writer:
            writer.write(ROW)
    assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(tmp_path, name):
    with open_writer(tmp_path / name):
        pass
    with pytest.raises(InputError, match="expected at least one row, found none"):
        list(rows(tmp_path / name))


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk(tmp_path, monkeypatch, name):
    monkeypatch.setattr(writers, "ROW_GROUP", 50)
    given = [{"output": random.Random(n).randbytes(400).hex()} for n in range(400)]  # does not compress well
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        message = message_of(tmp_path / name, given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message == f"{tmp_path / name}: cannot be written: File too large"
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_caller_stay_what_they_are(tmp_path):
    with pytest.raises(ConnectionError), open_writer(tmp_path / "a.jsonl"):
        raise ConnectionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("a.txt", "a.txt: expected a file name that ends in .jsonl, .jsonl.gz, .jsonl.zst, .parquet"),
        ("missing/a.jsonl", "missing/a.jsonl: cannot be written: No such file or directory"),
        ("folder.jsonl", "folder.jsonl: expected a file to write, found a directory"),
    ],
)
def test_targets_that_cannot_be_written(tmp_path, monkeypatch, path, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    assert message_of(path, []) == problem


@pytest.mark.parametrize("value", ["a\ud800", float("nan"), [float("inf")]])
def test_values_that_json_cannot_express(tmp_path, value):
    message = message_of(tmp_path / "a.jsonl", [ROW, {"score": value}])
    assert message.startswith(f"{tmp_path / 'a.jsonl'}:2: expected values that JSON and UTF-8 can express, found")
    assert list(tmp_path.iterdir()) == []


def test_standard_output(monkeypatch):
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding="ascii"))
    with open_writer("-") as writer:
        writer.write({"output": "é"})
    assert stream.getvalue() == '{"output": "é"}\n'.encode()
    assert not stream.closed


# Parquet


def test_row_groups_and_missing_values(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "ROW_GROUP", 2)
    given = [{"a": 1}, {"a": 2.5, "b": "x"}, {"b": "y"}, {"a": 3}, {"a": None}]
    write(tmp_path / "a.parquet", given)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 3
    assert [row.fields for row in rows(tmp_path / "a.parquet")] == [
        {"a": row.get("a"), "b": row.get("b")} for row in given
    ]


def test_large_rows_make_small_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "ROW_GROUP_SIZE", 1000)
    with open_writer(tmp_path / "a.parquet") as writer:
        for _ in range(4):
            writer.write({"prompt": [{"role": "user", "content": "x" * 600}]})
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 2


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"a": "x"}, 'rows 3 to 3: field "a": expected values of the type int64, found '),
        (
            {"a": 1, "c": 1},
            'rows 3 to 3: field "c": expected no field that the first rows do not have, found a new one',
        ),
        ({"a": 2**64}, 'rows 3 to 3: field "a": expected values of the type int64, found '),
        ({"a": True}, 'rows 3 to 3: field "a": expected values of the type int64, found the type bool'),
        ({"b": 2**60 + 1}, 'rows 3 to 3: field "b": expected values of the type double, found '),
        ({"b": "1"}, 'rows 3 to 3: field "b": expected values of the type double, found the type string'),
        ({"m": [{"role": "user", "content": "x"}]}, 'rows 3 to 3: field "m": expected values of the type list'),
        ({"a": 1.5}, 'rows 3 to 3: field "a": expected values of the type int64, found '),
    ],
)
def test_rows_that_do_not_fit_the_first_ones(tmp_path, monkeypatch, row, problem):
    monkeypatch.setattr(writers, "ROW_GROUP", 2)
    message = message_of(tmp_path / "a.parquet", [{"a": 1, "b": 0.5}, {"a": 2, "m": ["x"]}, row])
    assert message.startswith(f"{tmp_path / 'a.parquet'}: {problem}")
    assert list(tmp_path.iterdir()) == []


def test_objects_become_json_text_and_messages_stay_messages(tmp_path):
    with open_writer(tmp_path / "a.parquet") as writer:
        writer.write({"prompt": [{"role": "user", "content": "p"}], "info": {"a": None}, "parts": [{"x": 1}, {"y": 2}]})
        writer.write({"prompt": [{"role": "user", "content": "q"}], "info": {"é": [1]}, "parts": []})
    first, second = (row.fields for row in rows(tmp_path / "a.parquet"))
    assert first["prompt"] == [{"role": "user", "content": "p"}]
    assert [json.loads(part) for part in first["parts"]] == [{"x": 1}, {"y": 2}]
    assert (json.loads(first["info"]), second["info"]) == ({"a": None}, '{"é": [1]}')


def test_gzip_is_plain_gzip(tmp_path):
    with open_writer(tmp_path / "a.jsonl.gz") as writer:
        writer.write(ROW)
    assert json.loads(gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes())) == ROW
