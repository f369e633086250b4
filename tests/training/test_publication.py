"""What a run leaves in its output, and what stays of it when the process is killed."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from polar import InputError, RewardModel
from polar.core.checkpoint import CHECKPOINT_FILE, own_files, read_checkpoint_file
from polar.model.weights import weights_hash
from polar.training import run
from polar.training.config import FinetuneConfig, LoraSettings
from polar.training.init_model import fitting_lengths
from polar.training.run import finetune
from tests.killing import files_of_at_most, killed_before_change


def row(**values: str) -> str:
    return json.dumps({"prompt": "q", "reference": "fox", "chosen": "fox", "rejected": "tree", **values}) + "\n"


ROWS = [row(prompt=f"Question {n}?", chosen=f"fox {n}", rejected=f"{n} sea tree") for n in range(8)]


class KilledError(Exception):
    pass


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(ROWS))
    return path


def settings(data: Path, base: Path, output: Path, **values: Any) -> FinetuneConfig:
    options = {"model": str(base), "data": [str(data)], "output": str(output), "max_steps": 2, "batch_size": 2}
    return FinetuneConfig(**{**options, **values})


@pytest.fixture
def trained(data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FinetuneConfig:
    """A run that was killed when the last step was done and nothing published."""
    config = settings(data, checkpoint, tmp_path / "out")

    def killed(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(run, "_publish", killed)
        with pytest.raises(KilledError):
            finetune(config)
    return config


def weights_of(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def test_the_same_command_publishes_what_a_kill_left(trained: FinetuneConfig, data: Path, checkpoint: Path) -> None:
    """In the middle of moving; the slow test below tries all points."""
    output = Path(trained.output)
    straight = finetune(settings(data, checkpoint, output.with_name("straight")))
    assert killed_before_change(5, counted_from("put_in_place", trained))
    assert {path.name for path in own_files(output)} == {"config.json", "model.safetensors"}
    assert finetune(trained).provenance["training"]["steps"] == 2
    assert RewardModel.load(output).provenance["settings"]["max_steps"] == 2
    assert weights_of(output) == weights_of(output.with_name("straight"))
    assert straight.provenance["training"]["cut"]["examples"] == 0


def counted_from(function: str, config: FinetuneConfig) -> Callable[[Callable[[], None]], object]:
    """The training, with changes counted from the call of this function on."""

    def work(begin: Callable[[], None]) -> None:
        real = getattr(run, function)

        def counted(*arguments: Any) -> None:
            begin()
            real(*arguments)

        setattr(run, function, counted)
        finetune(config)

    return work


@pytest.mark.slow
def test_a_kill_at_any_step_of_the_publication_loses_nothing(
    trained: FinetuneConfig, data: Path, checkpoint: Path
) -> None:
    output = Path(trained.output)
    finetune(settings(data, checkpoint, output.with_name("straight")))
    loaded = 0
    for number in count(1):
        shutil.copytree(output, target := output.with_name(f"out-{number}"))
        config = settings(data, checkpoint, target)
        killed = killed_before_change(number, counted_from("_publish", config))
        if (target / CHECKPOINT_FILE).exists():
            loaded += 1
        else:
            with pytest.raises(InputError):
                RewardModel.load(target)
            finetune(config)
        assert weights_of(target) == weights_of(output.with_name("straight"))
        RewardModel.load(target)
        if not killed:
            break
    assert not list(target.glob("run/*final*"))
    assert number > 20
    assert loaded >= 2  # before the emptied directory is removed, and at the end


def test_files_that_the_checkpoint_would_replace_are_refused_before_the_training(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"  # where somebody trains a language model into its own directory
    shutil.copytree(checkpoint, base)
    (base / CHECKPOINT_FILE).unlink()
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(InputError, match=r"holds files that the trained checkpoint would replace \(config\.json"):
        finetune(settings(data, checkpoint, base))
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_beginning_again_removes_the_files_of_the_run_alone(
    trained: FinetuneConfig, data: Path, checkpoint: Path
) -> None:
    output = Path(trained.output)
    mine = [output / "job.log", output / "run" / "notes.txt", output / "run" / "checkpoint-best" / "model.safetensors"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    finetune(settings(data, checkpoint, output, resume=False, max_steps=1))
    assert [path.read_text() for path in mine] == ["precious"] * 3
    assert not (output / "run" / "checkpoint-2").exists()


@pytest.mark.parametrize("output", ["preferences.jsonl", "preferences.jsonl/rm", "/proc/rm"])
def test_an_output_that_cannot_be_written_is_one_line(
    output: str, data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=output) as error:
        finetune(settings(data, checkpoint, tmp_path / output))
    assert "\n" not in str(error.value)
    assert data.read_text() == "".join(ROWS)


@pytest.mark.parametrize("share", [0.5, 1.5], ids=["weights", "optimizer"])
def test_a_disk_that_is_full_at_a_checkpoint_is_one_line(
    share: float, data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    config = settings(data, checkpoint, tmp_path / "rm", save_steps=1)
    weights = (checkpoint / "model.safetensors").stat().st_size
    with files_of_at_most(int(share * weights)), pytest.raises(InputError) as error:
        finetune(config)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'rm' / 'run'}: the checkpoint of step 1 cannot be written: ")
    assert message.endswith("; make room, and the same command goes on from the newest whole one")
    assert "\n" not in message
    assert finetune(config).provenance["training"]["steps"] == 2


@pytest.mark.parametrize("held_out", [False, True])
def test_an_example_that_the_attention_does_not_see_whole_is_named_before_the_training(
    held_out: bool, data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    window = MistralForCausalLM(
        MistralConfig(
            vocab_size=512, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, max_position_embeddings=1024, sliding_window=100,
        )
    )  # fmt: skip
    window.save_pretrained(base := tmp_path / "window")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, base)
    long = tmp_path / "long.jsonl"
    long.write_text("".join(ROWS[:3]) + row(prompt="A long one " * 20))
    used, more = (data, {"eval_data": [str(long)]}) if held_out else (long, {})
    with pytest.raises(InputError, match=r'^record 4 \("A long one .*slides over 100; lower max_length to 100$'):
        finetune(settings(used, base, tmp_path / "rm", max_steps=1, **more))
    assert not list((tmp_path / "rm" / "run").glob("checkpoint-*"))
    assert finetune(settings(used, base, tmp_path / "rm", max_steps=1, max_length=100, max_response_length=20, **more))


def test_the_checkpoint_tells_its_base_its_data_and_its_settings(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    first = RewardModel.load(checkpoint)
    first.provenance = {"name": "polar-nano", "recipe": "recipes/nano", "data": "somebody's"}
    first.save(checkpoint)
    (tmp_path / "more").mkdir()
    shutil.copy(data, tmp_path / "more" / "a.jsonl")
    (tmp_path / "more" / "b.jsonl").write_text(ROWS[0] + '{"prompt": "no more"}\n')
    held_out = {"eval_data": [str(tmp_path / "more")], "on_bad_row": "skip"}
    finetune(settings(data, checkpoint, tmp_path / "rm", lora=LoraSettings(rank=2), **held_out))
    found = read_checkpoint_file(tmp_path / "rm")["provenance"]
    assert found.keys() == {"made_by", "base", "data", "eval_data", "settings", "training", "lora"}
    assert found["made_by"].endswith(" finetune")
    assert found["base"] == {
        "name": str(checkpoint),
        "hash": weights_hash(checkpoint),
        "provenance": {"name": "polar-nano", "recipe": "recipes/nano", "data": "somebody's"},
    }
    digest = sha256(data.read_bytes()).hexdigest()
    assert found["data"] == [{"name": str(data), "rows": 8, "skipped": 0, "sha256": {str(data): digest}}]
    (held_out,) = found["eval_data"]
    assert (held_out["rows"], held_out["skipped"]) == (9, 1)
    assert held_out["sha256"][str(tmp_path / "more" / "a.jsonl")] == digest
    assert len(held_out["sha256"]) == 2
    assert (found["settings"]["learning_rate"], found["settings"]["lora"]["rank"]) == (1e-5, 2)


def test_a_run_that_goes_on_tells_the_same_and_needs_the_same_base(
    trained: FinetuneConfig, data: Path, checkpoint: Path
) -> None:
    straight = finetune(settings(data, checkpoint, Path(trained.output).with_name("straight")))
    weights = weights_of(checkpoint)
    model = RewardModel.load(checkpoint)
    model.model.score.weight.data += 1
    model.save(checkpoint)
    with pytest.raises(InputError, match=r"had other training data or settings \(base\)"):
        finetune(trained)
    (checkpoint / "model.safetensors").write_bytes(weights)
    resumed = finetune(trained)
    assert resumed.provenance["data"] == straight.provenance["data"]
    assert resumed.provenance["base"] == straight.provenance["base"]


def test_what_is_cut_is_counted_and_told(
    data: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [row(prompt="long " * 2000), row(reference="fox " * 300, chosen="cat " * 300)]
    data.write_text("".join([*ROWS, *long]))
    tuned = finetune(settings(data, checkpoint, tmp_path / "rm"))
    assert tuned.provenance["training"]["cut"] == {"examples": 2, "prompt": 1, "reference": 1, "answers": 1}
    told = [line for line in caplog.messages if "were cut to fit" in line]
    assert [line.split(";")[0] for line in told] == [
        "2 of 10 examples were cut to fit the model: the prompt of 1, the reference of 1, answers of 1"
    ]


def test_a_model_with_a_short_context_gets_lengths_that_fit(
    data: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=200, initializer_range=0.1,
        )
    )  # fmt: skip
    short.save_pretrained(base := tmp_path / "short")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, base)
    with caplog.at_level("INFO", logger="polar"):
        tuned = finetune(settings(data, base, tmp_path / "rm")).template.settings
    assert (tuned.max_length, tuned.max_response_length) == (200, 50)
    assert "max_length 200, max_response_length 50: the usual 16384 and 4096 have no room" in caplog.text
    for start in (base, checkpoint):  # found before the training, not when the result is saved
        with pytest.raises(InputError, match="max_length is 9000, but the model has (200|1024) positions"):
            finetune(settings(data, start, tmp_path / "long", max_length=9000, max_response_length=20))


@pytest.mark.parametrize(
    ("asked", "usual", "positions", "expected"),
    [
        ((None, None), (16384, 4096), 32768, (16384, 4096)),
        ((None, None), (16384, 4096), None, (16384, 4096)),
        ((None, None), (16384, 4096), 8192, (8192, 2048)),
        ((512, None), (1024, 256), 1024, (512, 128)),
        ((600, None), (1024, 256), 1024, (600, 256)),
        ((None, 500), (1024, 256), 1024, (1024, 500)),
        ((512, 4096), (1024, 256), 1024, (512, 4096)),  # the template says that this does not fit
    ],
)
def test_lengths_are_as_asked_or_fit(asked: Any, usual: Any, positions: int | None, expected: Any) -> None:
    assert fitting_lengths(asked, usual, positions) == expected
