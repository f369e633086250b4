import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification

from polar import Comparison, Group, InputError, Message, RewardModel, Template
from polar.core.checkpoint import CHECKPOINT_FILE, put_in_place
from polar.core.template import EncodedGroup
from polar.model.tree import rewards, tree_batch
from tests.conftest import build_model
from tests.killing import killed_before_change

COMPARISONS = [
    Comparison("What is the capital of China?", "Beijing.", "It is Beijing."),
    Comparison("What is the capital of China?", "Beijing.", "Shanghai."),
    Comparison("中文", "奖励模型读取参考答案", "候选答案" * 20),
    Comparison("", "", ""),
    Comparison("def add(a, b):", "    return a + b\n", "return b + a " * 15, wrapper="pretrain"),
]
GROUPS = [
    Group("What is the capital of China?", "It is Beijing.", ("Beijing", "Not Shanghai.", "", "The capital " * 20)),
    Group("Hello", "reads the reference", ("one",)),
    Group("numbers 1 2 3", "4 5 6" * 10, tuple(f"candidate {number} " * number for number in range(1, 9))),
]


def test_batching_and_padding_change_nothing(reward_model: RewardModel) -> None:
    alone = [reward_model.score([comparison])[0] for comparison in COMPARISONS]
    together = reward_model.score(COMPARISONS, batch_tokens=100_000)
    assert together == pytest.approx(alone, abs=1e-4)
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_plain_transformers_with_padding_on_either_side(reward_model: RewardModel, side: str) -> None:
    sequences = [reward_model.template.encode(comparison).sequences()[0] for comparison in COMPARISONS]
    longest, pad = max(map(len, sequences)), reward_model.model.config.pad_token_id
    ids, mask = [], []
    for sequence in sequences:
        padding = longest - len(sequence)
        left, right = (padding, 0) if side == "left" else (0, padding)
        ids.append([pad] * left + sequence + [pad] * right)
        mask.append([0] * left + [1] * len(sequence) + [0] * right)
    with torch.no_grad():
        expected = reward_model.model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.squeeze(-1).tolist()
    assert reward_model.score(COMPARISONS) == pytest.approx(expected, abs=1e-4)


def test_the_score_is_read_at_the_last_token_even_if_the_text_holds_pads(reward_model: RewardModel) -> None:
    """The position is found by length: pad ids inside or at the end of a branch must not move it."""
    pad = reward_model.model.config.pad_token_id
    plain = EncodedGroup([1, 5, 6, 2, 5], [[7, 8, pad, pad]], [])
    with torch.no_grad():
        value = rewards(reward_model.model, tree_batch([plain])).item()
        hidden = reward_model.model.model(torch.tensor([[1, 5, 6, 2, 5, 7, 8, pad, pad]])).last_hidden_state[0, -1]
        expected = reward_model.model.score(hidden).item()
    assert value == pytest.approx(expected, abs=1e-5)


def test_dictionaries_are_scored_as_the_comparisons_that_they_are(llama: RewardModel) -> None:
    comparison = Comparison("2+2?", "It is 4.", "4", wrapper="pretrain")
    item = {"prompt": "2+2?", "reference": "It is 4.", "output": "4", "wrapper": "pretrain"}
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    expected = llama.score([comparison])
    assert llama.score(item) == llama.score(comparison) == llama.score([{**item, "output": turns}]) == expected
    spelt = {**item, "output": json.dumps(turns)}  # a string stays a string
    assert llama.score([spelt]) == llama.score([replace(comparison, output=json.dumps(turns))]) != expected


