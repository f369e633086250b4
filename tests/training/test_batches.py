"""Training data: what is refused or counted, XTuner's own files, and memory."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from polar import InputError, Preference, RewardModel, Template, Triple
from polar.cli.main import main
from polar.data.readers import read_preferences
from polar.data.writers import open_writer
from polar.training import example_store
from polar.training.batches import (
    Example,
    drop_equal_pairs,
    examples_from_preferences,
    examples_from_triples,
    require_several_policies,
)
from polar.training.config import PretrainConfig, ScratchConfig
from polar.training.example_store import write_examples
from polar.training.run import pretrain

XTUNER_ROWS = json.loads((Path(__file__).parents[1] / "fixtures" / "golden" / "training.json").read_text("utf-8"))
SMALL = ScratchConfig(vocab_size=300, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=1)


def triple(number: int, policy: str | None, negative_policy: str | None) -> Triple:
    return Triple(f"p {number}", "red fox", f"red {number}", f"{number} 7", policy, negative_policy)


def test_a_triple_whose_candidates_are_by_one_policy_is_refused_at_once() -> None:
    triples = require_several_policies([triple(1, "a", "b"), triple(2, "b", "b"), triple(3, "a", "b")])
    assert next(triples).policy == "a"
    with pytest.raises(InputError, match=r"^triple 2: positive and negative are both by the policy 'b'"):
        next(triples)


def test_triples_that_name_one_policy_in_all_are_refused() -> None:
    with pytest.raises(InputError, match=r"^all 2 triples name the same single policy, 'a'; expected negatives"):
        list(require_several_policies([triple(1, "a", None), triple(2, "a", None)]))


@pytest.mark.parametrize(
    "policies", [[("a", "b"), ("b", "a")], [(None, None), (None, None)], [("a", None), ("b", None)], []]
)
def test_other_triples_pass_as_they_are(
    policies: list[tuple[str | None, str | None]], caplog: pytest.LogCaptureFixture
) -> None:
    triples = [triple(number, *names) for number, names in enumerate(policies)]
    assert list(require_several_policies(triples)) == triples
    assert not caplog.records


def test_a_policy_that_gives_all_positives_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert len(list(require_several_policies([triple(1, "a", "b"), triple(2, "a", "c")]))) == 2
    assert "all references and positives are by the policy 'a'" in caplog.text


def test_equal_candidates_are_counted_and_left_out(template: Template, caplog: pytest.LogCaptureFixture) -> None:
    long = "red fox " * 100  # cut to 128 tokens, the two become one
    preferences = [
        Preference("p", "r", ("good", "bad")),
        Preference("p", "r", ("good", "good", "bad")),
        Preference("p", "r", (long + "and more", long + "but not")),
    ]
    kept = list(drop_equal_pairs(examples_from_preferences(preferences, template)))
    assert [(example.name[:1], example.pairs) for example in kept] == [("1", ((0, 1),)), ("2", ((0, 2), (1, 2)))]
    (told,) = caplog.messages
    assert told.startswith("both candidates are the same in 2 of 5 comparisons")


def test_nothing_but_equal_candidates_is_refused(template: Template) -> None:
    triples = [Triple("p", "r", f"{number}", f"{number}") for number in range(3)]
    with pytest.raises(InputError, match=r"^both candidates are the same in all 3 comparisons"):
        list(drop_equal_pairs(examples_from_triples(triples, template)))


def refused(tmp_path: Path, rows: list[dict[str, Any]], **values: Any) -> str:
    data = tmp_path / "triples.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PretrainConfig(
        data=[str(data)],
        output=str(tmp_path / "out"),
        scratch=SMALL,
        max_length=128,
        max_response_length=32,
        max_steps=1,
        **values,
    )
    with pytest.raises(InputError) as error:
        pretrain(config)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(tmp_path), "")


def test_a_run_on_an_empty_or_one_policy_corpus_is_refused_with_the_reason(tmp_path: Path) -> None:
    row = {"prompt": "p", "reference": "r", "positive": "red", "negative": "7"}
    assert refused(tmp_path, []) == "/triples.jsonl: expected at least one row, found none"
    assert "all were skipped" in refused(tmp_path, [{"prompt": "p"}], on_bad_row="skip")
    named = {**row, "policy": "a", "negative_policy": "a"}
    assert refused(tmp_path, [named]).startswith("triple 1: positive and negative are both by the policy 'a'")
    assert refused(tmp_path, [{**row, "negative": "red"}]).startswith("both candidates are the same in all 1")
    assert not (tmp_path / "out" / "run" / "examples.arrow").exists()


def test_xtuners_training_file_trains_unchanged(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = XTUNER_ROWS["cases"][0]["rows"]
    assert {"wrapper", "reference", "chosen"} <= set().union(*rows)
    assert any(len(row["prompt"]) > 1 for row in rows)
    data, output = tmp_path / "train.jsonl", tmp_path / "rm"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    flags = ["--model", str(checkpoint), "--data", str(data), "--output", str(output), "--batch-size", "2"]
    assert main(["finetune", *flags, "--max-length", "512"]) == 0, capsys.readouterr().err
    tuned = RewardModel.load(output)
    examples = example_store.ExampleStore(output / "run" / "examples.arrow")
    assert len(examples) == len(rows)
    continuing = next(number for number, row in enumerate(rows) if row.get("wrapper") == "pretrain")
    (record,) = list(read_preferences(data))[continuing : continuing + 1]
    assert record.wrapper == "pretrain"
    (example,) = examples_from_preferences([record], tuned.template)
    assert examples[continuing].group.prefix == example.group.prefix
    assert examples[continuing].group.branches == example.group.branches


def peak(path: str, template: Template, target: Path) -> int:
    """Most bytes that Python and Arrow held at a time on the way from the rows to the file."""
    arrow = 0

    def watched(examples: Iterator[Example]) -> Iterator[Example]:
        nonlocal arrow
        for example in examples:
            arrow = max(arrow, pa.total_allocated_bytes())
            yield example

    before = pa.total_allocated_bytes()
    tracemalloc.start()
    written = write_examples(target, watched(examples_from_preferences(read_preferences(path), template)), {})
    _, python = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(written) > 0
    return python + arrow - before


def many_rows(count: int) -> Iterator[dict[str, str]]:
    for number in range(count):
        text = f"{number} red fox " * 20
        yield {"prompt": text, "reference": text, "chosen": text + "good", "rejected": text + "bad"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
def test_memory_does_not_grow_with_the_data(
    kind: str, template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example_store, "MAX_BATCH_TOKENS", 1 << 12)
    monkeypatch.setattr("polar.data.writers.ROW_GROUP", 50)
    peaks = []
    for number, count in enumerate((150, 150, 1200)):  # what is loaded once is loaded in the first round
        path = f"{tmp_path}/{number}.{kind}"
        if kind == "hf":
            datasets = pytest.importorskip("datasets")
            stream = datasets.IterableDataset.from_generator(many_rows, gen_kwargs={"count": count})
            monkeypatch.setattr(datasets, "load_dataset", lambda *_, stream=stream, **__: stream)
            path = "hf:org/name:train"
        else:
            with open_writer(path) as writer:
                for row in many_rows(count):
                    writer.write(row)
        peaks.append(peak(path, template, tmp_path / f"{number}.arrow"))
    size = (tmp_path / "2.arrow").stat().st_size
    assert size > 1_000_000
    assert peaks[2] < peaks[1] + size / 8
