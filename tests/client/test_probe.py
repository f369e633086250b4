"""The golden probe: honest servers pass in every precision, each known lie is named, and nothing flattened gets by."""

import json
import math
import random
import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from polar.client.probe import diagnose
from polar.core.checkpoint import CHECKPOINT_FILE, Probe, read_probes
from polar.core.errors import InputError

PROBES = [
    Probe([1, 5, 3], "a", 0.42, -0.96, 0.49),
    Probe([1, 6, 3], "b", 4.85, 3.95, 4.91),
    Probe([1, 7, 3], "c", 2.1, 1.7, 2.3),
]
REWARDS = [probe.reward for probe in PROBES]


def test_float32_servers_pass() -> None:
    assert diagnose(PROBES, REWARDS) is None
    assert diagnose(PROBES, [REWARDS[0] + 5e-5, REWARDS[1] - 5e-5, REWARDS[2]]) is None


def test_half_precision_passes() -> None:
    """Errors of up to 0.02 of the distance between the rewards, all of them the same way or not."""
    noise = random.Random(0)
    for _ in range(10_000):
        assert diagnose(PROBES, [reward + noise.uniform(-0.1, 0.1) for reward in REWARDS]) is None


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([sigmoid(reward) for reward in REWARDS], "sigmoid of the reward.*use_activation"),
        ([sigmoid(reward) + 0.002 for reward in REWARDS], "sigmoid"),  # of a bfloat16 server
        ([1.0, 1.0, 1.0], "softmax.*/v1/classify"),
        ([probe.without_score_token for probe in PROBES], "without their last token.*--allow-auto-truncate"),
        ([probe.with_bos for probe in PROBES], "one more BOS"),
        ([reward + 0.0259 for reward in REWARDS], r"same \+0\.0259.*score\.bias"),
        ([reward - 7.5 for reward in REWARDS], r"same -7\.5000.*score\.bias"),
        (REWARDS[::-1], "another model"),
        ([2 * reward for reward in REWARDS], "another model"),
        (
            [*REWARDS[:2], "the server answers a vector of 384 values"],
            r"vector of 384 values \(a hidden state.*--runner",
        ),
        ([*REWARDS[:2], "the server answers nan"], "answers nan"),
    ],
)
def test_a_lie_is_named_with_what_mends_it(answers: list[float | str], reason: str) -> None:
    found = diagnose(PROBES, answers)
    assert found is not None
    assert re.search(reason, found), found
    assert "\n" not in found


rewards = st.floats(-20, 20)


@given(rewards, rewards)
def test_no_sigmoid_softmax_or_sign_passes_for_the_reward(first: float, second: float) -> None:
    assume(abs(first - second) > 0.01)
    probes = [Probe([1], "", first, first - 2, None), Probe([2], "", second, second + 3, None)]
    lies = [[sigmoid(first), sigmoid(second)], [1.0, 1.0], [math.copysign(1, first), math.copysign(1, second)]]
    for lie in lies:
        far = max(abs(lie[0] - first), abs(lie[1] - second)) > 1e-3
        assert (diagnose(probes, lie) is not None) == far


@given(rewards, rewards, st.floats(-20, 20))
def test_no_constant_passes(first: float, second: float, constant: float) -> None:
    assume(abs(first - second) > 0.01)
    probes = [Probe([1], "", first, first, None), Probe([2], "", second, second, None)]
    assert diagnose(probes, [constant, constant]) is not None


def test_a_head_of_zeros_still_tells_a_sigmoid() -> None:
    probes = [Probe([1], "", 0.0, 0.0, 0.0), Probe([2], "", 0.0, 0.0, 0.0)]
    assert diagnose(probes, [0.0, 0.0]) is None
    assert "sigmoid" in (diagnose(probes, [0.5, 0.5]) or "")


def test_without_probes_only_the_form_counts() -> None:
    assert diagnose([], [0.3]) is None
    assert "vector" in (diagnose([], ["the server answers a vector of 9 values"]) or "")


@pytest.mark.parametrize("damage", [[1], [{"ids": [1]}], [{"reward": 2}], 5, [None]])
def test_damaged_probes_are_refused(damage: object, served: Path, tmp_path: Path) -> None:
    content = json.loads((served / CHECKPOINT_FILE).read_text())
    (tmp_path / CHECKPOINT_FILE).write_text(json.dumps({**content, "probes": damage}))
    with pytest.raises(InputError, match='"probes" is damaged'):
        read_probes(tmp_path)


def test_probes_are_read_and_may_be_missing(served: Path, tmp_path: Path) -> None:
    assert len(read_probes(served)) == 3
    content = json.loads((served / CHECKPOINT_FILE).read_text())
    del content["probes"]
    (tmp_path / CHECKPOINT_FILE).write_text(json.dumps(content))
    assert read_probes(tmp_path) == []
