import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from polar import Comparison, Group, InputError, Preference, RewardModel, Template, Triple
from polar.cli.main import main
from polar.core.checkpoint import BUNDLED
from polar.core.errors import TerminatedError
from polar.training.batches import Collator, examples_from_preferences, examples_from_triples
from polar.training.checkpoints import COMPLETE, newest_complete
from polar.training.config import FinetuneConfig, PretrainConfig, ScratchConfig
from polar.training.init_model import BOS, PAD, train_tokenizer
from polar.training.objectives import lexical_targets
from polar.training.run import finetune, pretrain
from polar.training.trainer import Discriminator, RewardTrainer

SMALL = ScratchConfig(
    vocab_size=400, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, max_positions=512
)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture
def triples(tmp_path: Path) -> str:
    """One policy answers in words, the other in digits: a pattern that a tiny network picks up in seconds."""
    digits, words = "0 1 2 3 4 5 6 7 8 9".split(), "red blue green fox dog cat sun moon tree sea".split()

    def answer(source: list[str], start: int) -> str:
        return " ".join(source[(start * 3 + step) % 10] for step in range(6))

    rows = []
    for number in range(64):
        rows.append(
            {
                "prompt": f"Say something, number {number}.",
                "reference": answer(words, number),
                "positive": answer(words, number + 1),
                "negative": answer(digits, number),
            }
        )
    return write_jsonl(tmp_path / "triples.jsonl", rows)


def config(triples: str, output: Path, **values: object) -> PretrainConfig:
    options = {"scratch": SMALL, "max_length": 256, "max_response_length": 64, "max_steps": 12, "batch_size": 8}
    return PretrainConfig(data=[triples], output=str(output), **{**options, **values})


def test_consecutive_triples_with_one_positive_become_one_group(template: Template) -> None:
    first = [Triple("p", "r", "good", f"bad {number}") for number in range(3)]
    second = [Triple("p", "r", "other", "bad 0")]
    groups = list(examples_from_triples(first + second, template))
    assert [len(example.group.branches) for example in groups] == [4, 2]
    assert groups[0].pairs == ((0, 1), (0, 2), (0, 3))


def test_ranked_lists_give_all_pairs(template: Template) -> None:
    (example,) = examples_from_preferences([Preference("p", "r", ("best", "middle", "worst"))], template)
    assert example.pairs == ((0, 1), (0, 2), (1, 2))


def test_lexical_targets_by_hand(template: Template) -> None:
    (example,) = examples_from_triples([Triple("p", " fox dog", " fox fox cat", "")], template)
    reference = example.group.reference
    (overlap, closeness), (empty_overlap, _) = lexical_targets(example.group)
    text = example.group.branches[0][:-1]
    assert overlap[:-1].tolist() == [float(token in reference) for token in text]
    hits = sum(min(text.count(token), reference.count(token)) for token in set(text))
    assert closeness[-1, 0] == pytest.approx(3 * overlap[:-1].mean() - 1.5, abs=1e-5)
    assert closeness[-1, 1] == pytest.approx(4 * 2 * hits / (len(text) + len(reference)) - 1.5, abs=1e-5)
    assert empty_overlap.tolist() == [0.0]


def test_the_loss_of_a_tree_equals_the_loss_of_separate_pairs(template: Template, reward_model: RewardModel) -> None:
    triples = [Triple("What?", "It is Beijing.", "Beijing.", f"not {number} Shanghai") for number in range(3)]
    discriminator = Discriminator(reward_model.model)
    collate = Collator()
    with torch.no_grad():
        tree = discriminator(**collate(list(examples_from_triples(triples, template))))
        margins = [
            discriminator(**collate(list(examples_from_triples([triple], template))))["margins"] for triple in triples
        ]
    assert tree["margins"].tolist() == pytest.approx(torch.cat(margins).tolist(), abs=1e-4)
    assert tree["loss"].item() == pytest.approx(
        torch.nn.functional.softplus(-torch.cat(margins)).mean().item(), abs=1e-5
    )