def test_tuples_are_scored_as_what_they_stand_for(llama: RewardModel) -> None:
    prompt, reference, candidates = [{"role": "user", "content": "2+2?"}], "It is 4.", ("4", "It is 5.")
    texts = (Message("user", "2+2?"),), reference
    first, second = (llama.score([Comparison(*texts, candidate)])[0] for candidate in candidates)
    single, shared = (
        pytest.approx(rewards, abs=1e-5)  # rows of other inputs may differ in the last bit
        for rewards in ([first, second], llama.score_groups([Group(*texts, candidates)])[0])
    )
    assert llama.score((prompt, reference, "4")) == llama.score((*texts, "4")) == [first]
    assert llama.score([(prompt, reference, text) for text in candidates]) == single
    assert llama.score(tuple((prompt, reference, text) for text in candidates)) == single
    assert llama.score([(prompt, reference, list(candidates)), ("a", "b", "c")])[:2] == shared
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    assert llama.score((*texts, turns)) == [first]  # one candidate


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        (
            [{"prompt": "a", "reference": "b"}],
            'item:0: field "output": expected a string or a list of messages, found no',
        ),
        ([("a", "b")], "item:0: expected a Comparison, a dictionary .* a tuple of these three, found"),
        ([("a", "b", "c"), ("a", "b", ["c", 4])], r'item:1: field "output\[1\]": expected .*, found the number 4'),
        ([("a", "b", [])], 'item:0: field "output": expected .*, found an empty list'),
        ("abc", "expected comparisons, dictionaries .* found 'abc'"),
        (None, "expected comparisons, dictionaries .* found None"),
    ],
)
def test_what_is_no_comparison_is_one_clear_line(llama: RewardModel, items: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        llama.score(items)


def test_a_group_equals_its_separate_sequences(reward_model: RewardModel) -> None:
    separate = [
        [
            reward_model.score_encoded([EncodedGroup([], [ids], encoded.truncations[:1])])[0][0]
            for ids in encoded.sequences()
        ]
        for encoded in map(reward_model.template.encode_group, GROUPS)
    ]
    for tree, alone in zip(reward_model.score_groups(GROUPS), separate, strict=True):
        assert tree == pytest.approx(alone, abs=1e-4)


def test_long_groups_are_cut_into_rows_without_changing_rewards(llama: RewardModel) -> None:
    whole = llama.score_groups(GROUPS)
    for cut, expected in zip(llama.score_groups(GROUPS, batch_tokens=80), whole, strict=True):
        assert cut == pytest.approx(expected, abs=1e-4)


def test_save_load_score_gives_the_same_numbers(reward_model: RewardModel, tmp_path: Path) -> None:
    reward_model.save(tmp_path / "a")
    loaded = RewardModel.load(tmp_path / "a")
    expected = pytest.approx(reward_model.score(COMPARISONS), abs=1e-6)
    assert loaded.score(COMPARISONS) == expected
    loaded.save(tmp_path / "b")
    assert RewardModel.load(tmp_path / "b").score(COMPARISONS) == expected
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert config["reward_token_id"] == reward_model.template.settings.score_token_id


def test_auto_classes_load_it_without_our_code(checkpoint: Path, llama: RewardModel) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32)
    (ids,) = llama.template.encode(COMPARISONS[0]).sequences()
    with torch.no_grad():
        assert model(torch.tensor([ids])).logits.item() == pytest.approx(llama.score(COMPARISONS[:1])[0], abs=1e-5)


def test_bfloat16_stays_close(checkpoint: Path, llama: RewardModel) -> None:
    half = RewardModel.load(checkpoint, dtype="bfloat16")
    assert half.model.dtype is torch.bfloat16
    assert half.score(COMPARISONS) == pytest.approx(llama.score(COMPARISONS), abs=0.5)


