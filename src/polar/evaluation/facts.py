"""What a manifest says about the model and the program."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import asdict
from pathlib import Path

from polar.core.template import Template
from polar.evaluation.manifest import ModelFacts
from polar.model.files import checkpoint_directory
from polar.model.reward_model import RewardModel
from polar.model.weights import weights_hash


def model_facts(name: str, template: Template, model: RewardModel | None, engine: str) -> ModelFacts:
    """The facts of the model that is evaluated; reads its files once more for their hash.

    Args:
        name: What it was loaded from, or the directory of the checkpoint that servers have, which may lack the weights.
        template: How inputs are made.
        model: None where servers have it.
        engine: What serves it then.
    """
    directory = checkpoint_directory(name)
    return ModelFacts(
        name=name,
        hash=weights_hash(directory) if any(directory.glob("*.safetensors")) else None,
        template_hash=template_hash(template),
        parameters=None if model is None else sum(parameter.numel() for parameter in model.model.parameters()),
        engine=engine if model is None else "polar",
        device=None if model is None else str(model.device),
        dtype=None if model is None else str(model.model.dtype).removeprefix("torch."),
        max_length=template.settings.max_length,
        max_response_length=template.settings.max_response_length,
    )


def template_hash(template: Template) -> str:
    """Sixteen hexadecimal digits of tokenizer and settings: equal templates make equal inputs."""
    content = [template.tokenizer.to_str(), asdict(template.settings), template.compat]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def commit() -> str | None:
    """The commit of polar's own source tree, with "+" when it has changes; None for an installed package."""
    here = Path(__file__).parent
    try:
        # An environment inside somebody else's repository is not our source tree: git must know this file.
        if _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
            return None
        return _git(here, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*")
    except (OSError, subprocess.TimeoutExpired):
        return None


def _git(directory: Path, *arguments: str) -> str | None:
    """What git answers, or None when it fails; it writes nothing."""
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return found.stdout.strip() if found.returncode == 0 else None
