"""The manifest of an evaluation: model, data and settings, so that a result can be checked and reproduced."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from polar.core.checkpoint import checkpoint_directory
from polar.core.errors import InputError, first_mistake
from polar.core.files import write_text
from polar.core.records import Aggregate
from polar.core.template import Template

if TYPE_CHECKING:
    from polar.model.reward_model import RewardModel

Task = Literal["policy discrimination", "preference accuracy", "verifiable correctness", "best of N", "sensitivity"]
TASKS: tuple[Task, ...] = get_args(Task)

MANIFEST = "manifest.json"


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelFacts(_Facts):
    """The model that gave the rewards, and how it was run."""

    name: str
    """As it was asked for: a directory or a hub name."""
    hash: str | None
    """Hexadecimal digits that change with any weight; None where only a server has them."""
    template_hash: str
    """The same for the input format: tokenizer and settings."""
    parameters: int | None
    """None where a server computed, which does not say; device and dtype too."""
    engine: str
    """Where rewards were computed: "polar" (this process), or the type of a server as it was given, also "auto"."""
    device: str | None
    dtype: str | None
    max_length: int
    """Tokens."""
    max_response_length: int
    """Tokens."""

    @property
    def computed(self) -> str:
        """Engine, dtype and device in words."""
        return f"a server ({self.engine})" if self.device is None else f"{self.engine}, {self.dtype} on {self.device}"

    @property
    def hashes(self) -> str:
        """Hashes of weights and template, shortened."""
        return f"weights {(self.hash or 'not here')[:12]}, template {self.template_hash[:12]}"


class DatasetFacts(_Facts):
    """One data set of the suite."""

    name: str
    path: str
    task: Task
    reference: str
    """Where references came from, in words."""
    aggregate: Aggregate = "max"
    """How rewards against several references became one, where items have them."""
    scoring: str | None = None
    """Official scoring rules that apply as well (`polar.evaluation.official`)."""
    finished: bool = False
    """The fields below are known once all items are scored."""
    items: int = 0
    skipped: int = 0
    """Rows that could not be used."""
    first_reasons: tuple[str, ...] = ()
    """Why the first few were skipped."""
    hash: str | None = None
    """Hexadecimal digits that change with any text or label of the items; equal items have equal hashes."""


class Manifest(_Facts):
    """Model, data and settings of an evaluation."""

    format: Literal[2] = 2
    polar: str
    commit: str | None
    """Of polar's own source tree; None for an installed package."""
    started: str
    """UTC, ISO 8601."""
    suite: str
    """Name of the suite, or "flags"."""
    model: ModelFacts | None
    """None when the baselines were evaluated alone."""
    scorers: tuple[str, ...]
    """In the order of tables: `MODEL` first, chance last."""
    settings: dict[str, Any]
    """The other settings of the run, such as the limit of items."""
    versions: dict[str, str]
    """Of the libraries that numbers depend on."""
    datasets: tuple[DatasetFacts, ...]

    @property
    def finished(self) -> bool:
        """Whether the records of all data sets are complete."""
        return all(dataset.finished for dataset in self.datasets)


def model_facts(name: str | Path | None, template: Template, model: RewardModel | None, engine: str) -> ModelFacts:
    """Return the facts of the model that is evaluated; its weights are read once more for their hash.

    Args:
        name: What it was loaded from, or the directory of the checkpoint that servers have, which may lack the weights;
            None for a model that the caller has, whose weights may be in no file.
        template: How inputs are made.
        model: None where servers have it.
        engine: What serves it then.
    """
    return ModelFacts(
        name=str(name) if name is not None else _name_of(model),
        hash=_files_hash(name) if name is not None else _state_hash(model),
        template_hash=template_hash(template),
        parameters=None if model is None else sum(parameter.numel() for parameter in model.model.parameters()),
        engine=engine if model is None else "polar",
        device=None if model is None else str(model.device),
        dtype=None if model is None else str(model.model.dtype).removeprefix("torch."),
        max_length=template.settings.max_length,
        max_response_length=template.settings.max_response_length,
    )


def _files_hash(name: str | Path) -> str | None:
    from polar.model.weights import weights_hash

    directory = checkpoint_directory(name)
    return weights_hash(directory) if any(directory.glob("*.safetensors")) else None


def _name_of(model: RewardModel | None) -> str:
    assert model is not None
    return model.model.name_or_path or type(model.model).__name__


def _state_hash(model: RewardModel | None) -> str:
    """Sixteen hexadecimal digits of the names and numbers of all weights in memory."""
    import torch

    assert model is not None
    digest = hashlib.sha256()
    for name, weight in sorted(model.model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def template_hash(template: Template) -> str:
    """Return sixteen hexadecimal digits of tokenizer and settings: equal templates make equal inputs."""
    content = [template.tokenizer.to_str(), asdict(template.settings), template.compat]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def commit() -> str | None:
    """Return the commit of polar's own source tree, with "+" when it has changes; None for an installed package."""
    here = Path(__file__).parent
    try:
        # An environment inside somebody else's repository is not our source tree: git must know this file.
        if _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
            return None
        return _git(here, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*")
    except (OSError, subprocess.TimeoutExpired):
        return None


def _git(directory: Path, *arguments: str) -> str | None:
    """Return the answer of git, or None when it fails; nothing is written."""
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest completely or not at all.

    Raises:
        InputError: the disk refuses it.
    """
    write_text(directory / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(directory: str | Path) -> Manifest:
    """Return the manifest of an evaluation.

    Raises:
        InputError: there is none, or it is not one of this format.
    """
    path = Path(directory) / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{directory}: no {MANIFEST}; expected a directory that `polar eval --output` wrote"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except ValidationError as error:
        raise InputError(f"{path}: cannot be read as a manifest: {first_mistake(error)}") from error