def test_pretraining_from_scratch_learns_and_saves(triples: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    trained = pretrain(
        config(triples, output, max_steps=60, learning_rate=3e-3, lexical_weight=1.0, eval_data=[triples], log_steps=5)
    )
    assert trained.provenance["training"]["metrics"]["eval_accuracy"] > 0.9
    loaded = RewardModel.load(output)
    comparison = Comparison("Say something.", "fox dog cat sun", "dog cat sun moon")
    assert loaded.score([comparison]) == pytest.approx(trained.score([comparison]), abs=1e-5)
    assert not any("probes" in name for name, _ in loaded.model.named_parameters())
    resolved = yaml.safe_load((output / "run" / "config.yaml").read_text())
    assert resolved["learning_rate"] == 3e-3
    assert resolved["scratch"]["hidden_size"] == 32


class CrashError(Exception):
    pass


def pretrain_until(steps: int, event: Callable[[], None], settings: PretrainConfig) -> None:
    """Something happens in the middle of the micro-batch after so many."""
    real, done = RewardTrainer.training_step, 0

    def step(self: RewardTrainer, *arguments: Any, **named: Any) -> Any:
        nonlocal done
        done += 1
        if done > steps:
            event()
        return real(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardTrainer, "training_step", step)
        pretrain(settings)


def crash() -> None:
    """The process dies, as far as what is on disk is concerned."""
    raise CrashError


def assert_same_weights(first: RewardModel, second: RewardModel) -> None:
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


LONG: dict[str, Any] = {
    "max_steps": -1,
    "epochs": 2.5,
    "batch_size": 4,
    "gradient_accumulation": 2,
    "save_steps": 3,
    "lexical_weight": 1.0,
}


def test_killed_again_and_again_it_ends_with_the_undisturbed_weights(triples: str, tmp_path: Path) -> None:
    straight = pretrain(config(triples, tmp_path / "straight", **LONG))
    steps = straight.provenance["training"]["steps"]
    assert steps >= 12  # over several epochs
    moments = random.Random(5)
    for _ in range(6):
        with pytest.raises(CrashError):
            pretrain_until(moments.randint(1, 9), crash, config(triples, tmp_path / "killed", **LONG))
    resumed = pretrain(config(triples, tmp_path / "killed", **LONG))
    assert_same_weights(straight, resumed)
    assert resumed.provenance["training"]["steps"] == steps
    assert resumed.provenance["training"]["tokens"] == straight.provenance["training"]["tokens"]


def test_a_half_written_checkpoint_is_never_loaded(triples: str, tmp_path: Path) -> None:
    straight = pretrain(config(triples, tmp_path / "straight", **LONG))
    with pytest.raises(CrashError):
        pretrain_until(20, crash, config(triples, tmp_path / "torn", **LONG))
    newest = newest_complete(tmp_path / "torn" / "run")
    assert newest is not None
    (newest / COMPLETE).unlink()  # killed while it was written: its files are torn
    for file in newest.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert_same_weights(straight, pretrain(config(triples, tmp_path / "torn", **LONG)))
    assert not newest.exists() or (newest / COMPLETE).exists()


def test_a_signal_saves_and_stops_and_the_same_command_goes_on(triples: str, tmp_path: Path) -> None:
    straight = pretrain(config(triples, tmp_path / "straight", **LONG))
    errors = {signal.SIGTERM: TerminatedError, signal.SIGINT: KeyboardInterrupt}
    before = {number: signal.getsignal(number) for number in errors}
    for number, error in errors.items():
        output = tmp_path / f"stopped-{number}"
        with pytest.raises(error, match="stopped at step 5; the same command goes on"):
            # In the fifth step, after which no checkpoint is due.
            pretrain_until(8, partial(os.kill, os.getpid(), number), config(triples, output, **LONG))
        assert {number: signal.getsignal(number) for number in errors} == before
        newest = newest_complete(output / "run")
        assert newest is not None
        assert newest.name == "checkpoint-5"
        assert_same_weights(straight, pretrain(config(triples, output, **LONG)))


def test_a_second_interrupt_ends_at_once_but_not_the_echo_of_a_launcher(
    triples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped at step 5"):
        pretrain_until(8, twice, config(triples, tmp_path / "echo", **LONG))
    monkeypatch.setattr("polar.training.checkpoints.LAUNCHER_ECHO_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt, match="ended at once; the same command without --no-resume goes on"):
        pretrain_until(8, twice, config(triples, tmp_path / "twice", **LONG, resume=False))
    newest = newest_complete(tmp_path / "twice" / "run")
    assert newest is not None
    assert newest.name == "checkpoint-3"
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_of_signals_are_put_back_after_an_error(triples: str, tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(CrashError):
        pretrain_until(2, crash, config(triples, tmp_path / "out", **LONG))
    assert [signal.getsignal(number) for number in numbers] == before


def test_training_works_in_a_thread(triples: str, tmp_path: Path) -> None:
    """As in a notebook's widget or a server; signals are the main thread's there."""
    with ThreadPoolExecutor(1) as pool:
        trained = pool.submit(pretrain, config(triples, tmp_path / "thread", max_steps=2)).result(120)
    assert_same_weights(trained, RewardModel.load(tmp_path / "thread"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_the_command_tells_how_to_go_on(
    number: int,
    code: int,
    triples: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = RewardTrainer.training_step

    def step(self: RewardTrainer, *arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(self, *arguments, **named)

    monkeypatch.setattr(RewardTrainer, "training_step", step)
    flags = "--max-steps 3 --max-length 256 --max-response-length 64 --scratch.vocab-size 400 --scratch.num-layers 1"
    assert main(["pretrain", "--data", triples, "--output", str(tmp_path / "out"), *flags.split()]) == code
    assert capsys.readouterr().err.splitlines()[-1] == "polar: stopped at step 1; the same command goes on from there"


def test_a_run_goes_on_with_its_own_settings_and_data_only(triples: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(CrashError):
        pretrain_until(10, crash, config(triples, output, **LONG))
    with pytest.raises(InputError, match=r"has batch_size x processes 4, now it is 8; go on with the same"):
        pretrain(config(triples, output, **{**LONG, "batch_size": 8}))
    with Path(triples).open("a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="had other training data"):
        pretrain(config(triples, output, **LONG))
    (output / "run" / "config.yaml").unlink()
    with pytest.raises(InputError, match="holds checkpoints but no config.yaml"):
        pretrain(config(triples, output, **LONG))
    # Begun again and killed before its first checkpoint: nothing of the first run is taken for it.
    with pytest.raises(CrashError):
        pretrain_until(2, crash, config(triples, output, **LONG, resume=False))
    again, fresh = (pretrain(config(triples, directory, **LONG)) for directory in (output, tmp_path / "fresh"))
    assert_same_weights(again, fresh)


def test_a_run_may_go_on_with_other_held_out_data(triples: str, tmp_path: Path) -> None:
    other = Path(triples).with_name("other.jsonl")
    other.write_text("".join(Path(triples).read_text().splitlines(keepends=True)[:7]))
    with pytest.raises(CrashError):
        pretrain_until(10, crash, config(triples, tmp_path / "out", **LONG, eval_data=[triples]))
    trained = pretrain(config(triples, tmp_path / "out", **LONG, eval_data=[str(other)]))
    assert "eval_loss" in trained.provenance["training"]["metrics"]


def test_rows_of_tokens_are_trained_on_and_gone_on_with(triples: str, tmp_path: Path) -> None:
    options = {**LONG, "batch_tokens": 300, "schedule": "wsd", "gradient_accumulation": 1}
    straight = pretrain(config(triples, tmp_path / "straight", **options))
    with pytest.raises(CrashError):
        pretrain_until(17, crash, config(triples, tmp_path / "killed", **options))
    assert_same_weights(straight, pretrain(config(triples, tmp_path / "killed", **options)))
    log = json.loads((tmp_path / "straight" / "run" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert max(rates) == pytest.approx(1e-5)
    assert rates[-1] < 0.8e-5  # it decays at the end


def test_micro_batches_ask_no_other_process(triples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only optimizer steps do, once about losses and once about signals; the rest is before and after the training."""
    asked = []

    def largest(number: int) -> int:
        asked.append(number)
        return number

    for module in ("distributed", "checkpoints"):
        monkeypatch.setattr(f"polar.training.{module}.largest", largest)
    counts = []
    for number, (steps, parts) in enumerate([(1, 1), (2, 1), (2, 4)]):
        asked.clear()
        values = {"max_steps": steps, "gradient_accumulation": parts, "batch_size": 8 // parts}
        pretrain(config(triples, tmp_path / str(number), **values))
        counts.append(len(asked))
    assert counts[1] == counts[0] + 2
    assert counts[2] == counts[1]


def test_gradient_checkpointing_gives_the_same_weights(triples: str, tmp_path: Path) -> None:
    plain = pretrain(config(triples, tmp_path / "plain"))
    thrifty = pretrain(config(triples, tmp_path / "thrifty", gradient_checkpointing=True))
    for name, weight in plain.model.state_dict().items():
        assert torch.allclose(weight, thrifty.model.state_dict()[name], atol=1e-6), name
    assert RewardModel.load(tmp_path / "thrifty").score([Comparison("p", "r", "o")]) == pytest.approx(
        plain.score([Comparison("p", "r", "o")]), abs=1e-4
    )


@pytest.mark.slow
def test_compiled_layers_give_the_same_weights(triples: str, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    plain = pretrain(config(triples, tmp_path / "plain"))
    compiled = pretrain(config(triples, tmp_path / "compiled", compile=True))
    for name, weight in plain.model.state_dict().items():
        assert torch.allclose(weight, compiled.model.state_dict()[name], atol=1e-4), name


def test_a_finished_output_is_not_overwritten(triples: str, checkpoint: Path) -> None:
    with pytest.raises(InputError, match="holds a trained checkpoint already"):
        pretrain(config(triples, checkpoint))


def test_finetuning_a_reward_model(checkpoint: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Question {n}?", "reference": "fox", "chosen": f"fox {n}", "rejected": f"{n} sea tree"}
        for n in range(16)
    ]
    data = write_jsonl(tmp_path / "preferences.jsonl", rows)
    before = RewardModel.load(checkpoint)
    tuned = finetune(
        FinetuneConfig(model=str(checkpoint), data=[data], output=str(tmp_path / "rm"), learning_rate=1e-3, epochs=4)
    )
    good, bad = (Comparison("Question 3?", "fox", output) for output in ("fox 3", "3 sea tree"))

    def margin(model: RewardModel) -> float:
        first, second = model.score([good, bad])
        return first - second

    assert margin(tuned) > max(0.0, margin(before))
    assert tuned.template.settings == before.template.settings


def test_a_backbone_with_a_recurrent_state_is_trained_on_what_its_sequences_give(
    llama: RewardModel, tmp_path: Path
) -> None:
    kind = {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    jamba = AutoConfig.for_model(
        "jamba", **kind, **sizes, vocab_size=512, pad_token_id=0, num_labels=1, mamba_d_state=8, initializer_range=0.3
    )
    network = AutoModelForSequenceClassification.from_config(jamba, attn_implementation="eager").eval()
    network.score.weight.data.normal_()
    RewardModel(network, llama.tokenizer, llama.template).save(tmp_path / "start")
    rows = [
        {"prompt": f"Question {n}?", "reference": "fox", "chosen": f"fox {n}", "rejected": f"{n} sea tree"}
        for n in range(8)
    ]

    def loss(directory: Path) -> float:
        """Of all rows, by transformers alone and one sequence at a time."""
        model = AutoModelForSequenceClassification.from_pretrained(directory, attn_implementation="eager")
        margins = []
        for row in rows:
            group = Group(row["prompt"], row["reference"], (row["chosen"], row["rejected"]))
            with torch.no_grad():
                sequences = llama.template.encode_group(group).sequences()
                chosen, rejected = (model(torch.tensor([ids])).logits.item() for ids in sequences)
            margins.append(chosen - rejected)
        return float(torch.nn.functional.softplus(-torch.tensor(margins)).mean())

    data = write_jsonl(tmp_path / "preferences.jsonl", rows)
    start, output = str(tmp_path / "start"), str(tmp_path / "rm")
    settings = {"data": [data], "eval_data": [data], "max_steps": 1, "batch_size": 8, "learning_rate": 1e-4}
    tuned = finetune(FinetuneConfig(model=start, output=output, **settings))
    metrics = tuned.provenance["training"]["metrics"]
    assert metrics["train_loss"] == pytest.approx(loss(tmp_path / "start"), abs=1e-4)
    assert metrics["eval_loss"] == pytest.approx(loss(tmp_path / "rm"), abs=1e-4)
    assert metrics["eval_loss"] < metrics["train_loss"]


@pytest.mark.parametrize("with_pad", [True, False])
def test_a_causal_language_model_gets_a_head_and_tokens(triples: str, tmp_path: Path, with_pad: bool) -> None:
    tokenizer = train_tokenizer(["fox dog cat 1 2 3"], 300)
    special = {"bos_token": BOS, "eos_token": "<s>"} | ({"pad_token": PAD} if with_pad else {})
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=512,
        )
    )
    language_model.save_pretrained(tmp_path / "lm")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "lm")
    trained = pretrain(config(triples, tmp_path / "rm", model=str(tmp_path / "lm"), max_steps=2))
    assert trained.template.settings.bos_token_id == tokenizer.token_to_id(BOS)
    assert RewardModel.load(tmp_path / "rm").provenance["base"]["name"] == str(tmp_path / "lm")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio must be in"),
        ({"decay_ratio": 0.0}, "decay_ratio must be in"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ({"epochs": 0, "max_steps": -1}, "epochs must be above 0"),
        ({"model": "no/such/model/here"}, "no such checkpoint"),
    ],
)
def test_bad_settings_are_one_clear_line(triples: str, tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        pretrain(config(triples, tmp_path / "out", **values))
    assert "\n" not in str(error.value)


def test_the_bundled_model_can_be_finetuned_by_trl(tmp_path: Path) -> None:
    """A peer without any code of ours: TRL's RewardTrainer loads the bundled model and steps once."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    data = datasets.Dataset.from_list([{"prompt": "2+2?", "chosen": " 4", "rejected": " five"}] * 4)
    trainer = trl.RewardTrainer(
        model=str(BUNDLED["polar-nano"]),
        args=trl.RewardConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=2,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=data,
    )
    before = trainer.model.score.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.score.weight)


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_nothing(triples: str, tmp_path: Path) -> None:
    """Real processes, real kills: the same command until it is done."""
    flags = "--max-steps 300 --batch-size 4 --save-steps 10 --max-length 256 --max-response-length 64 --log-steps 99"
    shape = "--scratch.hidden-size 32 --scratch.intermediate-size 64 --scratch.num-layers 2 --scratch.num-heads 2"
    shape += " --scratch.vocab-size 400"

    def start(output: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "polar.cli.main", "pretrain", "--data", triples, "--output", str(output)]
        return subprocess.Popen([*command, *flags.split(), *shape.split()], env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert start(tmp_path / "straight").wait(120) == 0
    moments, killed = random.Random(1), tmp_path / "killed"
    for _ in range(5):
        process = start(killed)
        found = set(killed.glob("run/checkpoint-*"))
        deadline = time.monotonic() + 60
        while set(killed.glob("run/checkpoint-*")) == found and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.15))  # somewhere in the writing, or in the steps after it
        process.kill()
        process.wait(30)
    assert start(killed).wait(120) == 0
    assert_same_weights(RewardModel.load(tmp_path / "straight"), RewardModel.load(killed))
