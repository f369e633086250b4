"""What an evaluation was: with it, and its records, a result can be checked and made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from polar.core.errors import InputError, first_mistake
from polar.core.files import write_text
from polar.core.references import Aggregate

Task = Literal["policy discrimination", "preference accuracy", "verifiable correctness", "best of N", "sensitivity"]
TASKS: tuple[Task, ...] = get_args(Task)

MANIFEST = "manifest.json"


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelFacts(_Facts):
    """Which model gave the rewards, and how."""

    name: str
    """As it was asked for: a directory or a hub name."""
    hash: str | None
    """Hexadecimal digits that change with any weight; None where only a server has them."""
    template_hash: str
    """The same for the input format: tokenizer and settings."""
    parameters: int | None
    """None where a server computed; it does not tell, as for the two below."""
    engine: str
    """What computed the rewards: "polar" (this process), or the type of a server as it was given, also "auto"."""
    device: str | None
    dtype: str | None
    max_length: int
    """Tokens."""
    max_response_length: int
    """Tokens."""

    @property
    def computed(self) -> str:
        """By what, in words."""
        return f"a server ({self.engine})" if self.device is None else f"{self.engine}, {self.dtype} on {self.device}"

    @property
    def hashes(self) -> str:
        """Of weights and template, shortened."""
        return f"weights {(self.hash or 'not here')[:12]}, template {self.template_hash[:12]}"


class DatasetFacts(_Facts):
    """One data set of the suite."""

    name: str
    path: str
    task: Task
    reference: str
    """Where references came from, in words."""
    aggregate: Aggregate = "max"
    """What became of the rewards against several references, where items have them."""
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
    """What an evaluation was: with it, and the records, a result can be checked and made again."""

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


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest at once or not at all.

    Raises:
        InputError: the disk refuses it.
    """
    write_text(directory / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of an evaluation.

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
