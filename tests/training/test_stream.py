import pickle
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar.core.errors import InputError
from polar.core.records import Triple
from polar.core.template import Template
from polar.training.batches import examples_from_triples
from polar.training.example_store import ExampleStore, fingerprint_of, open_examples, write_examples
from polar.training.stream import BatchStream

LENGTHS = st.lists(st.integers(1, 1000), min_size=1, max_size=300).map(lambda values: np.array(values, np.int64))


@given(LENGTHS, st.integers(1, 9), st.none() | st.integers(1, 5000), st.integers(0, 5), st.integers(1, 3))
def test_every_epoch_has_every_example_once(
    lengths: np.ndarray, size: int, tokens: int | None, seed: int, epochs: int
) -> None:
    stream = BatchStream(lengths, size, tokens, seed=seed)
    ends = [len(stream.for_epochs(number)) if number else 0 for number in range(epochs + 1)]
    batches, found = list(stream.for_epochs(epochs)), []
    assert len(batches) == ends[-1]
    for start, end in pairwise(ends):
        found.append(batches[start:end])
        assert sorted(number for batch in found[-1] for number in batch) == list(range(len(lengths)))
    if epochs > 1 and len(lengths) > 20:
        assert found[0] != found[1]
    for batch in batches:
        if tokens is None:
            assert 1 <= len(batch) <= size
        else:
            assert len(batch) == 1 or lengths[batch].sum() <= tokens


@given(LENGTHS, st.integers(1, 5), st.sampled_from([2, 3, 4]))
def test_processes_share_the_batches_of_one_process(lengths: np.ndarray, size: int, processes: int) -> None:
    if len(lengths) < processes:
        with pytest.raises(InputError, match="too few for"):
            BatchStream(lengths, size, processes=processes).for_epochs(1)
        return
    single = list(BatchStream(lengths, size * processes).for_epochs(1))
    shares = [
        list(BatchStream(lengths, size, process=process, processes=processes).for_epochs(1))
        for process in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    for dealt in zip(*shares, strict=True):
        assert all(dealt)
    if len(shares[0]) == len(single):
        for together, dealt in zip(single, zip(*shares, strict=True), strict=True):
            assert sorted(number for batch in dealt for number in batch) == sorted(together)


@given(LENGTHS, st.integers(100, 5000), st.sampled_from([2, 3]))
def test_token_budgets_give_every_process_its_own_rows(lengths: np.ndarray, tokens: int, processes: int) -> None:
    alone = list(BatchStream(lengths, batch_tokens=tokens).for_epochs(1))
    if len(alone) < processes:
        return
    shares = [
        list(BatchStream(lengths, batch_tokens=tokens, process=process, processes=processes).for_epochs(1))
        for process in range(processes)
    ]
    assert {len(share) for share in shares} == {len(alone) // processes}
    taken = [tuple(batch) for share in shares for batch in share]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= {tuple(batch) for batch in alone}


def test_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(100, 1000, 4000)
    rows = list(BatchStream(lengths, batch_tokens=16384).for_epochs(1))
    filled = [int(lengths[row].sum()) for row in rows]
    assert max(filled) <= 16384
    assert sum(filled) > 0.95 * 16384 * len(filled)
    assert filled[0] == max(filled)  # if memory does not suffice, that shows at once


@given(LENGTHS, st.integers(1, 9), st.none() | st.integers(1, 5000), st.integers(0, 50))
def test_a_position_is_one_number(lengths: np.ndarray, size: int, tokens: int | None, position: int) -> None:
    stream = BatchStream(lengths, size, tokens, turns=60)
    assert list(stream)[position:] == list(stream)[position:]
    assert list(replace(stream, turns=position)) == list(stream)[:position]


def test_half_an_epoch_is_half_the_turns() -> None:
    lengths = np.full(64, 10)
    assert [len(BatchStream(lengths, 4).for_epochs(epochs)) for epochs in (0.01, 0.5, 1, 2.25)] == [1, 8, 16, 36]


def test_batches_hold_similar_lengths_and_the_longest_comes_first() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, 4000)
    stream = list(BatchStream(lengths, 8).for_epochs(1))
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in stream)
    assert padded < 1.1 * int(lengths.sum())
    assert lengths[stream[0]].sum() == max(lengths[batch].sum() for batch in stream)
    spread = Counter(int(lengths[batch].mean()) // 500 for batch in stream[1:100])
    assert len(spread) == 4  # the batches themselves come in random order


TRIPLES = [
    Triple(f"Prompt {number}?", "reference " * number, "positive", f"negative {turn}")
    for number in range(30)
    for turn in range(2)
]


def test_examples_come_back_from_disk(tmp_path: Path, template: Template) -> None:
    examples = list(examples_from_triples(TRIPLES, template))
    store = write_examples(tmp_path / "run" / "examples.arrow", iter(examples), {"files": {}})
    assert len(store) == len(examples) == 30
    for number in (0, 7, 29):
        found, wanted = store[number], examples[number]
        assert (found.group.prefix, found.group.branches) == (wanted.group.prefix, wanted.group.branches)
        assert found.group.reference == wanted.group.reference
        assert (found.pairs, found.name, found.margin) == (wanted.pairs, wanted.name, wanted.margin)
        assert store.lengths[number] == len(wanted.group.prefix) + sum(map(len, wanted.group.branches))
    assert pickle.loads(pickle.dumps(store))[7] == store[7]  # a data loader sends it to its workers
    assert isinstance(open_examples(store.path, {"files": {}}), ExampleStore)


def test_other_data_is_refused(tmp_path: Path, template: Template) -> None:
    data = tmp_path / "triples.jsonl"
    data.write_text("one")
    before = fingerprint_of([str(data)], {"max_length": 9})
    write_examples(tmp_path / "examples.arrow", examples_from_triples(TRIPLES, template), before)
    assert open_examples(tmp_path / "none.arrow", before) is None
    data.write_text("more")
    with pytest.raises(InputError, match=r"other training data or settings \(files\)"):
        open_examples(tmp_path / "examples.arrow", fingerprint_of([str(data)], {"max_length": 9}))
    with pytest.raises(InputError, match=r"\(settings\)"):
        open_examples(tmp_path / "examples.arrow", {**before, "settings": {"max_length": 8}})


def test_no_examples_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no training examples"):
        write_examples(tmp_path / "examples.arrow", [], {})
    assert not list(tmp_path.iterdir())
