"""`polar sample` with three local policies of different size and family, and its mistakes."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer

from polar.cli.main import main
from polar.core.records import text_of
from polar.data.readers import read_trajectories, read_triples
from polar.data.writers import open_writer
from tests.corpus.engines.tiny import save_policy
from tests.corpus.sampling import files


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("policies")
    policies = []
    for number, (architecture, hidden, kind) in enumerate(
        [
            ("llama", 32, "chat"),
            ("qwen2", 48, "chat"),
            ("qwen3", 64, "chat"),
            ("llama", 48, "base"),
            ("qwen3", 32, "base"),
        ]
    ):
        name = f"{architecture}-{hidden}-{kind}"
        save_policy(directory / name, tokenizer, architecture, number, hidden)
        engine = {"type": "transformers", "model": str(directory / name), "batch_size": 4, "dtype": "float32"}
        policies.append(
            {"name": name, "kind": kind, "family": architecture, "engine": engine, "decoding": {"max_tokens": 8}}
        )
    path = directory / "pool.yaml"
    path.write_text(yaml.safe_dump({"policies": policies}))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    with open_writer(path) as writer:
        for number in range(6):
            writer.write({"prompt": f"What is {number}+{number}?"})
        for number in range(4):
            writer.write({"prompt": f"Once upon {number}", "wrapper": "pretrain"})
    return path


def test_three_chat_and_two_base_policies_become_a_corpus_and_triples(
    pool: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(prompts), "--pool", str(pool), "--output", str(tmp_path / "corpus")]) == 0
    error = capsys.readouterr().err
    assert "wrote 30 samples" in error
    assert "tokens out" in error
    trajectories = list(read_trajectories(tmp_path / "corpus"))
    assert Counter(trajectory.wrapper for trajectory in trajectories) == {"sft": 18, "pretrain": 12}
    assert all((trajectory.wrapper == "sft") == trajectory.policy.endswith("chat") for trajectory in trajectories)
    assert {trajectory.family for trajectory in trajectories} <= {"llama", "qwen2", "qwen3"}
    assert any(text_of(trajectory.output) for trajectory in trajectories)
    assert main(["sample", str(prompts), "--pool", str(pool), "--output", str(tmp_path / "again")]) == 0
    assert files(tmp_path / "again") == files(tmp_path / "corpus")
    assert main(["pair", str(tmp_path / "corpus"), "--output", str(tmp_path / "triples.jsonl")]) == 0
    assert {triple.wrapper for triple in read_triples(tmp_path / "triples.jsonl")} == {"sft", "pretrain"}


def test_what_could_not_be_drawn_is_one_line_and_the_rest_is_written(
    pool: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(pool.read_text())
    dead = {"type": "http", "base_url": "http://127.0.0.1:9/v1", "model": "m", "deadline": 0.2}
    content["policies"][0]["engine"] = dead
    broken = tmp_path / "pool.yaml"
    broken.write_text(yaml.safe_dump(content))
    corpus = tmp_path / "corpus"
    for _ in range(2):
        assert main(["sample", str(prompts), "--pool", str(broken), "--output", str(corpus)]) == 2
        error = capsys.readouterr().err
        assert "http://127.0.0.1:9/v1/chat/completions gives no answers: ConnectError" in " ".join(error.split())
        missing = json.loads((corpus / "_manifest.json").read_text())["missing"]
        last = error.strip().splitlines()[-1]
        assert f"{missing} of 30 samples could not be drawn" in last
        assert "http://127.0.0.1:9/v1/chat/completions: " in last
        assert "the same command tries these again" in last
        assert len(list(read_trajectories(corpus))) == 30 - missing > 0


def test_a_corpus_of_which_nothing_could_be_drawn_is_never_complete(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = {"type": "http", "base_url": "http://127.0.0.1:9/v1", "model": "m", "deadline": 0.1}
    policies = [{"name": f"{kind} {n}", "kind": kind, "engine": dead} for kind in ("base", "chat") for n in range(2)]
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"policies": policies}))
    for _ in range(2):
        command = ["sample", str(prompts), "--pool", str(tmp_path / "pool.yaml"), "--output", str(tmp_path / "corpus")]
        assert main(command) == 2
        assert "30 of 30 samples could not be drawn" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--design", "square"], "square"),
        (["--samples", "0"], "samples must be at least 1"),
        (["--ray", "127.0.0.1:1"], "--ray 127.0.0.1:1: no Ray cluster there"),
        (["--pool", "nowhere.yaml"], "nowhere.yaml: not readable as a pool"),
    ],
)
def test_a_wrong_flag_is_one_line(
    pool: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    command = ["sample", str(prompts), "--output", str(tmp_path / "corpus")]
    assert main([*command, *([] if "--pool" in flags else ["--pool", str(pool)]), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "corpus").exists()
