import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from polar import Comparison, InputError, Preference, RewardModel, Template
from polar.cli.convert import convert
from polar.cli.main import main
from polar.model import adapters as saved_adapters
from polar.training import run
from polar.training.batches import Collator, examples_from_preferences
from polar.training.checkpoints import newest_complete
from polar.training.config import FinetuneConfig, LoraSettings, PretrainConfig
from polar.training.init_model import add_adapters
from polar.training.run import finetune, pretrain
from polar.training.trainer import Discriminator, RewardTrainer

peft = pytest.importorskip("peft")

COMPARISONS = [Comparison("Question 3?", "fox dog", output) for output in ("fox 3", "3 sea tree", "")]


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ranked lists of three."""
    rows = [
        {"prompt": f"Question {n}?", "reference": "fox dog", "ranked": [f"fox {n}", f"dog {n} sea", f"{n} sea tree"]}
        for n in range(16)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "preferences.jsonl", rows)


@pytest.fixture
def language_model(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A causal language model that does not know our two tokens; by parameter, with tied embeddings."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<pad>", "<s>"], initial_alphabet=alphabet))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=getattr(request, "param", False),
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>")
    fast.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def settings(preferences: str, model: Path, output: Path, **values: Any) -> FinetuneConfig:
    options = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "lora": LoraSettings(rank=4, dropout=0.1)}
    lengths = {"max_length": 256, "max_response_length": 64}
    return FinetuneConfig(data=[preferences], model=str(model), output=str(output), **{**options, **lengths, **values})


@pytest.fixture(scope="module")
def trained(preferences: str, llama: RewardModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    llama.save(directory / "base")
    finetune(settings(preferences, directory / "base", directory / "adapter", max_steps=2))
    return directory


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A trained adapter on a reward model."""
    return Path(shutil.copytree(trained / "adapter", tmp_path / "adapter", ignore=shutil.ignore_patterns("run")))


def logits(model: Any, template: Template) -> list[float]:
    """Rewards by a model's own forward pass, one sequence after the other."""
    with torch.no_grad():
        sequences = [template.encode(comparison).sequences()[0] for comparison in COMPARISONS]
        return [float(model(input_ids=torch.tensor([ids])).logits) for ids in sequences]


def test_loss_and_gradients_are_those_of_the_merged_weights(
    reward_model: RewardModel, template: Template, tmp_path: Path
) -> None:
    reward_model.save(tmp_path / "base")
    adapted = RewardModel.load(tmp_path / "base")
    torch.manual_seed(1)
    add_adapters(adapted, LoraSettings(rank=3, alpha=6.0), str(tmp_path / "base"))
    for name, weight in adapted.model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            weight.data.normal_(0, 0.1)
    adapted.save(tmp_path / "adapter")
    merged = RewardModel.load(tmp_path / "adapter")
    preferences = [
        Preference("What?", "It is Beijing.", ("Beijing.", "In Beijing", "Shanghai")),
        Preference("p", "r", ("a", "b")),
    ]
    batch = Collator()(list(examples_from_preferences(preferences, template)))
    found, expected = Discriminator(adapted.model)(**batch), Discriminator(merged.model)(**batch)
    assert found["margins"].tolist() == pytest.approx(expected["margins"].tolist(), abs=1e-4)
    found["loss"].backward()
    expected["loss"].backward()
    whole, parts = dict(merged.model.named_parameters()), dict(adapted.model.named_parameters())
    checked = 0
    for name, weight in parts.items():
        if name == "score.modules_to_save.default.weight":
            torch.testing.assert_close(weight.grad, whole["score.weight"].grad, rtol=1e-4, atol=1e-5)
        elif "lora_B" in name:  # W = W_base + alpha / rank * B A
            down = parts[name.replace("lora_B", "lora_A")]
            gradient = whole[name.replace(".lora_B.default", "")].grad
            torch.testing.assert_close(weight.grad, 2.0 * gradient @ down.T, rtol=1e-3, atol=1e-5)
            checked += 1
        elif "lora_A" not in name:
            assert weight.grad is None
    assert checked == 14  # seven linear layers in each of two layers


