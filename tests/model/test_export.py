"""Export to the layouts of other tools: the golden checkpoint comes back bit for bit, and rewards stay the same."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PretrainedConfig, Qwen2Config, Qwen2Model

from polar import Comparison, InputError, RewardModel, Template
from polar.cli.main import main
from polar.core.checkpoint import BUNDLED, read_checkpoint_file
from polar.model import export as exporting
from polar.model.export import AUTO_MAP, export
from polar.model.internlm2 import convert, source_shapes
from tests.conftest import build_model

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "model1"
COMPARISONS = [
    Comparison("What is the capital of China?", "It is Beijing.", "Beijing."),
    Comparison("What is the capital of China?", "It is Beijing.", "Not Shanghai, 中文 😀"),
]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def edit_json(path: Path, **changes: object) -> None:
    content = read_json(path) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}), "utf-8")


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def converted_again(exported: Path, target: Path) -> Path:
    convert(exported, target)
    return target


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "model1"
    convert(GOLDEN, target)
    return target


@pytest.fixture
def saved(request, template, tmp_path) -> Path:
    """A small random checkpoint of the architecture that the test names, as training saves it."""
    build_model(request.param, template).save(tmp_path / "saved")
    return tmp_path / "saved"


# -------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("engine", ["xtuner", "lmdeploy"])
def test_a_converted_model_is_exported_bit_for_bit_as_it_was(engine, converted, tmp_path):
    assert export(converted, tmp_path / "out", engine) == "InternLM2ForRewardModel"
    assert_same(all_tensors(tmp_path / "out"), all_tensors(GOLDEN))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    found, original = read_json(tmp_path / "out" / "config.json"), read_json(GOLDEN / "config.json")
    assert found.get("auto_map") == (AUTO_MAP if engine == "xtuner" else None)
    assert original["auto_map"] == AUTO_MAP
    ours = {"auto_map", "split_token_id", "rope_parameters"}
    optional = {"attn_implementation", "pretraining_tp", "transformers_version", "use_cache", "auto_map"}
    assert found.keys() - ours == original.keys() - optional
    # Conversion leaves out a dynamic rope that no input of POLAR is long enough for.
    assert {key for key in found.keys() - ours if found[key] != original[key]} == {"rope_scaling"}
    assert found["rope_scaling"] is None


def test_an_export_converts_again_to_the_same_rewards(converted, tmp_path):
    export(converted, tmp_path / "exported", "xtuner")
    back = converted_again(tmp_path / "exported", tmp_path / "back")
    assert_same(all_tensors(back), all_tensors(converted))
    first, second = (RewardModel.load(directory, dtype="float32") for directory in (converted, back))
    assert first.score(COMPARISONS) == second.score(COMPARISONS)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_llama_converts_again_to_the_same_weights(bias, tied, converted, tmp_path):
    """As transformers saves it today: rope_parameters, dtype and another tokenizer class."""
    model = RewardModel.load(converted, dtype="float32")
    model.model.config.attention_bias, model.model.config.tie_word_embeddings = bias, tied
    if bias:
        torch.manual_seed(0)
        model.model = type(model.model)(model.model.config).eval()
        for name, parameter in model.model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()
    model.save(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "exported", "lmdeploy")
    config = read_json(tmp_path / "exported" / "config.json")
    assert (config["rope_theta"], config["rope_scaling"]) == (50000000, None)
    assert (config["torch_dtype"], config["bias"], config["tie_word_embeddings"]) == ("float32", bias, False)
    back = converted_again(tmp_path / "exported", tmp_path / "back")
    assert_same(all_tensors(back), all_tensors(tmp_path / "trained"))


def test_large_weights_are_split_and_never_held_at_once(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "SHARD_BYTES", 100_000)
    held: list[int] = []

    def save(tensors, path, metadata):
        held.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(exporting, "save_file", save)
    export(converted, tmp_path / "out", "lmdeploy")
    tensors = all_tensors(GOLDEN)
    assert_same(all_tensors(tmp_path / "out"), tensors)
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(held) == sum(tensor.nbytes for tensor in tensors.values())
    assert len(held) > 2
    assert max(held) <= max(100_000, *(tensor.nbytes for tensor in tensors.values()))
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    back = converted_again(tmp_path / "out", tmp_path / "back")
    assert_same(all_tensors(back), all_tensors(converted))


def test_shards_of_the_source_are_read_through_their_index(converted, tmp_path):
    RewardModel.load(converted, dtype="float16").model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    for name in ("polar.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(converted / name, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    export(tmp_path / "shards", tmp_path / "out", "xtuner")
    assert_same(all_tensors(tmp_path / "out"), all_tensors(GOLDEN))


def test_the_bundled_model_is_exported(tmp_path):
    export("polar-nano", tmp_path / "out", "lmdeploy")
    config = read_json(tmp_path / "out" / "config.json")
    settings = Template.load(BUNDLED["polar-nano"]).settings
    assert (config["reward_token_id"], config["split_token_id"]) == (settings.score_token_id, settings.split_token_id)
    llama = read_json(BUNDLED["polar-nano"] / "config.json")
    found = {name: tuple(tensor.shape) for name, tensor in all_tensors(tmp_path / "out").items()}
    assert found == source_shapes(llama, "InternLM2ForRewardModel")


@pytest.mark.parametrize("through_save", [False, True])
def test_the_tokenizer_of_an_export_gives_the_same_ids(through_save, converted, tmp_path):
    source = converted
    if through_save:
        source = tmp_path / "saved"
        RewardModel.load(converted).save(source)
    export(source, tmp_path / "out", "lmdeploy")
    config = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 both know
    assert "<|reward|>" in config["additional_special_tokens"]
    assert "extra_special_tokens" not in config
    text = "What is 1 + 1?\n2<|reward|>What is 1 + 1?\n3[UNUSED_TOKEN_130]"
    tokenizers = [AutoTokenizer.from_pretrained(directory) for directory in (converted, tmp_path / "out")]
    first, second = (tokenizer(text).input_ids for tokenizer in tokenizers)
    assert first == second
    assert first[-1] == 783
    assert tokenizers[1].pad_token_id == 2
    assert read_checkpoint_file(tmp_path / "out")["provenance"]["exported"].startswith("lmdeploy, polar ")


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "dynamic", "factor": 2.0}])
def test_lmdeploy_finds_rope_in_a_config_without_a_class(rope, converted, tmp_path):
    """It has no class for model_type internlm2 and falls back to this one."""
    source = Path(shutil.copytree(converted, tmp_path / "source"))
    edit_json(source / "config.json", rope_scaling=None if rope["rope_type"] == "default" else rope)
    export(source, tmp_path / "out", "lmdeploy")
    config = PretrainedConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters == {**rope, "rope_theta": 50000000}
    old = {"type": "dynamic", "factor": 2.0} if "factor" in rope else None
    assert read_json(tmp_path / "out" / "config.json")["rope_scaling"] == old


@pytest.mark.parametrize("saved", ["qwen2"], indirect=True)
def test_a_qwen2_head_with_relu_gives_the_same_rewards(saved, tmp_path):
    assert export(saved, tmp_path / "out", "lmdeploy") == "Qwen2ForRewardModel"
    config = read_json(tmp_path / "out" / "config.json")
    assert config["architectures"] == ["Qwen2ForRewardModel"]
    assert config["torch_dtype"] == "float32"
    old, new = (Qwen2Config.from_pretrained(directory) for directory in (saved, tmp_path / "out"))
    assert new.rope_parameters == old.rope_parameters
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    tensors = all_tensors(tmp_path / "out")
    hidden = config["hidden_size"]
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("score.")}
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {
        "score.0.weight": (hidden, hidden),
        "score.0.bias": (hidden,),
        "score.2.weight": (1, hidden),
        "score.2.bias": (1,),
    }
    backbone = Qwen2Model(Qwen2Config(**{key: value for key, value in config.items() if key != "architectures"})).eval()
    backbone.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    model = RewardModel.load(saved)
    for comparison, reward in zip(COMPARISONS, model.score(COMPARISONS), strict=True):
        (ids,) = model.template.encode(comparison).sequences()
        with torch.inference_mode():
            last = backbone(torch.tensor([ids])).last_hidden_state[0, -1]
            middle = torch.relu(head["score.0.weight"] @ last + head["score.0.bias"])
            value = (head["score.2.weight"] @ middle + head["score.2.bias"]).item()
        assert value == pytest.approx(reward, abs=1e-5)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("saved", "engine", "message"),
    [
        ("qwen2", "xtuner", "xtuner has no reward model like Qwen2ForSequenceClassification; expected Llama"),
        ("qwen3", "lmdeploy", "expected LlamaForSequenceClassification or Qwen2ForSequenceClassification"),
        ("qwen3", "xtuner", "vLLM and SGLang serve a .* as it is"),
    ],
    indirect=["saved"],
)
def test_models_without_a_counterpart_are_refused_in_one_line(saved, engine, message, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        export(saved, tmp_path / "out", engine)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["InternLM2ForRewardModel"]}, "no reward model like InternLM2ForRewardModel"),
        ({"head_dim": 32}, "4 heads of 32, hidden_size 64"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"torch_dtype": ...}, "names no dtype"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "no rope like"),
        ({"num_hidden_layers": 2}, r"unexpected tensor model\.layers\.2"),
        ({"num_hidden_layers": 4}, r"no tensor model\.layers\.3"),
        ({"intermediate_size": 128}, r"shape \(160, 64\); config.json asks for \(128, 64\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_config_that_cannot_be_carried_over_is_refused(changes, message, converted, tmp_path):
    source = Path(shutil.copytree(converted, tmp_path / "source"))
    edit_json(source / "config.json", **changes)
    with pytest.raises(InputError, match=message) as error:
        export(source, tmp_path / "out", "xtuner")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_that_are_broken_or_have_no_place_are_refused(converted, tmp_path):
    tensors = load_file(converted / "model.safetensors")
    faults = {
        "holds NaN or infinity": {"score.weight": torch.full((1, 64), math.nan, dtype=torch.float16)},
        "unexpected tensor score.bias": {"score.bias": torch.ones(1, dtype=torch.float16)},
        "expected float16, bfloat16 or float32": {"model.norm.weight": torch.ones(64, dtype=torch.int8)},
    }
    for number, (message, change) in enumerate(faults.items()):
        source = Path(shutil.copytree(converted, tmp_path / f"source-{number}"))
        save_file(tensors | change, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            export(source, tmp_path / "out", "xtuner")
        assert not (tmp_path / "out").exists()


def test_a_target_in_use_is_refused(converted, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already; choose a new directory"):
        export(converted, tmp_path, "xtuner")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_says_what_it_wrote_and_what_xtuner_needs(converted, tmp_path, capsys):
    assert main(["export", str(converted), str(tmp_path / "x"), "--for", "xtuner"]) == 0
    output = capsys.readouterr().out
    assert "wrote InternLM2ForRewardModel and its tokenizer" in output
    assert "modeling_internlm2.py" in output
    assert main(["export", str(converted), str(tmp_path / "l"), "--for", "lmdeploy"]) == 0
    assert "modeling_internlm2.py" not in capsys.readouterr().out
    assert main(["export", str(converted), str(tmp_path / "v"), "--for", "vllm"]) == 2