def test_saving_never_deletes_what_is_not_a_checkpoint(llama: RewardModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="holds other files than a checkpoint"):
        llama.save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_saving_replaces_the_files_of_a_checkpoint_alone(llama: RewardModel, checkpoint: Path, tmp_path: Path) -> None:
    expected = llama.score(COMPARISONS)
    (checkpoint / "notes.txt").write_text("precious")
    (checkpoint / "run" / "checkpoint-9").mkdir(parents=True)
    for stale in ("adapter_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (checkpoint / stale).write_text("of another model")
    llama.save(checkpoint)
    assert RewardModel.load(checkpoint).score(COMPARISONS) == pytest.approx(expected, abs=1e-6)
    llama.save(tmp_path / "fresh")
    fresh = {path.name for path in (tmp_path / "fresh").iterdir()}
    assert {path.name for path in checkpoint.iterdir()} == fresh | {"notes.txt", "run"}
    assert (checkpoint / "notes.txt").read_text() == "precious"
    assert (checkpoint / "run" / "checkpoint-9").is_dir()


def test_a_file_as_target_is_one_line(llama: RewardModel, tmp_path: Path) -> None:
    (tmp_path / "rm.safetensors").write_text("precious")
    with pytest.raises(InputError, match=r"rm\.safetensors: is a file; a checkpoint is a directory") as error:
        llama.save(tmp_path / "rm.safetensors")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="below: cannot be written: "):
        llama.save(tmp_path / "rm.safetensors" / "below")
    assert (tmp_path / "rm.safetensors").read_text() == "precious"


def test_a_kill_at_any_step_leaves_the_old_checkpoint_the_new_one_or_none(llama: RewardModel, tmp_path: Path) -> None:
    llama.save(tmp_path / "old")
    (tmp_path / "old" / "notes.txt").write_text("precious")
    llama.save(tmp_path / "new")
    (tmp_path / "new" / "model.safetensors").rename(tmp_path / "new" / "model-00001-of-00001.safetensors")
    found = set()
    for number in count(1):
        shutil.copytree(tmp_path / "old", target := tmp_path / f"target-{number}")
        shutil.copytree(tmp_path / "new", written := tmp_path / f"written-{number}")

        def move(begin: Callable[[], None], written: Path = written, target: Path = target) -> None:
            begin()
            put_in_place(written, target)

        killed = killed_before_change(number, move)
        assert (target / "notes.txt").read_text() == "precious"
        names = frozenset(path.name for path in target.iterdir() if path.name != "notes.txt")
        found.add(names if CHECKPOINT_FILE in names else None)
        if not killed:
            break
    assert number > 10
    whole = [{path.name for path in (tmp_path / name).iterdir()} - {"notes.txt"} for name in ("old", "new")]
    assert found == {None, *map(frozenset, whole)}


def edit_weights(checkpoint: Path, change) -> None:
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_missing_score_head_is_refused(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.pop("score.weight"))
    with pytest.raises(InputError, match=r"weights are missing.*score\.weight"):
        RewardModel.load(checkpoint)


def test_missing_layer_is_refused(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"weights are missing.*layers\.1\.mlp\.up_proj"):
        RewardModel.load(checkpoint)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_bias_that_the_model_would_ignore_is_refused(architecture: str, template: Template, tmp_path: Path) -> None:
    model = build_model(architecture, template)
    model.save(tmp_path / "model")
    edit_weights(tmp_path / "model", lambda weights: weights.update({"score.bias": torch.zeros(1)}))
    assert RewardModel.load(tmp_path / "model").score(COMPARISONS) == pytest.approx(model.score(COMPARISONS), abs=1e-6)
    edit_weights(tmp_path / "model", lambda weights: weights.update({"score.bias": torch.tensor([1.5])}))
    with pytest.raises(InputError, match=r"score\.bias is \[1\.5\], but .* no bias"):
        RewardModel.load(tmp_path / "model")


def test_weights_that_the_model_has_no_place_for_are_refused(checkpoint: Path, llama: RewardModel) -> None:
    edit_weights(checkpoint, lambda weights: weights.update({"lm_head.weight": torch.zeros(4, 4)}))
    assert RewardModel.load(checkpoint).score(COMPARISONS) == pytest.approx(llama.score(COMPARISONS), abs=1e-6)
    edit_json(checkpoint / "config.json", num_hidden_layers=1)
    with pytest.raises(InputError, match=r"no place for the weights model\.layers\.1"):
        RewardModel.load(checkpoint)


@pytest.mark.parametrize(
    ("quantised", "method"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
    ],
)
def test_quantised_weights_are_refused(checkpoint: Path, quantised: dict[str, object], method: str) -> None:
    edit_json(checkpoint / "config.json", quantization_config=quantised)
    with pytest.raises(InputError, match=rf"the weights are quantised \({method}\)") as error:
        RewardModel.load(checkpoint)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pad", [-1, 99_999])
