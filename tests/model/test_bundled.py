"""The bundled model: loads everywhere, small enough, and knows what its card says it knows."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from polar import BUNDLED_MODEL, Group, RewardModel
from polar.data.readers import read_groups

GOLDEN = [
    *(-0.3622, -1.9723),
    *(4.2066, 3.626, 3.6246, 3.6256, 3.6253, 1.5305, 1.0905),
    *(3.9633, 3.3566, -1.3761, -0.8239, -1.223, -1.6268),
]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def nano() -> RewardModel:
    return RewardModel.load()


def test_it_is_small_and_safe() -> None:
    files = list(BUNDLED_MODEL.iterdir())
    assert sum(file.stat().st_size for file in files) < 12e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".md"}


def test_plain_transformers_gives_the_same_rewards(nano: RewardModel) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    groups = list(read_groups(EXAMPLES / "seed_examples.jsonl"))
    for group, rewards in zip(groups, nano.score_groups(groups), strict=True):
        for ids, reward in zip(nano.template.encode_group(group).sequences(), rewards, strict=True):
            with torch.no_grad():
                assert model(torch.tensor([ids])).logits.item() == pytest.approx(reward, abs=1e-4)
    # Engines that take text get the same ids: the tokenizer puts <s> first, and the markers are single tokens.
    settings = nano.template.settings
    split, score = (tokenizer.convert_ids_to_tokens(i) for i in (settings.split_token_id, settings.score_token_id))
    (ids,) = nano.template.encode_group(Group("What?", "It is 4.", ("Five.",))).sequences()
    assert tokenizer(f"What?\nIt is 4.{split}What?\nFive.{score}").input_ids == ids


def test_a_copy_of_the_reference_beats_outputs_for_other_prompts(nano: RewardModel) -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "real_outputs.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        others = tuple(output for other in rows if other is not row for output in other["candidates"])
        rewards = nano.score_groups([Group(row["prompt"], row["reference"], (row["reference"], *others))])[0]
        assert rewards[0] == max(rewards)


def test_the_published_examples_score_as_they_did(nano: RewardModel) -> None:
    """Golden values of the shipped weights: a refactor of template, tree or loading must not move them."""
    rewards = [value for group in nano.score_groups(read_groups(EXAMPLES / "seed_examples.jsonl")) for value in group]
    assert rewards == pytest.approx(GOLDEN, abs=2e-3)
