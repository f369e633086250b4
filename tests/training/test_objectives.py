"""The objectives, against a plain numpy reference, XTuner's own numbers, and what training does with them.

`fixtures/golden/training.json` holds what InternLM/xtuner v0.2.0 makes of a few preferences (`tokenize_ref`,
`RewardModel`): ids, rewards of the model in `fixtures/golden/model1`, losses and penalties.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from polar import InputError, Preference, RewardModel, Template, Triple
from polar.core.records import Message
from polar.model.internlm2 import convert
from polar.training.batches import Collator, examples_from_preferences, examples_from_triples
from polar.training.config import FinetuneConfig, PretrainConfig
from polar.training.objectives import Objective
from polar.training.run import finetune
from polar.training.trainer import Discriminator, FiniteLosses

GOLDEN_DIRECTORY = Path(__file__).parents[1] / "fixtures" / "golden"
GOLDEN = json.loads((GOLDEN_DIRECTORY / "training.json").read_text("utf-8"))
CHOICES = list(itertools.product(("all_pairs", "plackett_luce"), (0.0, 0.3)))
EMPTY = 2
"""The row whose reference and rejected answer are empty: XTuner leaves out their newline, the client and we do not."""

LISTS = [4, 2, 3]
"""Candidates per group."""
PAIRS = [(start + i, start + j) for start, k in ((0, 4), (4, 2), (6, 3)) for i in range(k) for j in range(i + 1, k)]
BETTER, WORSE = (torch.tensor(side) for side in zip(*PAIRS, strict=True))


def reference(rewards, margins, ranked, centering):
    """Sum over comparisons, by the formulas of XTuner 0.2 (`reward.py`), TRL and Plackett-Luce, in float64."""
    beaten = {i: [j for first, j in PAIRS if first == i] for i, _ in PAIRS}
    pairs = [(i, [j]) for i, j in PAIRS] if ranked == "all_pairs" else beaten.items()
    margin = np.array([rewards[i] - np.log(np.exp(rewards[losers]).sum()) - margins[i] for i, losers in pairs])
    c, r = (rewards[[pair[side] for pair in PAIRS]] for side in (0, 1))
    return np.log1p(np.exp(-margin)).sum() + centering * ((c + r) ** 2).sum()


def some_rewards(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, sum(LISTS))


# ------------------------------------------------------------------------------------------------------- the formulas


@pytest.mark.parametrize(("ranked", "centering"), CHOICES)
def test_every_objective_matches_its_reference_in_float64(ranked, centering):
    objective = Objective(ranked, centering)
    for seed in range(5):
        rewards, margins = some_rewards(seed), np.repeat([0.0, 1.5, 0.25], LISTS)
        value = objective(torch.tensor(rewards), BETTER, WORSE, torch.tensor(margins))
        assert value.item() == pytest.approx(reference(rewards, margins, ranked, centering))


@pytest.mark.parametrize(("ranked", "centering"), CHOICES)
def test_gradients_equal_finite_differences(ranked, centering):
    objective = Objective(ranked, centering)
    rewards = torch.tensor(some_rewards(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda rewards: objective(rewards, BETTER, WORSE), rewards)


@pytest.mark.parametrize(("ranked", "centering"), CHOICES)
@pytest.mark.parametrize("size", [1e3, 1e6])
def test_extreme_rewards_neither_overflow_nor_give_nan(ranked, centering, size):
    rewards = (torch.tensor([1.0, -1, 1, -1, -1, 1, 0, 0, 0]) * size).requires_grad_()
    value = Objective(ranked, centering)(rewards, BETTER, WORSE)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(rewards.grad).all()


@pytest.mark.parametrize("ranked", ["all_pairs", "plackett_luce"])
def test_a_lost_comparison_keeps_its_full_gradient_and_a_won_one_has_none(ranked):
    rewards = torch.tensor([-1e4, 1e4], requires_grad=True)
    value = Objective(ranked)(rewards, torch.tensor([0, 1]), torch.tensor([1, 0]))
    value.backward()
    assert value.item() == pytest.approx(2e4)
    assert rewards.grad.tolist() == [-1.0, 1.0]


def test_plackett_luce_is_a_probability_over_all_orders():
    rewards = torch.tensor(some_rewards(1)[:4])
    objective, total = Objective(ranked="plackett_luce"), 0.0
    for order in itertools.permutations(range(4)):
        better, worse = (torch.tensor(side) for side in zip(*itertools.combinations(order, 2), strict=True))
        total += math.exp(-objective(rewards, better, worse))
    assert total == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranked": "listwise"}, "ranked must be one of all_pairs, plackett_luce; found 'listwise'"),
        ({"centering": -1.0}, "centering must be 0 or more"),
        ({"centering": math.nan}, "centering must be 0 or more"),
    ],
)
@pytest.mark.parametrize("config", [FinetuneConfig, PretrainConfig])
def test_values_that_there_are_not_are_refused(config, values, message):
    with pytest.raises(InputError, match=message):
        config(data=["x"], output="y", model="z", **values)


# ---------------------------------------------------------------------------------------------------- XTuner's numbers


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(case["max_length"]))
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_losses_equal_those_of_xtuner(case, scale):
    losses = case["losses"] if scale == 1 else case["losses"]["scaled_quarter"]
    chosen, rejected = (torch.tensor(case[f"{side}_rewards"]) * scale for side in ("chosen", "rejected"))
    count = len(chosen)
    rewards, better, worse = torch.cat([chosen, rejected]), torch.arange(count), torch.arange(count, 2 * count)

    def mean(objective: Objective) -> float:
        return objective(rewards, better, worse).item() / count

    assert mean(Objective()) == pytest.approx(losses["ranking"], rel=1e-6)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "model1"
    convert(GOLDEN_DIRECTORY / "model1", target)
    return target


def preferences(case) -> list[Preference]:
    def text(messages):
        return tuple(Message(**message) for message in messages)

    return [
        Preference(
            *(text(row[key]) for key in ("prompt", "reference")),
            (text(row["chosen"]), text(row["rejected"])),
            wrapper=row.get("wrapper", "sft"),
        )
        for row in case["rows"]
    ]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(case["max_length"]))
@pytest.mark.parametrize("compat", ["seed", None])
def test_training_ids_equal_those_of_xtuner(case, compat, converted):
    template = Template.load(converted, compat).with_lengths(case["max_length"], case["max_response_length"])
    examples = examples_from_preferences(preferences(case), template)
    for number, (example, xtuner) in enumerate(zip(examples, case["tokenized"], strict=True)):
        cut = any(example.group.truncations)
        if number != EMPTY and (compat == "seed" or not cut):
            assert example.group.sequences() == [xtuner["chosen_ids"], xtuner["rejected_ids"]], number


def test_rewards_and_loss_of_a_batch_equal_those_of_xtuner(converted):
    case = GOLDEN["cases"][1]
    model = RewardModel.load(converted, dtype="float32", compat="seed")
    template = model.template.with_lengths(case["max_length"], case["max_response_length"])
    rows = [number for number in range(len(case["rows"])) if number != EMPTY]
    examples = list(examples_from_preferences([preferences(case)[number] for number in rows], template))
    output = Discriminator(model.model)(**Collator()(examples))
    margins = [case["chosen_rewards"][number] - case["rejected_rewards"][number] for number in rows]
    assert output["margins"].tolist() == pytest.approx(margins, abs=5e-5)
    assert output["loss"].item() == pytest.approx(np.mean(np.log1p(np.exp(-np.array(margins)))), abs=5e-5)


# ---------------------------------------------------------------------------------------------------------- training


def test_long_lists_train_with_all_their_answers(template, llama):
    (example,) = examples_from_preferences([Preference("p", "r", ("a", "b c", "d e f", "g"))], template)
    assert len(example.group.branches) == 4
    for ranked, comparisons in (("all_pairs", 6), ("plackett_luce", 3)):
        objective = Objective(ranked=ranked)
        batch = Collator(objective=objective)([example])
        assert batch["labels"].tolist() == ([0, 0, 0, 1, 1, 2] if comparisons == 6 else [0, 1, 2])
        rewards = torch.zeros(4, requires_grad=True)
        objective(rewards, batch["better_P"], batch["worse_P"]).backward()
        assert (rewards.grad.diff() > 0).all()  # the better an answer, the more it is pulled up
        output = Discriminator(llama.model, objective=objective)(**batch)
        assert output["margins"].shape == (6,)


def test_several_negatives_are_one_comparison_under_plackett_luce(template):
    triples = [Triple("p", "r", "good", f"bad {number}") for number in range(3)]
    batch = Collator(objective=Objective(ranked="plackett_luce"))(list(examples_from_triples(triples, template)))
    assert batch["labels"].tolist() == [0]
    value = Objective(ranked="plackett_luce")(torch.zeros(4), batch["better_P"], batch["worse_P"])
    assert value.item() == pytest.approx(math.log(4))


def test_the_margin_of_a_row_moves_its_loss(template, llama):
    def loss(margin: float | None) -> float:
        rows = [Preference("p", "r", ("a", "b"), margin=margin), Preference("q", "r", ("c", "d"))]
        batch = Collator()(list(examples_from_preferences(rows, template)))
        output = Discriminator(llama.model)(**batch)
        shifted = output["margins"] - torch.tensor([margin or 0.0, 0.0])
        assert output["loss"].item() == pytest.approx(torch.nn.functional.softplus(-shifted).mean().item(), rel=1e-6)
        return output["loss"].item()

    assert loss(2.0) > loss(None) == loss(0.0)


def write_lists(path: Path, lengths: list[int], **more: object) -> str:
    rows = [
        {
            "prompt": f"Question {n}?",
            "reference": f"fox {n}",
            "ranked": [f"fox {n} {'cat ' * k}" for k in range(length)],
            **more,
        }
        for n, length in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.mark.parametrize("ranked", ["all_pairs", "plackett_luce"])
def test_every_pair_weighs_the_same_however_the_batch_is_split(ranked, checkpoint, tmp_path):
    """Lists of 2 to 4 answers, so that micro-batches hold different numbers of pairs."""
    data = write_lists(tmp_path / "lists.jsonl", [4, 2, 2, 3, 2, 4, 2, 2])

    def first_step(size: int) -> dict[str, float]:
        config = FinetuneConfig(
            model=str(checkpoint),
            data=[data],
            output=str(tmp_path / f"by-{size}"),
            batch_size=size,
            gradient_accumulation=8 // size,
            max_steps=1,
            ranked=ranked,
            log_steps=1,
        )
        finetune(config)
        return json.loads((tmp_path / f"by-{size}" / "run" / "trainer_state.json").read_text())["log_history"][0]

    whole, split = first_step(8), first_step(2)
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(("broken", "cause"), [(False, "weights are finite: look at"), (True, "an earlier step was")])
def test_a_loss_that_is_not_finite_names_its_records(broken, cause, template, checkpoint):
    model = RewardModel.load(checkpoint).model
    rows = [
        Preference("Is 3e38 a lot?\nYes or no?", "r", ("a", "b"), margin=1e39),
        Preference("q" * 99, "r", ("c", "d")),
    ]
    batch = Collator()(list(examples_from_preferences(rows, template)))
    if broken:
        model.score.weight.data.fill_(math.nan)
    losses = FiniteLosses(model)
    losses.add(torch.tensor(0.5), ["0"])
    losses.add(Discriminator(model)(**batch)["loss"], batch["names"])
    with pytest.raises(InputError, match=cause) as error:
        losses.on_pre_optimizer_step()
    assert '1 ("Is 3e38 a lot? Yes or no?"), 2 ("' + "q" * 40 + '...");' in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_stops_at_a_loss_that_is_not_finite(checkpoint, tmp_path):
    data = write_lists(tmp_path / "lists.jsonl", [2, 2], margin=1e39)
    with pytest.raises(InputError, match="the loss is inf in the batch of records"):
        finetune(FinetuneConfig(model=str(checkpoint), data=[data], output=str(tmp_path / "rm"), max_steps=1))
    assert not (tmp_path / "rm" / "config.json").exists()


@pytest.mark.parametrize(
    "values",
    [{"centering": 0.01}, {"ranked": "plackett_luce"}],
    ids=["centering", "plackett_luce"],
)
def test_finetuning_with_other_objectives_learns(values, checkpoint, tmp_path):
    data = write_lists(tmp_path / "lists.jsonl", [3] * 8)
    trained = finetune(
        FinetuneConfig(
            model=str(checkpoint), data=[data], eval_data=[data], output=str(tmp_path / "rm"),
            learning_rate=1e-3, max_steps=20, batch_size=8, eval_steps=20, **values,
        )
    )  # fmt: skip
    assert trained.provenance["training"]["metrics"]["eval_accuracy"] > 0.9
