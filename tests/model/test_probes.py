"""Probes in checkpoints: float32 whatever the weights, and there however the checkpoint was made."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from polar import RewardModel, Template
from polar.client.probe import diagnose
from polar.core.checkpoint import BUNDLED, CHECKPOINT_FILE, Probe, read_probes
from polar.model.export import export
from polar.model.internlm2 import convert
from polar.model.probes import COMPARISONS, write_probes
from tests.conftest import build_model

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "model1"


def plain_rewards(directory: Path, sequences: list[list[int]]) -> list[float]:
    """By transformers alone, one input at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits.item() for ids in sequences]


def assert_true(probes: list[Probe], directory: Path) -> None:
    """The recorded rewards are those of plain transformers in float32."""
    assert len(probes) == len(COMPARISONS)
    bos = Template.load(directory).settings.bos_token_id
    for probe in probes:
        variants = [probe.ids, probe.ids[:-1], [bos, *probe.ids]]
        recorded = [probe.reward, probe.without_score_token, probe.with_bos]
        assert plain_rewards(directory, variants) == pytest.approx(recorded, abs=1e-4)
        assert Template.load(directory).tokenizer.encode(probe.text).ids == probe.ids


def test_a_saved_model_carries_its_probes(reward_model: RewardModel, tmp_path: Path) -> None:
    reward_model.save(tmp_path / "saved")
    assert_true(read_probes(tmp_path / "saved"), tmp_path / "saved")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_probes_of_half_precision_weights_are_float32(dtype: str, reward_model: RewardModel, tmp_path: Path) -> None:
    reward_model.save(tmp_path / "full")
    RewardModel.load(tmp_path / "full", dtype=dtype).save(tmp_path / "half")
    assert_true(read_probes(tmp_path / "half"), tmp_path / "half")
    assert read_probes(tmp_path / "half") != read_probes(tmp_path / "full")


def test_a_conversion_and_its_export_carry_probes(tmp_path: Path) -> None:
    convert(GOLDEN, tmp_path / "llama")
    assert_true(read_probes(tmp_path / "llama"), tmp_path / "llama")
    export(tmp_path / "llama", tmp_path / "exported", "lmdeploy")
    assert read_probes(tmp_path / "exported") == read_probes(tmp_path / "llama")


def test_the_bundled_model_has_the_probes_that_it_would_get_today(tmp_path: Path) -> None:
    probes = read_probes(BUNDLED["polar-nano"])
    assert_true(probes, BUNDLED["polar-nano"])
    for dtype in ("float32", "bfloat16", "float16"):
        model = RewardModel.load("polar-nano", dtype=dtype)
        answers = [rewards[0] for rewards in model.score_encoded([model.template.encode(c) for c in COMPARISONS])]
        assert diagnose(probes, answers) is None, dtype
    for lie in ([probe.without_score_token for probe in probes], [probe.with_bos for probe in probes]):
        assert diagnose(probes, [value or 0.0 for value in lie]) is not None


def test_probes_can_be_written_into_a_checkpoint_without_touching_the_rest(checkpoint: Path) -> None:
    probes = read_probes(checkpoint)
    content = json.loads((checkpoint / CHECKPOINT_FILE).read_text())
    weights = (checkpoint / "model.safetensors").read_bytes()
    del content["probes"]
    (checkpoint / CHECKPOINT_FILE).write_text(json.dumps(content))
    write_probes(checkpoint)
    again = read_probes(checkpoint)
    assert [probe.ids for probe in again] == [probe.ids for probe in probes]
    assert [probe.reward for probe in again] == pytest.approx([probe.reward for probe in probes], abs=1e-6)
    assert (checkpoint / "model.safetensors").read_bytes() == weights


def test_an_adapter_gets_no_probes_before_it_is_merged(checkpoint: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = RewardModel.load(checkpoint)
    model.model.add_adapter(peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"]))
    model.save(tmp_path / "adapter")
    assert read_probes(tmp_path / "adapter") == []


def test_a_broken_model_gets_no_probes(template: Template, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build_model("llama", template)
    with torch.no_grad():
        model.model.score.weight.fill_(1e38)
    with caplog.at_level(logging.WARNING):
        model.save(tmp_path / "saved")
    assert "gets no probes: a reward is" in caplog.text
    assert read_probes(tmp_path / "saved") == []


def test_a_tokenizer_that_adds_other_tokens_than_training_is_told(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.loads((checkpoint / CHECKPOINT_FILE).read_text())
    content["template"]["bos_token_id"] = None
    (checkpoint / CHECKPOINT_FILE).write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        write_probes(checkpoint)
    assert "must be sent token ids" in caplog.text
    assert all(probe.with_bos != probe.reward for probe in read_probes(checkpoint))


# What engines need besides


def test_engines_find_all_they_need_to_answer_raw_scores(reward_model: RewardModel, tmp_path: Path) -> None:
    reward_model.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert config["id2label"] == {"0": "LABEL_0"}
    assert config["pad_token_id"] not in (None, reward_model.template.settings.score_token_id)


def test_the_score_head_of_qwen_has_a_bias_of_zero(reward_model: RewardModel, tmp_path: Path) -> None:
    """SGLang makes up a random one otherwise; there is none in Llama, where it would be ignored."""
    reward_model.save(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    if reward_model.model.config.model_type == "llama":
        assert "score.bias" not in weights
    else:
        assert weights["score.bias"].tolist() == [0.0]
    loaded = RewardModel.load(tmp_path / "saved")
    assert loaded.score(COMPARISONS) == pytest.approx(reward_model.score(COMPARISONS), abs=1e-6)
