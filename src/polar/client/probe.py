"""The golden probe: does a server give the rewards of this checkpoint?

A checkpoint carries a few inputs with their float32 rewards (`polar.json`, key "probes", made by `polar.model.probes`),
and the rewards of their usual corruptions. A client sends the inputs when it connects and compares. An engine that
changes rewards (an activation, another pooling, a cut or added token, a bias that was never set) is refused with the
reason, since its rewards look plausible and would spoil a training run silently.

The rule: a difference of at most `TOLERANCE` passes. Engines that compute in bfloat16 or float16 differ by more, so up
to `REDUCED` of the distance between the largest and the smallest reward passes too, unless another explanation fits the
answers at least four times as well, or all of them are moved by the same amount. A sigmoid can never pass: it shrinks
distances to a quarter or less. Nor can a constant. What passes in half precision is weaker proof: a bias of that size
or a model that hardly differs goes unnoticed, and `polar parity` measures it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from polar.client.engines import Answer
from polar.core.checkpoint import Probe

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Between float32 engines; kernels and their order of summation make up to 5e-5."""
REDUCED = 0.1
"""In units of the distance between the probes' rewards, for engines that compute in half precision."""
SAME = 1e-4
"""How equal the differences of all probes must be to be taken for one constant."""


def diagnose(probes: Sequence[Probe], answers: Sequence[Answer]) -> str | None:
    """Return why a server's answers to the probes are not their rewards, and what fixes it; None when they are.

    The answers are numbers or reasons, one per probe.
    """
    found: list[float] = []
    for answer in answers:
        if isinstance(answer, str):
            return f"{answer}{POOLING if 'vector' in answer else ''}"
        found.append(answer)
    if not probes:
        return None
    expected = [probe.reward for probe in probes]
    raw = _distance(found, expected)
    if raw <= TOLERANCE:
        return None
    if all(abs(abs(answer) - 1) < 1e-6 for answer in found):
        return SOFTMAX
    explanations = {
        SIGMOID: [_sigmoid(reward) for reward in expected],
        CUT: [probe.without_score_token for probe in probes],
        BOS: [probe.reward if probe.with_bos is None else probe.with_bos for probe in probes],
    }
    reason = min(explanations, key=lambda name: _distance(found, explanations[name]))
    best, half = _distance(found, explanations[reason]), REDUCED * (max(expected) - min(expected))
    explained = 4 * best <= raw
    if explained and best <= TOLERANCE:
        return reason
    offsets = [answer - reward for answer, reward in zip(found, expected, strict=True)]
    if len(offsets) > 2 and max(offsets) - min(offsets) <= SAME:
        return f"every reward is moved by the same {offsets[0]:+.4f}: {BIAS}"
    if explained and best <= half:
        return reason
    if raw <= half:
        log.info("a server's rewards differ by up to %.2g from float32: it computes in half precision", raw)
        return None
    shown = ", ".join(f"{answer:.4f} for {reward:.4f}" for answer, reward in zip(found, expected, strict=True))
    return f"it answers {shown}: it serves another model than this checkpoint, or a version of it"


POOLING = (
    " (a hidden state): serve the *ForSequenceClassification checkpoint itself, vLLM with --runner pooling --convert "
    "classify, SGLang with --is-embedding"
)
SIGMOID = (
    "it answers the sigmoid of the reward: start vLLM with --pooler-config '{\"use_activation\": false}', or set "
    'problem_type to "regression" in config.json'
)
SOFTMAX = (
    "it answers 1 or -1, a softmax over the one label or a normalised vector: ask SGLang at /classify (server_type "
    "sglang), not at /v1/classify, and keep id2label in config.json"
)
BIAS = (
    "the score head has a bias that is not in the checkpoint (SGLang leaves it random for Qwen2 and Qwen3); load the "
    "checkpoint with RewardModel and save it again, which writes score.bias as zero"
)
CUT = (
    "it scores inputs without their last token: start SGLang without --allow-auto-truncate, vLLM without truncation, "
    "and let nothing strip special tokens on the way"
)
BOS = "it puts one more BOS in front of every input: make whatever is between here and the engine pass token ids on"


def _distance(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def _sigmoid(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))
