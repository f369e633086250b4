"""POLAR: reward models that score a trajectory by its closeness to a reference (arXiv 2507.05197)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from polar.core.checkpoint import BUNDLED_MODEL
from polar.core.errors import InputError, RewardError
from polar.core.records import Comparison, Group, Message, Preference, Trajectory, Triple
from polar.core.template import EncodedGroup, Template, TemplateSettings
from polar.core.version import __version__

if TYPE_CHECKING:
    from polar.client.client import AsyncRewardModelClient
    from polar.client.sync import RewardModelClient
    from polar.corpus.pair import pair
    from polar.corpus.sample import sample
    from polar.evaluation.run import evaluate
    from polar.model.reward_model import RewardModel
    from polar.training.api import finetune, pretrain

__all__ = [
    "BUNDLED_MODEL",
    "AsyncRewardModelClient",
    "Comparison",
    "EncodedGroup",
    "Group",
    "InputError",
    "Message",
    "Preference",
    "RewardError",
    "RewardModel",
    "RewardModelClient",
    "Template",
    "TemplateSettings",
    "Trajectory",
    "Triple",
    "__version__",
    "evaluate",
    "finetune",
    "pair",
    "pretrain",
    "sample",
]

_LAZY = {
    "AsyncRewardModelClient": "polar.client.client",
    "RewardModel": "polar.model.reward_model",
    "RewardModelClient": "polar.client.sync",
    "evaluate": "polar.evaluation.run",
    "finetune": "polar.training.api",
    "pair": "polar.corpus.pair",
    "pretrain": "polar.training.api",
    "sample": "polar.corpus.sample",
}
"""Modules that are imported at the first use of a name: records, template and clients need no torch."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'polar' has no attribute {name!r}")
