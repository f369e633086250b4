"""`polar.pretrain` and `polar.finetune` on files and on rows in memory; in a thread, in an event loop."""

import asyncio
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import polar
from polar import InputError, Preference, RewardModel, Triple
from polar.training import run
from polar.training.trainer import RewardTrainer

SHAPE = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 1}
SETTINGS: dict[str, Any] = {"max_length": 128, "max_response_length": 32, "max_steps": 4, "batch_size": 4}
TRIPLES = [Triple(f"Number {n}?", "red fox", f"red {n}", f"{n} 7" + n % 3 * " 9") for n in range(16)]
ROWS = [{"prompt": t.prompt, "reference": t.reference, "positive": t.positive, "negative": t.negative} for t in TRIPLES]
PAIRS = [{"prompt": "2+2?", "reference": "4", "chosen": f"It is 4, {n}.", "rejected": f"{n}"} for n in range(8)]


def same_weights(first: RewardModel, second: RewardModel) -> bool:
    weights = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in weights)


def pretrain(data: Any, output: Path, **settings: Any) -> RewardModel:
    return polar.pretrain("scratch", data, output=output, scratch=SHAPE, **{**SETTINGS, **settings})


def test_files_records_and_dictionaries_train_the_same_model(tmp_path: Path) -> None:
    file = tmp_path / "triples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    from_file = pretrain(file, tmp_path / "file", eval_data=[file])
    from_records = pretrain(TRIPLES, tmp_path / "records", eval_data=iter(ROWS))
    assert same_weights(from_file, from_records)
    figures = [model.provenance["training"]["metrics"]["eval_loss"] for model in (from_file, from_records)]
    assert figures[0] == figures[1]
    (facts,) = from_records.provenance["data"]
    assert facts["rows"] == 16
    assert Path(facts["name"]).parent == tmp_path / "records" / "run" / "data"
    assert RewardModel.load(tmp_path / "records").score(("p", "r", "o")) == pytest.approx(
        from_records.score(("p", "r", "o")), abs=1e-5
    )


def test_a_data_set_of_hugging_face_trains_in_a_thread_with_a_running_event_loop(
    checkpoint: Path, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(PAIRS)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    found: list[RewardModel] = []

    async def cell() -> None:
        found.append(polar.finetune(str(checkpoint), data, output=tmp_path / "rm", max_steps=2, batch_size=4))

    thread = threading.Thread(target=lambda: asyncio.run(cell()))
    thread.start()
    thread.join(120)
    (tuned,) = found
    expected = polar.finetune(checkpoint, PAIRS, output=tmp_path / "again", max_steps=2, batch_size=4)
    assert same_weights(tuned, expected)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_stopped_run_on_rows_in_memory_goes_on_and_refuses_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = pretrain(TRIPLES, tmp_path / "straight")
    steps = 0

    def step(self: RewardTrainer, *arguments: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return RewardTrainer.__mro__[1].training_step(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(RewardTrainer, "training_step", step, raising=False)
        with pytest.raises(KeyboardInterrupt):
            pretrain(iter(TRIPLES), tmp_path / "out", save_steps=2)
    with pytest.raises(InputError, match="the run that was begun here has data"):
        pretrain(TRIPLES[1:], tmp_path / "out", save_steps=2)
    assert same_weights(pretrain(iter(TRIPLES), tmp_path / "out", save_steps=2), straight)


@pytest.mark.parametrize(
    ("data", "settings", "problem"),
    [
        ([*ROWS, {"prompt": "p"}], {}, 'row:17: field "reference"'),
        ([Preference("p", "r", ("a", "b"))], {}, 'row:1: field "positive"'),
        (["a.jsonl", {"prompt": "p"}], {}, "row:1: expected a dictionary or a record, found the string"),
        ({"train": ROWS, "test": ROWS}, {}, "data: expected files or rows, found one mapping of train, test; choose a"),
        ([], {}, "data: expected files or rows, found none"),
        (iter([]), {}, "row: expected at least one row, found none"),
        (ROWS, {"epochz": 2}, "settings: epochz: "),
        (ROWS, {"max_steps": "many"}, "settings: max_steps: "),
        (ROWS, {"lora": {"ranks": 2}}, "settings: lora.ranks: "),
        (ROWS, {"learning_rate": -1}, "settings: learning_rate must be above 0, found -1"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(tmp_path: Path, data: Any, settings: Any, problem: str) -> None:
    with pytest.raises(InputError, match=f"^{problem}"):
        pretrain(data, tmp_path / "out", **settings)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_model_in_memory_and_an_output_in_use_are_refused_before_rows_are_read(
    llama: RewardModel, checkpoint: Path
) -> None:
    with pytest.raises(InputError, match="^model: expected the name or directory of a checkpoint, found a RewardModel"):
        polar.finetune(llama, PAIRS, output="out")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds a trained checkpoint already"):
        polar.finetune(checkpoint, PAIRS, output=checkpoint)
    assert not (checkpoint / "run").exists()


def test_the_commands_and_the_functions_are_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from polar.cli.main import main

    seen: list[Any] = []

    def stop(config: Any) -> RewardModel:
        seen.append(config)
        raise InputError("enough")

    monkeypatch.setattr(run, "finetune", stop)
    words = ["--model", "m", "--data", "d", "--output", str(tmp_path), "--lora.rank", "4", "--learning-rate", "1e-4"]
    assert main(["finetune", *words]) == 2
    with pytest.raises(InputError, match="enough"):
        polar.finetune("m", "d", output=tmp_path, lora={"rank": 4}, learning_rate=1e-4)
    assert seen[0] == seen[1]
