"""The recipes for verl, as far as they can be checked without it (tests/rft/test_verl_peer.py composes them)."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from polar.rft.reward import Settings, read_settings

RECIPES = Path(__file__).parents[2] / "recipes" / "verl"
DATA = ("hh-rlhf", "general", "math")


def launched(tmp_path: Path, *arguments: str, **environment: str) -> list[str]:
    """What the launcher starts."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/home/me", "PYTHON": str(python), **environment}
    command = [str(RECIPES / "run.sh"), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True)
    return result.stdout.splitlines()


def test_all_settings_of_the_reward_are_there_as_they_are_by_default() -> None:
    content: dict[str, Any] = yaml.safe_load((RECIPES / "polar.yaml").read_text())
    function = content["reward"]["custom_reward_function"]
    assert function["path"] == "pkg://polar.rft.verl"
    assert set(function["reward_kwargs"]) == set(Settings.__dataclass_fields__)
    assert read_settings(function["reward_kwargs"]) == Settings()


@pytest.mark.parametrize("data", DATA)
def test_the_launcher(data: str, tmp_path: Path) -> None:
    (tmp_path / "data" / data).mkdir(parents=True)
    (tmp_path / "data" / data / "test.parquet").touch()
    environment = {"POLAR_DATA": str(tmp_path / "data"), "POLAR_REWARD_ADDRESS": "a:1,b:2"}
    words = launched(tmp_path, data, "grpo", "me/my policy", "trainer.total_epochs=2", **environment)
    assert words[:6] == ["-m", "verl.trainer.main_ppo", "--config-path", str(RECIPES), "--config-name", data]
    assert "by=grpo" in words
    assert f"data.train_files={tmp_path}/data/{data}/train.parquet" in words
    assert f"data.val_files={tmp_path}/data/{data}/test.parquet" in words
    assert "actor_rollout_ref.model.path=me/my policy" in words
    assert "reward.custom_reward_function.reward_kwargs.address='a:1,b:2'" in words
    assert not any("reward_kwargs.model=" in word for word in words)
    assert words[-1] == "trainer.total_epochs=2"


def test_the_launcher_hands_on_a_checkpoint(tmp_path: Path) -> None:
    words = launched(tmp_path, "math", "ppo", "policy", "a=b", POLAR_REWARD_MODEL="/models/rm 7B")
    assert "reward.custom_reward_function.reward_kwargs.model='/models/rm 7B'" in words
    assert words[-1] == "a=b"


def test_the_launcher_says_how_it_is_used() -> None:
    result = subprocess.run([RECIPES / "run.sh"], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 2
    assert "recipes/verl/run.sh DATA ALGORITHM POLICY" in result.stderr