def test_an_adapter_is_saved_loaded_and_merged_with_the_same_rewards(
    preferences: str, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, base_files = RewardModel.load(checkpoint), {file: file.read_bytes() for file in checkpoint.iterdir()}
    with caplog.at_level("INFO", logger="polar"):
        trained = finetune(settings(preferences, checkpoint, tmp_path / "adapter", gradient_accumulation=2))
    rewards = trained.score(COMPARISONS)
    assert rewards != pytest.approx(before.score(COMPARISONS), abs=0.1)
    names = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "polar.json"} <= names
    assert "config.json" not in names  # transformers would look for whole weights beside it
    assert {file: file.read_bytes() for file in checkpoint.iterdir()} == base_files
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not torch.equal(weights["base_model.model.score.weight"], before.model.score.weight)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}

    loaded = RewardModel.load(tmp_path / "adapter")
    assert loaded.score(COMPARISONS) == pytest.approx(rewards, abs=1e-4)
    assert loaded.provenance["lora"]["rank"] == 4
    convert(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert RewardModel.load(tmp_path / "merged").score(COMPARISONS) == pytest.approx(rewards, abs=1e-4)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert logits(plain, loaded.template) == pytest.approx(rewards, abs=1e-4)
    with pytest.raises(InputError, match="exists already"):
        convert(str(tmp_path / "adapter"), str(tmp_path / "merged"))

    trainable = sum(weight.numel() for weight in weights.values())
    total = trainable + sum(weight.numel() for weight in before.model.parameters())
    assert f"training {trainable:,} of {total:,} weights" in caplog.text
    last = newest_complete(tmp_path / "adapter" / "run")
    assert last is not None
    assert sum(weight.numel() for weight in load_file(last / "model.safetensors").values()) == trainable
    state = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    assert sum(entry["exp_avg"].numel() for entry in state.values()) == trainable


def test_peft_and_transformers_load_an_adapter_without_our_code(adapter: Path) -> None:
    model = RewardModel.load(adapter)
    expected = model.score(COMPARISONS)
    by_peft = peft.AutoPeftModelForSequenceClassification.from_pretrained(adapter)
    assert logits(by_peft, model.template) == pytest.approx(expected, abs=1e-4)
    by_transformers = AutoModelForSequenceClassification.from_pretrained(adapter)
    assert logits(by_transformers, model.template) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("language_model", [False, True], indirect=True)
def test_new_tokens_of_a_language_model_are_trained_and_saved(
    preferences: str, language_model: Path, tmp_path: Path
) -> None:
    triples = [
        {"prompt": f"Say {n}", "reference": "fox dog", "positive": f"dog {n}", "negative": f"{n} sea"}
        for n in range(16)
    ]
    data = write_jsonl(tmp_path / "triples.jsonl", triples)
    values = asdict(settings(data, language_model, tmp_path / "adapter")) | {"lora": LoraSettings(rank=4)}
    trained = pretrain(PretrainConfig(**values, lexical_weight=1.0))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (rows,) = [weight for name, weight in weights.items() if "embed" in name]
    assert rows.shape == (2, 32)  # not the whole matrix
    assert (rows[0] - rows[1]).norm() > 0.01  # both start near the mean
    model = RewardModel.load(tmp_path / "adapter")
    assert model.score(COMPARISONS) == pytest.approx(trained.score(COMPARISONS), abs=1e-4)
    by_peft = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1)
    assert logits(by_peft, model.template) == pytest.approx(trained.score(COMPARISONS), abs=1e-4)
    convert(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert RewardModel.load(tmp_path / "merged").score(COMPARISONS) == pytest.approx(model.score(COMPARISONS), abs=1e-5)


class CrashError(Exception):
    pass


def test_a_killed_run_ends_with_the_undisturbed_adapter(
    preferences: str, language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"save_steps": 2, "batch_size": 2, "eval_data": [preferences], "eval_steps": 3}
    finetune(settings(preferences, language_model, tmp_path / "straight", **values))
    real, left = RewardTrainer.training_step, 0

    def step(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise CrashError
        return real(*arguments, **named)

    monkeypatch.setattr(RewardTrainer, "training_step", step)
    for moment in (1, 3):  # before the first checkpoint, and after one
        left = moment
        with pytest.raises(CrashError):
            finetune(settings(preferences, language_model, tmp_path / "killed", **values))
    left = 100
    finetune(settings(preferences, language_model, tmp_path / "killed", **values))
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "killed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_gradient_checkpointing_gives_the_same_adapter(preferences: str, checkpoint: Path, tmp_path: Path) -> None:
    for name, keep in (("all", False), ("inputs", True)):
        finetune(settings(preferences, checkpoint, tmp_path / name, max_steps=3, gradient_checkpointing=keep))
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("all", "inputs"))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-4, atol=1e-5)


