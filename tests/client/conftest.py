"""A checkpoint as far as clients need it: tokenizer, template and probes of the fakes' model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from polar import Comparison, Template
from polar.core import http
from polar.core.checkpoint import Probe
from tests.client.fakes import reward

INPUTS = [
    Comparison("What is the capital of China?", "Beijing.", "Shanghai."),
    Comparison("中文", "参考答案", "答案"),
    Comparison("1 2 3", "4", "5"),
]


def probes_of(template: Template) -> list[Probe]:
    sequences = [template.encode(comparison).sequences()[0] for comparison in INPUTS]
    bos = template.settings.bos_token_id
    assert bos is not None
    return [Probe(ids, "", reward(ids), reward(ids[:-1]), reward([bos, *ids])) for ids in sequences]


@pytest.fixture(scope="session")
def served(template: Template, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that clients are given."""
    directory = tmp_path_factory.mktemp("served")
    template.save(directory, probes=[asdict(probe) for probe in probes_of(template)])
    return directory


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(http, "LONGEST_PAUSE_SECONDS", 0.05)
