"""The bundled models: they load everywhere, are small enough, and know what their cards say they know."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from polar import Comparison, Group, RewardModel
from polar.core.checkpoint import BUNDLED, BUNDLED_NAME
from polar.data.readers import read_groups

GOLDEN = {
    "polar-mini": [
        *(5.6348, -2.0013),
        *(8.4085, 6.4987, 1.7883, 2.678, 4.395, 5.0092, 0.1476),
        *(8.2401, 4.0502, -2.9356, -2.1485, -0.8031, -3.3999),
    ],
    "polar-nano": [
        *(-0.3622, -1.9723),
        *(4.2066, 3.626, 3.6246, 3.6256, 3.6253, 1.5305, 1.0905),
        *(3.9633, 3.3566, -1.3761, -0.8239, -1.223, -1.6268),
    ],
}
MOST_BYTES = {"polar-mini": 64e6, "polar-nano": 12e6}
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module", params=list(BUNDLED))
def bundled(request: pytest.FixtureRequest) -> tuple[str, RewardModel]:
    return request.param, RewardModel.load(request.param, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def mini() -> RewardModel:
    return RewardModel.load("polar-mini", device="cpu", dtype="float32")


@pytest.mark.parametrize("name", BUNDLED)
def test_they_are_small_and_safe(name: str) -> None:
    files = list(BUNDLED[name].iterdir())
    assert sum(file.stat().st_size for file in files) < MOST_BYTES[name]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".md"}


def test_the_default_is_the_better_one() -> None:
    assert BUNDLED_NAME == "polar-mini"


def test_plain_transformers_gives_the_same_rewards(bundled: tuple[str, RewardModel]) -> None:
    name, ours = bundled
    model = AutoModelForSequenceClassification.from_pretrained(BUNDLED[name], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED[name])
    groups = list(read_groups(EXAMPLES / "seed_examples.jsonl"))
    for group, rewards in zip(groups, ours.score_groups(groups), strict=True):
        for ids, reward in zip(ours.template.encode_group(group).sequences(), rewards, strict=True):
            with torch.no_grad():
                assert model(torch.tensor([ids])).logits.item() == pytest.approx(reward, abs=1e-4)
    # Engines that take text get the same ids: the tokenizer puts first what the template does; markers are single.
    settings = ours.template.settings
    split, score = (tokenizer.convert_ids_to_tokens(i) for i in (settings.split_token_id, settings.score_token_id))
    (ids,) = ours.template.encode_group(Group("What?", "It is 4.", ("Five.",))).sequences()
    assert tokenizer(f"What?\nIt is 4.{split}What?\nFive.{score}").input_ids == ids


def test_a_copy_of_the_reference_beats_outputs_for_other_prompts(bundled: tuple[str, RewardModel]) -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "real_outputs.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        others = tuple(output for other in rows if other is not row for output in other["candidates"])
        rewards = bundled[1].score_groups([Group(row["prompt"], row["reference"], (row["reference"], *others))])[0]
        assert rewards[0] == max(rewards)


def test_the_published_examples_score_as_they_did(bundled: tuple[str, RewardModel]) -> None:
    """Golden values of the shipped weights: a refactor of template, tree or loading must not move them."""
    name, model = bundled
    rewards = [value for group in model.score_groups(read_groups(EXAMPLES / "seed_examples.jsonl")) for value in group]
    assert rewards == pytest.approx(GOLDEN[name], abs=2e-3)


def test_mini_orders_the_published_examples_nearly_as_polar_7b(mini: RewardModel) -> None:
    path = EXAMPLES / "seed_examples.jsonl"
    official = [json.loads(line)["polar_7b"] for line in path.read_text("utf-8").splitlines()]
    agree = pairs = 0
    for rewards, others in zip(mini.score_groups(read_groups(path)), official, strict=True):
        for (ours, theirs), (our, their) in combinations(zip(rewards, others, strict=True), 2):
            agree += (ours > our) == (theirs > their)
            pairs += 1
    assert pairs == 37
    assert agree >= 33


def test_mini_ranks_the_examples_of_the_readme_rightly(mini: RewardModel) -> None:
    capital = Group("What is the capital of China?", "Beijing.", ("It is Beijing.", "Shanghai."))
    right, wrong = mini.score_groups([capital])[0]
    assert right > wrong
    four, five, word = mini.score_groups([Group("What is 2+2?", "It is 4.", ("4", "It is 5.", "four"))])[0]
    assert min(four, word) > five
    assert mini.score([Comparison("What is 2+2?", reference="It is 4.", output="4")]) == pytest.approx([four], abs=1e-4)