def test_with_bfloat16_the_frozen_weights_are_in_it_and_the_trained_ones_are_not(
    preferences: str, checkpoint: Path, tmp_path: Path
) -> None:
    trained = finetune(settings(preferences, checkpoint, tmp_path / "adapter", max_steps=2, bf16=True))
    kinds = {(weight.requires_grad, weight.dtype) for weight in trained.model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    loaded = RewardModel.load(tmp_path / "adapter")
    assert loaded.score(COMPARISONS) == pytest.approx(trained.score(COMPARISONS), abs=0.3)


def test_4_bits_are_merged_as_they_were_trained(preferences: str, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    values = {"lora": LoraSettings(rank=4, load_in_4bit=True), "eval_data": [preferences], "eval_steps": 2}
    trained = finetune(settings(preferences, checkpoint, tmp_path / "adapter", **values))
    assert {weight.dtype for weight in trained.model.parameters()} == {torch.uint8, torch.float32}
    assert trained.model.score.weight.dtype is torch.float32
    rewards = trained.score(COMPARISONS)
    assert RewardModel.load(tmp_path / "adapter").score(COMPARISONS) == pytest.approx(rewards, abs=1e-4)
    convert(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert RewardModel.load(tmp_path / "merged").score(COMPARISONS) == pytest.approx(rewards, abs=1e-4)
    history = json.loads((tmp_path / "adapter" / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0]  # evaluations in between leave the gradients alone
    with pytest.raises(InputError, match="cannot be merged in 4 bits"):
        RewardModel.load(tmp_path / "adapter", in_4bit=True)


def test_a_merged_adapter_can_be_trained_in_full(preferences: str, adapter: Path, tmp_path: Path) -> None:
    trained = finetune(settings(preferences, adapter, tmp_path / "rm", lora=None, max_steps=1))
    before = RewardModel.load(adapter).model.state_dict()
    after = trained.model.state_dict()
    assert not any(torch.equal(weight, after[name]) for name, weight in before.items() if "proj" in name)
    assert (tmp_path / "rm" / "config.json").exists()


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(adapter: Path) -> None:
        weights = load_file(adapter / "adapter_model.safetensors")
        change(weights)
        save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})

    return damage


def change_config(**values: object) -> Callable[[Path], None]:
    def damage(adapter: Path) -> None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | values))

    return damage