def test_a_pad_token_outside_the_vocabulary_is_refused(checkpoint: Path, pad: int) -> None:
    edit_json(checkpoint / "config.json", pad_token_id=pad)
    with pytest.raises(InputError, match=r"pad_token_id is -1|Padding_idx must be within") as error:
        RewardModel.load(checkpoint)
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(checkpoint: Path) -> None:
    """A special token that no input has may be missing: Llama 2 gets a pad token like that."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    RewardModel.load(checkpoint)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    with pytest.raises(InputError, match=f"has id {size + 1}, but the model has embeddings for {size} tokens"):
        RewardModel.load(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused(checkpoint: Path, value: float) -> None:
    edit_weights(checkpoint, lambda weights: weights["model.norm.weight"].__setitem__(3, value))
    with pytest.raises(InputError, match=r"model\.norm\.weight holds NaN or infinity"):
        RewardModel.load(checkpoint)


def test_truncated_weights_are_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="could not be loaded") as error:
        RewardModel.load(checkpoint)
    assert "\n" not in str(error.value)


def test_pickle_weights_are_not_loaded(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match="could not be loaded"):
        RewardModel.load(checkpoint)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no config.json"):
        RewardModel.load(tmp_path)
    with pytest.raises(InputError, match="no such checkpoint directory"):
        RewardModel.load(tmp_path / "missing")
    with pytest.raises(InputError, match="None: no such checkpoint directory"):
        RewardModel.load(None)


@pytest.mark.parametrize(
    ("architecture", "advice"),
    [("InternLM2ForRewardModel", "polar convert"), ("LlamaForCausalLM", "polar finetune")],
)
def test_other_architectures_get_advice(checkpoint: Path, architecture: str, advice: str) -> None:
    edit_json(checkpoint / "config.json", architectures=[architecture])
    with pytest.raises(InputError, match=advice):
        RewardModel.load(checkpoint)


def test_two_labels_are_refused(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", id2label={"0": "A", "1": "B"})
    with pytest.raises(InputError, match="has 2 labels"):
        RewardModel.load(checkpoint)


def test_missing_template_is_refused(checkpoint: Path) -> None:
    (checkpoint / CHECKPOINT_FILE).unlink()
    with pytest.raises(InputError, match="input format is unknown"):
        RewardModel.load(checkpoint)


def test_a_broken_tokenizer_configuration_is_refused(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").write_text("{broken")
    with pytest.raises(InputError, match="the tokenizer could not be loaded") as error:
        RewardModel.load(checkpoint)
    assert "\n" not in str(error.value)


def test_pad_that_is_the_score_token_is_refused(checkpoint: Path) -> None:
    settings = json.loads((checkpoint / CHECKPOINT_FILE).read_text())["template"]
    edit_json(checkpoint / "config.json", pad_token_id=settings["score_token_id"])
    with pytest.raises(InputError, match="must differ from the score token"):
        RewardModel.load(checkpoint)


@pytest.mark.parametrize(("flag", "value"), [("device", "tpu9"), ("dtype", "int8"), ("dtype", "float31")])
def test_unknown_device_and_dtype(checkpoint: Path, flag: str, value: str) -> None:
    with pytest.raises(InputError, match=value):
        RewardModel.load(checkpoint, **{flag: value})


def test_overflow_is_an_exception_not_a_number(checkpoint: Path) -> None:
    model = RewardModel.load(checkpoint)
    with torch.no_grad():
        model.model.score.weight.fill_(1e38)
    with pytest.raises(FloatingPointError, match="is (inf|-inf|nan)"):
        model.score(COMPARISONS)


def test_half_written_checkpoints_do_not_appear(llama: RewardModel, tmp_path: Path, monkeypatch) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    llama.save(tmp_path / "model")
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    monkeypatch.setattr(llama.template, "save", full_disk)
    with pytest.raises(InputError, match="No space left"):
        llama.save(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    shutil.rmtree(tmp_path / "model")
