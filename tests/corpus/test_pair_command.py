import json
from pathlib import Path

import pytest

from polar.cli.pair import pair as pair_command
from polar.core.errors import InputError
from polar.core.records import Trajectory, prompt_id
from polar.corpus.pair import pair
from polar.data.readers import read_trajectories, read_triples
from polar.data.writers import open_writer, record_to_dict


@pytest.fixture
def corpus_file(tmp_path: Path) -> str:
    outputs = {"A": ["1", "2"], "B": ["3", "4"], "C": ["5"]}
    corpus = [Trajectory(f"prompt {n}", name, text) for n in range(4) for name in outputs for text in outputs[name]]
    with open_writer(tmp_path / "samples.jsonl") as writer:
        for trajectory in corpus:
            writer.write(record_to_dict(trajectory))
    return str(tmp_path / "samples.jsonl")


def test_the_command_writes_the_triples_of_the_function(
    corpus_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "triples.jsonl"
    pair_command([corpus_file], output=str(output), negatives=2, seed=3)
    expected = list(pair(read_trajectories(corpus_file), negatives=2, seed=3))
    assert list(read_triples(output)) == expected
    assert len(expected) == 16
    shown = " ".join(capsys.readouterr().err.split())
    assert "20 trajectories" in shown
    assert "16 triples" in shown


def test_the_command_takes_lists_of_policies_and_prompts(corpus_file: str, tmp_path: Path) -> None:
    (tmp_path / "policies.txt").write_text("A\n\n  C  \n", "utf-8")
    (tmp_path / "prompts.txt").write_text(prompt_id("prompt 1") + "\n", "utf-8")
    output, policies, prompts = (str(tmp_path / name) for name in ("triples.jsonl", "policies.txt", "prompts.txt"))
    pair_command([corpus_file], output=output, policies=policies, prompt_ids=prompts)
    assert [(t.prompt, t.policy, t.negative_policy) for t in read_triples(output)] == [("prompt 1", "A", "C")]


def test_the_command_refuses_to_write_nothing(
    corpus_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "triples.jsonl"
    with pytest.raises(InputError, match="no triple could be drawn"):
        pair_command([corpus_file], output=str(output), exclude_policies="[BC]")
    assert not output.exists()
    assert "4 without triples: only one policy" in " ".join(capsys.readouterr().err.split())


def test_the_command_names_a_list_that_it_cannot_read(corpus_file: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n", "utf-8")
    for name, words in (("missing.txt", "not readable"), ("empty.txt", "no names")):
        with pytest.raises(InputError, match=f"{name}: {words}"):
            pair_command([corpus_file], output=str(tmp_path / "t.jsonl"), policies=str(tmp_path / name))


def test_the_command_says_that_policies_with_one_sample_can_only_be_negatives(
    corpus_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_writer(tmp_path / "single.jsonl") as writer:
        for trajectory in read_trajectories(corpus_file):
            if trajectory.output in ("1", "3", "5"):
                writer.write(record_to_dict(trajectory))
    with pytest.raises(InputError, match="none of the 3 policies has two different outputs.*at least twice"):
        pair_command([str(tmp_path / "single.jsonl")], output=str(tmp_path / "t.jsonl"))
    assert "4 without triples: no policy with two different outputs" in " ".join(capsys.readouterr().err.split())


def test_the_command_reads_a_table_of_policies_and_reports_shortcuts(
    corpus_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, output, counts = (tmp_path / name for name in ("policies.jsonl", "triples.parquet", "counts.jsonl"))
    table.write_text('{"policy":"A","family":"f","step":1}\n{"policy":"C","family":"f","step":2}\n')
    pair_command(
        [corpus_file],
        output=str(output),
        strategy="checkpoint",
        policies_table=str(table),
        policy_counts=str(counts),
        wrapper="pretrain",
        temp=tmp_path,
    )
    triples = list(read_triples(output))
    assert {(t.policy, t.negative_policy, t.strategy, t.wrapper) for t in triples} == {
        ("A", "C", "checkpoint", "pretrain")
    }
    assert len(triples) == 4
    shown = " ".join(capsys.readouterr().err.split())
    assert "4 not drawn: no other policy that the strategy allows" in shown  # B has no family
    assert "4 with a negative by a policy that is never positive" in shown
    assert "100.0% are solved by knowing how often each policy is positive" in shown
    assert "50.0% are solved by closeness in length" in shown
    assert [json.loads(line) for line in counts.read_text().splitlines()] == [
        {"policy": "A", "positive": 4, "negative": 0},
        {"policy": "C", "positive": 0, "negative": 4},
    ]
    assert {path.name for path in tmp_path.iterdir()} == {table.name, output.name, counts.name, Path(corpus_file).name}