HEAD = "base_model.model.score.weight"
UP = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_weights(lambda weights: weights.pop(HEAD)), r"missing.*\(score\.weight\)"),
        (change_weights(lambda weights: weights.pop(UP)), r"missing.*up_proj\.lora_A\.weight"),
        (change_weights(lambda weights: weights.update({UP: weights[UP][:2]})), r"wrong shape.*up_proj"),
        (change_weights(lambda weights: weights.update(more=weights[HEAD].clone())), r"not for this base \(more\)"),
        (change_weights(lambda weights: weights[HEAD].fill_(float("nan"))), r"score\.weight holds NaN"),
        (change_config(modules_to_save=None), "not for this base"),
        (change_config(peft_type="IA3"), "adapter of type IA3; expected LORA"),
        (change_config(r=8), "wrong shape"),
        (change_config(base_model_name_or_path="/gone/base"), r"base model of this adapter cannot be had.*/gone/base"),
        (change_config(base_model_name_or_path=None), "base_model_name_or_path is None"),
        (change_config(base_model_name_or_path="."), "is an adapter too"),
        (change_config(base_model_name_or_path="polar-nano"), "not for this base"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "could not be loaded"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"torn"), "could not be loaded"),
        (lambda path: (path / "adapter_config.json").write_text("{"), "not readable as JSON"),
    ],
)
def test_a_damaged_adapter_is_refused(adapter: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(adapter)
    with pytest.raises(InputError, match=message) as error:
        RewardModel.load(adapter)
    assert "\n" not in str(error.value)


def test_the_base_may_stand_beside_the_adapter(adapter: Path, trained: Path) -> None:
    expected = RewardModel.load(adapter).score(COMPARISONS)
    change_config(base_model_name_or_path="../base")(adapter)
    with pytest.raises(InputError, match="cannot be had"):
        RewardModel.load(adapter)
    shutil.copytree(trained / "base", adapter.parent / "base")
    assert RewardModel.load(adapter).score(COMPARISONS) == expected


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, "lora.rank must be at least 1, found 0"),
        ({"alpha": 0.0}, "lora.alpha must be above 0"),
        ({"dropout": 1.0}, "lora.dropout must be in"),
        ({"targets": []}, "lora.targets: name at least one layer"),
        ({"targets": ["q_proj", "w_proj"]}, "has no layer w_proj"),
        ({"targets": ["score"]}, "lora.targets score: "),
    ],
)
def test_bad_settings_are_one_clear_line(
    preferences: str, checkpoint: Path, tmp_path: Path, lora: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        finetune(settings(preferences, checkpoint, tmp_path / "out", lora=LoraSettings(**lora)))
    assert "\n" not in str(error.value)


def test_an_adapter_needs_a_whole_model_to_start_from(preferences: str, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is an adapter already; make a whole model"):
        finetune(settings(preferences, adapter, tmp_path / "out"))
    with pytest.raises(InputError, match="from scratch has no weights to freeze"):
        PretrainConfig(data=[preferences], output=str(tmp_path / "out"), lora=LoraSettings())


@pytest.mark.parametrize(
    ("package", "line"), [("peft", r"pip install 'polar-rm\[train\]'"), ("bitsandbytes", "pip install")]
)
def test_a_missing_package_is_one_clear_line(
    preferences: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, line: str
) -> None:
    monkeypatch.setattr(saved_adapters, "find_spec", lambda name: None if name == package else object())
    lora = LoraSettings(load_in_4bit=package == "bitsandbytes")
    with pytest.raises(InputError, match=rf"need the package {package}: {line}"):
        finetune(settings(preferences, checkpoint, tmp_path / "out", lora=lora))


def test_flags_and_yaml_switch_adapters_on(preferences: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[FinetuneConfig] = []

    def stop(config: FinetuneConfig) -> None:
        seen.append(config)
        raise InputError("enough")

    monkeypatch.setattr(run, "finetune", stop)
    words = ["finetune", "--model", "polar-nano", "--data", preferences, "--output", str(tmp_path / "out")]
    main([*words])
    main([*words, "--lora.rank", "4", "--lora.load-in-4bit", "--lora.targets", "q_proj", "--lora.targets", "v_proj"])
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump({"lora": {"rank": 8}}))
    main([*words, "--config", str(tmp_path / "lora.yaml"), "--lora.alpha", "16"])
    seen[0].save(tmp_path / "resolved.yaml")
    main([*words, "--config", str(tmp_path / "resolved.yaml")])
    assert [config.lora for config in seen] == [
        None,
        LoraSettings(rank=4, load_in_4bit=True, targets=["q_proj", "v_proj"]),
        LoraSettings(rank=8, alpha=16.0),
        None,
    ]
