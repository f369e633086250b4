"""Conversion of official checkpoints, against values that the original model, tokenizer and client produced.

`fixtures/golden` holds a small `InternLM2ForRewardModel` with random weights, sentencepiece tokenizers, and what
the public reference code (InternLM/xtuner v0.2.0, InternLM/POLAR 80626f3) computes with them.
"""

import json
import os
import shutil
import weakref
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from polar.cli.convert import convert as convert_command
from polar.core.checkpoint import read_checkpoint_file
from polar.core.errors import InputError
from polar.core.records import Comparison, Message
from polar.core.template import Template, TemplateSettings, seed_text
from polar.model import internlm2
from polar.model.internlm2 import (
    BASE_MODEL,
    REWARD_MODEL,
    SOURCE_FILES,
    convert,
    map_config,
    map_tensor,
    read_shard,
    source_shapes,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "golden"
MODEL1 = FIXTURES / "model1"
GOLDEN = json.loads((FIXTURES / "golden.json").read_text("utf-8"))
ITEMS = {item["id"]: item for item in GOLDEN["items"]}
TOLERANCE = 2e-5
BOS, SPLIT, SCORE = 1, 653, 783


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def text(value):
    return value if isinstance(value, str) else tuple(Message(**message) for message in value)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "model1"
    convert(MODEL1, target)
    return target


@pytest.fixture(scope="module")
def tokenizer(converted):
    return AutoTokenizer.from_pretrained(converted)


@pytest.fixture(scope="module")
def model(converted):
    return AutoModelForSequenceClassification.from_pretrained(
        converted, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the checkpoint, to be changed."""
    return Path(shutil.copytree(MODEL1, tmp_path / "source"))


def edit_json(path: Path, **changes: Any) -> None:
    content = read_json(path) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}), "utf-8")


def edit_weights(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def shard(source: Path, suffix: str, count: int) -> None:
    """Replace the single file by `count` shards with an index (one: without)."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    single = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    stem = single.removesuffix(f".{suffix}")
    names = [single] if count == 1 else [f"{stem}-{n + 1:05}-of-{count:05}.{suffix}" for n in range(count)]
    weight_map = {name: names[number % count] for number, name in enumerate(sorted(tensors))}
    for file in names:
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, source / file) if suffix == "safetensors" else torch.save(part, source / file)
    if count > 1:
        (source / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


# ---------------------------------------------------------------------------------------------------- the golden values


@pytest.mark.parametrize("name", ITEMS)
def test_text_and_ids_equal_those_of_the_original_client(name, converted, tokenizer):
    item = ITEMS[name]
    lengths = TemplateSettings(SPLIT, SCORE, BOS, item["max_length"], item["max_response_length"])
    encoded, truncation = seed_text(
        Template.load(converted).tokenizer,
        lengths,
        *(text(item[key]) for key in ("prompt", "reference", "output")),
        wrapper=item["wrapper"],
        response_cut_side=item["response_cut_side"],
    )
    assert encoded == item["encoded"]
    assert bool(truncation) == bool(item["client_warnings"])
    assert tokenizer(encoded).input_ids == item["input_ids"]


@pytest.mark.parametrize("name", ITEMS)
def test_templates_on_the_converted_checkpoint(name, converted):
    item = ITEMS[name]
    comparison = Comparison(*(text(item[key]) for key in ("prompt", "reference", "output")), wrapper=item["wrapper"])
    lengths = item["max_length"], item["max_response_length"]
    if item["response_cut_side"] == "right":
        seed = Template.load(converted, compat="seed").with_lengths(*lengths).encode(comparison)
        assert seed.sequences() == [item["input_ids"]]
    native = Template.load(converted).with_lengths(*lengths).encode(comparison).sequences()
    if name == "pub-15":  # a text that spells special tokens: it stays text, and no second split token appears
        assert native[0].count(SPLIT) == 1
        assert native[0].count(SCORE) == 1
    elif not item["client_warnings"] or name == "pub-16":  # nothing was cut, or the prompt alone
        assert native == [item["input_ids"]]


def test_rewards_equal_those_of_the_original_model(model):
    with torch.inference_mode():
        for item in ITEMS.values():
            reward = model(torch.tensor([item["input_ids"]])).logits.item()
            assert reward == pytest.approx(item["reward"], abs=TOLERANCE), item["id"]


@pytest.mark.parametrize(
    "batch", GOLDEN["padded_batches"], ids=lambda batch: f"{batch['padding_side']}-{batch['items'][0]}"
)
def test_rewards_of_padded_batches(batch, model, tokenizer):
    ids = {"input_ids": [ITEMS[name]["input_ids"] for name in batch["items"]]}
    inputs = tokenizer.pad(ids, padding_side=batch["padding_side"], return_tensors="pt")
    assert inputs.input_ids.shape[1] == batch["padded_length"]
    with torch.inference_mode():
        rewards = model(**inputs).logits[:, 0].tolist()
    assert rewards == pytest.approx(batch["rewards"], abs=TOLERANCE)


def test_tokenizer_survives_loading_and_saving_by_transformers(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(MODEL1 / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", model_type="llama", auto_map=...)
    for reloaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert reloaded.is_fast
        assert (reloaded.padding_side, reloaded.pad_token_id, reloaded.bos_token_id) == ("left", 2, BOS)
        assert reloaded.convert_tokens_to_ids(["<|reward|>", "[UNUSED_TOKEN_130]"]) == [SPLIT, SCORE]
        assert "<|reward|>" in reloaded.all_special_tokens
        assert "[UNUSED_TOKEN_130]" not in reloaded.all_special_tokens
        chat = reloaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert chat == "<s><|im_start|>user\nhi<|im_end|>\n"
        for case in GOLDEN["tokenizer_cases"]["model1"]:
            ids = reloaded(case["text"]).input_ids
            assert not case["strict"] or ids == case["input_ids"]
            assert not case["strict"] or reloaded.decode(ids, skip_special_tokens=True) == case["decoded_skip_special"]


# ------------------------------------------------------------------------------------------------- what is written


def test_files_of_the_converted_checkpoint(converted):
    assert sorted(file.name for file in converted.iterdir()) == [
        "config.json",
        "model.safetensors",
        "polar.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert len({file.stat().st_mode for file in converted.iterdir()}) == 1
    config = AutoConfig.from_pretrained(converted)
    assert (config.num_labels, config.problem_type, config.pad_token_id) == (1, "regression", 2)
    assert (config.reward_token_id, config.split_token_id) == (SCORE, SPLIT)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 50000000}
    assert "auto_map" not in (converted / "config.json").read_text() + (converted / "tokenizer_config.json").read_text()
    model, info = AutoModelForSequenceClassification.from_pretrained(converted, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.float16
    provenance = read_checkpoint_file(converted)["provenance"]
    assert provenance["source"] == str(MODEL1)
    assert provenance["architecture"] == REWARD_MODEL
    assert Template.load(converted).settings == TemplateSettings(SPLIT, SCORE, BOS, 16384, 4096)


@pytest.mark.parametrize(("suffix", "count"), [("safetensors", 3), ("bin", 1), ("bin", 2)])
def test_other_weight_files_give_the_same_tensors(suffix, count, source, converted):
    shard(source, suffix, count)
    target = source.parent / "target"
    target.mkdir()  # empty: allowed
    convert(source, target)
    expected, found = all_tensors(converted), all_tensors(target)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert len(list(target.glob("*.safetensors"))) == count
    if count > 1:
        index = read_json(target / "model.safetensors.index.json")
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    _, info = AutoModelForSequenceClassification.from_pretrained(target, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_never_more_than_one_shard_in_memory(suffix, source, monkeypatch):
    shard(source, suffix, 4)
    alive: list[weakref.ref[torch.Tensor]] = []
    saved = []

    def watched_read(path):
        assert not [reference for reference in alive if reference() is not None], (
            "tensors of an earlier shard are alive"
        )
        for name, tensor in read_shard(path):
            alive.append(weakref.ref(tensor))
            yield name, tensor

    def watched_save(tensors, path, metadata):
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        saved.append(path)
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(internlm2, "read_shard", watched_read)
    monkeypatch.setattr(internlm2, "save_file", watched_save)
    convert(source, source.parent / "target")
    assert len(saved) == 4
    assert len(alive) > 2 * len(all_tensors(MODEL1))


@settings(max_examples=40, deadline=None)
@given(kv_heads=st.integers(1, 3), group=st.integers(1, 3), half=st.integers(1, 3), bias=st.booleans())
def test_query_key_and_value_rows_are_taken_apart(kv_heads, group, half, bias):
    heads, dim, hidden = kv_heads * group, 2 * half, kv_heads * group * 2 * half
    q, k, v = (torch.randn(count * dim, *([] if bias else [hidden])) for count in (heads, kv_heads, kv_heads))
    rows = []
    for head in range(kv_heads):
        rows += [q[index * dim : (index + 1) * dim] for index in range(head * group, (head + 1) * group)]
        rows += [k[head * dim : (head + 1) * dim], v[head * dim : (head + 1) * dim]]
    kind = "bias" if bias else "weight"
    llama = {"num_key_value_heads": kv_heads, "head_dim": dim, "hidden_size": hidden}
    parts = map_tensor(f"model.layers.7.attention.wqkv.{kind}", torch.cat(rows), llama)
    for letter, expected in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(parts.pop(f"model.layers.7.self_attn.{letter}_proj.{kind}"), expected)
    assert not parts


def test_model_with_biases_and_a_single_key_value_head(source):
    edit_json(source / "config.json", bias=True, num_key_value_heads=1, rope_scaling={"type": "linear", "factor": 4.0})
    shapes = source_shapes(map_config(read_json(source / "config.json")), REWARD_MODEL)
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    tensors["model.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(8)  # as in older dumps; not needed
    save_file(tensors, source / "model.safetensors")
    convert(source, source.parent / "target")
    model, info = AutoModelForSequenceClassification.from_pretrained(source.parent / "target", output_loading_info=True)
    assert not any(info.values())
    attention = model.model.layers[2].self_attn
    assert torch.equal(attention.o_proj.bias.data.bfloat16(), tensors["model.layers.2.attention.wo.bias"])
    assert torch.equal(attention.k_proj.bias.data.bfloat16(), tensors["model.layers.2.attention.wqkv.bias"][64:80])
    assert model.config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000000}


def test_base_model_gets_a_score_head_of_zeros_and_the_tokens_of_polar(source, caplog):
    edit_json(source / "config.json", architectures=[BASE_MODEL], reward_token_id=...)
    added = read_json(source / "tokenizer_config.json")["added_tokens_decoder"]
    del added[str(SPLIT)]
    names = ["<|im_start|>", "<|im_end|>"]
    edit_json(source / "tokenizer_config.json", added_tokens_decoder=added, additional_special_tokens=names)
    edit_weights(source, lambda tensors: tensors.update({"output.weight": tensors.pop("v_head.weight").repeat(800, 1)}))
    target = source.parent / "target"
    convert(source, target)
    assert "score head starts at zero" in caplog.text
    score = load_file(target / "model.safetensors")["score.weight"]
    assert (score.shape, score.dtype, score.count_nonzero()) == ((1, 64), torch.float16, 0)
    assert Template.load(target).settings == TemplateSettings(SPLIT, SCORE, BOS)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer("a<|reward|>").input_ids == [1, 512, SPLIT]
    assert "<|reward|>" in tokenizer.all_special_tokens


def test_dynamic_rope_is_kept_only_where_it_could_matter(source, caplog):
    edit_json(source / "config.json", max_position_embeddings=128)
    convert(source, source.parent / "target")
    config = AutoConfig.from_pretrained(source.parent / "target")
    assert config.rope_parameters == {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 50000000}
    assert "dynamic rope is kept" in caplog.text
    lengths = Template.load(source.parent / "target").settings
    assert (lengths.max_length, lengths.max_response_length) == (128, 32)


def test_command_prints_one_line(tmp_path, capsys):
    convert_command(str(MODEL1), str(tmp_path / "new" / "target"))
    (line,) = capsys.readouterr().out.splitlines()
    assert "LlamaForSequenceClassification" in line
    assert str(tmp_path / "new" / "target") in line


def test_hub_name_downloads_no_code(tmp_path, monkeypatch):
    def snapshot_download(name, allow_patterns):
        assert name == "internlm/POLAR-7B"
        for file in ("modeling_internlm2.py", "tokenization_internlm2_fast.py", "training_args.bin", "README.md"):
            assert not any(fnmatch(file, pattern) for pattern in allow_patterns)
        assert all(any(fnmatch(file.name, pattern) for pattern in SOURCE_FILES) for file in files)
        return str(MODEL1)

    files = [file for file in MODEL1.iterdir() if file.name != "special_tokens_map.json"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    convert("internlm/POLAR-7B", tmp_path / "target")
    assert read_checkpoint_file(tmp_path / "target")["provenance"]["source"] == "internlm/POLAR-7B"


# ------------------------------------------------------------------------------------------------------------- faults


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda source: edit_weights(source, lambda tensors: tensors.update({name: change(tensors[name])}))


def config_with(**changes: Any) -> Callable[[Path], None]:
    return lambda source: edit_json(source / "config.json", **changes)


def tensor_twice(source: Path) -> None:
    shard(source, "safetensors", 2)
    file = source / "model-00002-of-00002.safetensors"
    first = load_file(source / "model-00001-of-00002.safetensors")
    save_file(load_file(file) | {next(iter(first)): next(iter(first.values()))}, file)


def shard_lost(source: Path) -> None:
    shard(source, "bin", 2)
    (source / "pytorch_model-00002-of-00002.bin").unlink()


def index_leaves_directory(source: Path) -> None:
    shard(source, "safetensors", 2)
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def not_tensors(source: Path) -> None:
    (source / "model.safetensors").unlink()
    torch.save({"model.norm.weight": "text"}, source / "pytorch_model.bin")


def old_bin(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)


LAYER = "model.layers.1."
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (
        lambda source: edit_weights(source, lambda tensors: tensors.pop(f"{LAYER}ffn_norm.weight")),
        f"1 tensors are missing.*{LAYER}ffn_norm.weight",
    ),
    "unexpected tensor": (
        lambda source: edit_weights(source, lambda tensors: tensors.update({"lm_head.weight": torch.ones(1)})),
        "unexpected tensor lm_head.weight",
    ),
    "tensor twice": (tensor_twice, "earlier shard already"),
    "NaN": (put(f"{LAYER}attention.wo.weight", lambda t: t * torch.nan), f"{LAYER}attention.wo.weight holds NaN"),
    "infinity": (put("v_head.weight", lambda t: t / 0), "v_head.weight holds NaN or infinity"),
    "wrong shape": (
        put(f"{LAYER}attention.wqkv.weight", lambda t: t[:-1].clone()),
        r"shape \(127, 64\); .*\(128, 64\)",
    ),
    "integers": (put("model.norm.weight", lambda t: t.to(torch.int8)), "model.norm.weight is torch.int8"),
    "damaged weights": (
        lambda source: (source / "model.safetensors").write_bytes(b"\x08" * 99),
        "not readable as weights",
    ),
    "no weights": (lambda source: (source / "model.safetensors").unlink(), "no weights; expected model.safetensors"),
    "shard lost": (shard_lost, "00002-of-00002.bin: no such file, but the index names it"),
    "index leaves directory": (index_leaves_directory, "to files of this directory"),
    "values that are no tensors": (not_tensors, "expected a dictionary of tensors"),
    "bin of another format": (old_bin, "not readable as weights"),
    "no config": (lambda source: (source / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda source: (source / "config.json").write_text("{"), "not readable as JSON"),
    "config is a list": (
        lambda source: (source / "config.json").write_text("[]"),
        "expected a JSON object, found list",
    ),
    "other architecture": (config_with(architectures=["LlamaForCausalLM"]), "architecture LlamaForCausalLM; expected"),
    "config key missing": (config_with(rms_norm_eps=..., bias=...), "lacks rms_norm_eps, bias"),
    "negative size": (config_with(hidden_size=-64), "hidden_size is -64"),
    "heads do not divide": (config_with(num_key_value_heads=3), "3 key-value heads do not divide"),
    "unknown rope": (config_with(rope_scaling={"type": "yarn", "factor": 2.0}), "rope_scaling .*yarn"),
    "no score token": (config_with(reward_token_id=...), "reward_token_id is None"),
    "score token is the split token": (config_with(reward_token_id=SPLIT), "two different tokens"),
    "score token out of range": (config_with(reward_token_id=-1), "reward_token_id is -1"),
    "pad token is the score token": (config_with(pad_token_id=SCORE), "pad_token_id is 783"),
    "vocabulary too small": (config_with(vocab_size=799), "id 799, but vocab_size is 799"),
    "no tokenizer": (lambda source: (source / "tokenizer.model").unlink(), "tokenizer.model: not readable"),
    "no tokenizer config": (lambda source: (source / "tokenizer_config.json").unlink(), "no tokenizer_config.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_one_line_and_leaves_nothing_behind(fault, source):
    spoil, expected = FAULTS[fault]
    spoil(source)
    with pytest.raises(InputError, match=expected) as caught:
        convert(source, source.parent / "target")
    assert "\n" not in str(caught.value)
    assert [file.name for file in source.parent.iterdir()] == ["source"]


def test_pickle_that_would_run_code_is_refused(source):
    marker = source.parent / "executed"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    (source / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Attack()}, source / "pytorch_model.bin")
    with pytest.raises(InputError, match="refused, because loading it could run code") as caught:
        convert(source, source.parent / "target")
    assert "\n" not in str(caught.value)
    assert [file.name for file in source.parent.iterdir()] == ["source"]


def test_target_in_use_is_not_touched(tmp_path):
    (tmp_path / "file.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "file.txt"):
        with pytest.raises(InputError, match="exists already"):
            convert(MODEL1, target)
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]
    with pytest.raises(InputError, match="cannot be written"):
        convert(MODEL1, tmp_path / "file.txt" / "target")


@pytest.mark.parametrize("source", ["no/such/directory", "./missing", "missing"])
def test_source_that_is_no_directory_and_no_hub_name(source, tmp_path):
    with pytest.raises(InputError, match="no such checkpoint directory"):
        convert(source, tmp_path / "target")
