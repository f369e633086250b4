import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar.errors import InputError
from polar.records import Triple
from polar.template import Template
from polar.training.batches import examples_from_triples
from polar.training.store import ExampleStore, fingerprint_of, open_examples, write_examples
from polar.training.stream import BatchStream, batches_per_epoch

LENGTHS = st.lists(st.integers(1, 1000), min_size=1, max_size=300).map(lambda values: np.array(values, np.int64))


@given(LENGTHS, st.integers(1, 9), st.integers(0, 5), st.integers(1, 3))
def test_every_epoch_has_every_example_once(lengths: np.ndarray, size: int, seed: int, epochs: int) -> None:
    per_epoch = batches_per_epoch(len(lengths), size)
    stream = list(BatchStream(lengths, size, epochs * per_epoch, seed))
    assert len(stream) == epochs * per_epoch
    for epoch in range(epochs):
        batches = stream[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
        assert all(1 <= len(batch) <= size for batch in batches)
    if epochs > 1 and len(lengths) > 20:
        assert stream[:per_epoch] != stream[per_epoch : 2 * per_epoch]


@given(LENGTHS, st.integers(1, 5), st.sampled_from([2, 3, 4]))
def test_processes_share_the_batches_of_one_process(lengths: np.ndarray, size: int, processes: int) -> None:
    count = batches_per_epoch(len(lengths), size, processes)
    single = list(BatchStream(lengths, size * processes, count))
    shares = [list(BatchStream(lengths, size, count, 0, process, processes)) for process in range(processes)]
    assert all(len(share) == count for share in shares)
    for turn in range(count):
        dealt = [share[turn] for share in shares]
        assert all(dealt)
        if batches_per_epoch(len(lengths), size * processes) == count:
            assert sorted(number for batch in dealt for number in batch) == sorted(single[turn])


@given(LENGTHS, st.integers(1, 9), st.integers(0, 50))
def test_a_position_is_one_number(lengths: np.ndarray, size: int, position: int) -> None:
    stream = list(BatchStream(lengths, size, 60))
    assert list(BatchStream(lengths, size, 60))[position:] == stream[position:]


def test_batches_hold_similar_lengths_and_the_longest_comes_first() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, 4000)
    stream = list(BatchStream(lengths, 8, batches_per_epoch(4000, 8)))
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in stream)
    assert padded < 1.1 * int(lengths.sum())
    assert int(lengths.max()) in lengths[stream[0]]
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
