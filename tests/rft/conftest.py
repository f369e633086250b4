"""Rewards from a fake server, on the tiny checkpoint of the client's tests."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from polar.core.checkpoint import CHECKPOINT_FILE
from polar.rft import reward
from tests.client.conftest import served, short_pauses  # noqa: F401
from tests.client.fakes import Fake


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("POLAR_")]:
        monkeypatch.delenv(name)
    yield
    reward._reward.cache_clear()  # clients close with their last reference


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake("vllm") as server:
        yield server


@pytest.fixture(scope="session")
def calibrated(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The same checkpoint with a calibration."""
    directory = tmp_path_factory.mktemp("calibrated") / "model"
    shutil.copytree(served, directory)
    content = json.loads((directory / CHECKPOINT_FILE).read_text())
    content["calibration"] = {"mean": -3.0, "std": 2.0, "temperature": 1.5}
    (directory / CHECKPOINT_FILE).write_text(json.dumps(content))
    return directory
