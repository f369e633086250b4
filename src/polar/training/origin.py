"""Where a trained checkpoint comes from, as its `polar.json` tells: the base with its hash, the data, the settings."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from polar.core.checkpoint import CHECKPOINT_FILE, checkpoint_directory, read_checkpoint_file
from polar.core.version import __version__
from polar.data.readers import ReadReport
from polar.data.sources import sources
from polar.model.weights import weights_hash
from polar.training.config import PretrainConfig, TrainConfig

log = logging.getLogger(__name__)

Record = TypeVar("Record")


class Reading(Generic[Record]):
    """The records of several files, one after the other, and what there is to tell about the files afterwards."""

    def __init__(self, read: Callable[..., Iterator[Record]], paths: Sequence[str], on_bad_row: str) -> None:
        self._read = read
        self._files = [(path, ReadReport()) for path in paths]
        self._on_bad_row = on_bad_row

    def __iter__(self) -> Iterator[Record]:
        for path, report in self._files:
            yield from self._read(path, on_bad_row=self._on_bad_row, report=report)
            if report.skipped:
                log.warning("%s: skipped %d of %d rows", path, report.skipped, report.read + report.skipped)

    def facts(self) -> list[dict[str, Any]]:
        """Of every path: rows that were read and skipped, and the SHA-256 of its files (data sets have none)."""
        return [
            {"name": path, "rows": report.read, "skipped": report.skipped, "sha256": _hashes(path)}
            for path, report in self._files
        ]


def _hashes(path: str) -> dict[str, str]:
    found = {}
    for name, _ in sources(path):
        if Path(name).is_file():
            with Path(name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def base_facts(config: TrainConfig) -> dict[str, Any]:
    """What a training starts from: its name, the hash of its weights, of a hub name the commit, and its own origin."""
    if isinstance(config, PretrainConfig) and config.model == "scratch":
        return {"name": "scratch"}
    directory = checkpoint_directory(config.model)
    facts = {"name": config.model, "hash": weights_hash(directory)}
    if directory.parent.name == "snapshots":
        facts["commit"] = directory.name
    if not (directory / CHECKPOINT_FILE).is_file():  # a language model
        return facts
    return {**facts, "provenance": read_checkpoint_file(directory).get("provenance") or {}}


def provenance_of(
    config: TrainConfig,
    base: dict[str, Any],
    data: Sequence[dict[str, Any]],
    eval_data: Sequence[dict[str, Any]],
    training: dict[str, Any],
) -> dict[str, Any]:
    """The provenance of what was trained; nothing of the start's own stands at the top.

    Args:
        config: The settings.
        base: From `base_facts`.
        data: From `Reading.facts`.
        eval_data: The same of the held-out data.
        training: What came out: groups, steps, figures.
    """
    return {
        "made_by": f"polar {__version__} {'pretrain' if isinstance(config, PretrainConfig) else 'finetune'}",
        "base": base,
        "data": list(data),
        "eval_data": list(eval_data),
        "settings": asdict(config),
        "training": training,
        **({} if config.lora is None else {"lora": asdict(config.lora)}),
    }
