"""The last layer is computed only where rewards are read; rewards stay the same, also for threads beside it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from polar import RewardModel, Template
from polar.core.template import EncodedGroup
from polar.model.cpu import few_lengths
from polar.model.tree import only_where_read, rewards, tree_batch
from tests.conftest import ARCHITECTURES, build_model

GROUPS = [EncodedGroup(list(range(10, 40)), [[50, 51, 52], [60] * 70], []), EncodedGroup([], [[7, 8, 9]], [])]


def test_fewer_rows_are_computed_and_rewards_are_the_same(reward_model: RewardModel) -> None:
    model, batch = reward_model.model, tree_batch(GROUPS)
    rows: list[list[int]] = []
    handles = [
        layer.mlp.down_proj.register_forward_hook(lambda part, values, output: rows[-1].append(output.shape[1]))
        for layer in model.model.layers
    ]
    try:
        found = []
        for context in (torch.no_grad(), torch.inference_mode(), torch.no_grad()):
            rows.append([])
            with context:
                found.append(rewards(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    tokens, layers = batch.ids_1T.shape[1], len(model.model.layers)
    assert rows == [[tokens] * layers, [tokens] * (layers - 1) + [3], [tokens] * layers]
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_threads_do_not_see_each_others_rows(
    architecture: str, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a model that nobody has used before, so that whatever its first use sets up is set up by threads at once."""
    loads = [[EncodedGroup(list(range(9, 9 + length)), [[5] * length, [6, 7]], [])] for length in range(2, 40)]
    fresh, other = (build_model(architecture, template) for _ in range(2))
    begin = threading.Barrier(4)
    register = torch.nn.Module.register_forward_pre_hook

    def slowly(part: torch.nn.Module, hook: Any, **kwargs: Any) -> Any:
        """Whoever found that a hook is missing is overtaken by another thread before it adds one."""
        time.sleep(0.05)
        return register(part, hook, **kwargs)

    def score(loads: list[list[EncodedGroup]]) -> list[list[list[float]]]:
        begin.wait(10)
        return [fresh.score_encoded(load) for load in loads]

    monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(score, [loads[number::4] for number in range(4)]))
    for number, load in enumerate(loads):
        assert found[number % 4][number // 4][0] == pytest.approx(other.score_encoded(load)[0], abs=1e-5)


@pytest.mark.parametrize(("onednn", "places"), [(False, 3), (True, few_lengths(3))])
def test_numbers_of_places_are_few_where_every_new_shape_costs(
    reward_model: RewardModel, onednn: bool, places: int
) -> None:
    model, batch = reward_model.model, tree_batch(GROUPS, onednn=onednn)
    computed: list[int] = []
    projection = model.model.layers[-1].mlp.down_proj
    hook = projection.register_forward_hook(lambda part, values, output: computed.append(output.shape[1]))
    try:
        with torch.inference_mode():
            expected = model.model(batch.ids_1T).last_hidden_state[0, batch.scores_N]
            with only_where_read(model, batch):
                found = model.model(batch.ids_1T).last_hidden_state[0, batch.scores_N]
    finally:
        hook.remove()
    assert computed == [batch.ids_1T.shape[1], places]
    assert torch.allclose(found, expected, atol=1e-5)


def test_other_architectures_are_left_alone(reward_model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_model.model.config, "model_type", "another", raising=False)
    batch = tree_batch([EncodedGroup([], [[4, 5, 6]], [])])
    with torch.inference_mode(), only_where_read(reward_model.model, batch):
        hidden = reward_model.model.model(batch.ids_1T).last_hidden_state
    assert bool(hidden.abs().sum(-1).gt(0).all())
