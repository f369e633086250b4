"""The recipes of serving engines: each command goes through the engine's own parser, Ray Serve runs for real.

Engines pin libraries of their own, so they are looked for in the interpreters that POLAR_VLLM_PYTHON,
POLAR_SGLANG_PYTHON and POLAR_LMDEPLOY_PYTHON name, and in this one.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from polar.cli.main import main
from polar.core.checkpoint import BUNDLED
from polar.model.export import export

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "serving"
PAGES = [ROOT / "docs" / "engines.md", RECIPES / "README.md"]
ENGINES = ["vllm", "sglang", "lmdeploy"]

PARSERS = {
    "vllm": """
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
ServeSubcommand().subparser_init(parser.add_subparsers())
parse = parser.parse_args
names = ["model_tag", "runner", "dtype", "host", "port", "trust_remote_code"]
""",
    "sglang": """
from sglang.srt.server_args import prepare_server_args
parse = lambda words: prepare_server_args(words[1:])  # after "serve"
names = ["model_path", "is_embedding", "dtype", "host", "port", "trust_remote_code"]
""",
    "lmdeploy": """
from lmdeploy.cli.entrypoint import CLI, SubCliServe
CLI.add_parsers()
SubCliServe.add_parsers()
parse = CLI.parser.parse_args
names = ["model_path", "backend", "dtype", "server_name", "server_port", "trust_remote_code"]
""",
}
CHECK = """
import json, sys
words = json.loads(sys.argv[1])
found = [getattr(parse(words), name) for name in names]
try:
    parse([*words, "--no-such-flag"])
except SystemExit:
    print("PARSED", json.dumps(found))
"""


def words_of(recipe: str, bin: Path, *words: str, **variables: str) -> list[str]:
    """The command line that a recipe ends in: its program is replaced by one that shows it."""
    bin.mkdir()
    for engine in ENGINES:
        (bin / engine).write_text('#!/bin/sh\nprintf \'%s\\0\' "${0##*/}" "$@"\n')
        (bin / engine).chmod(0o755)
    environment = {"PATH": f"{bin}:{os.environ['PATH']}", **variables}
    command = [str(RECIPES / f"{recipe}.sh"), *words]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True)
    return shown.stdout.split("\0")[:-1]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_docs_show_the_command_that_the_recipe_runs(engine: str, tmp_path: Path) -> None:
    page = PAGES[0].read_text("utf-8").replace(" \\\n", " ")
    (line,) = re.findall(rf"^{engine} .*", page, re.M)
    assert words_of(engine, tmp_path / "bin", "MODEL") == shlex.split(line, comments=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_port_type_and_options_are_taken_and_a_name_with_spaces_is_one_word(engine: str, tmp_path: Path) -> None:
    model = str(tmp_path / "my model")
    words = words_of(engine, tmp_path / "bin", model, "8123", "--option", "a b", DTYPE="float16")
    assert words[-2:] == ["--option", "a b"]
    assert {model, "8123", "float16", "127.0.0.1"} < set(words)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_missing_model_is_one_line(engine: str) -> None:
    result = subprocess.run([RECIPES / f"{engine}.sh"], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode != 0
    assert "expected MODEL" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_polar_commands_of_the_docs_have_only_flags_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for page in PAGES for line in re.findall(r"^polar .*", page.read_text("utf-8"), re.M)]
    assert {shlex.split(line)[1] for line in lines} == {"convert", "export", "parity", "score", "serve"}
    for line in lines:
        words = shlex.split(line, comments=True)
        assert main([words[1], "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in words if word.startswith("--")), line


def python_of(engine: str) -> str:
    """An interpreter that has the engine."""
    variable = f"POLAR_{engine.upper()}_PYTHON"
    python = os.environ.get(variable, sys.executable if find_spec(engine) else "")
    if not python:
        pytest.skip(f"{engine} is not installed here, and {variable} names no other Python")
    return python


def run(python: str, program: str, *words: str) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [python, "-c", program, *words], capture_output=True, text=True, env=environment, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_engines_own_parser_takes_the_command_and_no_other(engine: str, tmp_path: Path) -> None:
    python = python_of(engine)
    words = words_of(engine, tmp_path / "bin", str(BUNDLED["polar-nano"]), "8123")
    (line,) = re.findall("^PARSED (.*)", run(python, PARSERS[engine] + CHECK, json.dumps(words[1:])), re.M)
    kind = {"vllm": "pooling", "sglang": True, "lmdeploy": "pytorch"}[engine]
    assert json.loads(line) == [str(BUNDLED["polar-nano"]), kind, "bfloat16", "127.0.0.1", 8123, False]


@pytest.mark.slow
def test_lmdeploy_reads_the_exported_config_as_a_reward_model(tmp_path: Path) -> None:
    python = python_of("lmdeploy")
    export("polar-nano", tmp_path / "exported", "lmdeploy")
    program = """
import inspect, sys
from lmdeploy.archs import get_model_arch
from lmdeploy.pytorch.config import ModelConfig
from lmdeploy.serve.core.async_engine import AsyncEngine
architecture, _ = get_model_arch(sys.argv[1])
assert architecture in inspect.getsource(AsyncEngine.async_get_reward_score)
config = ModelConfig.from_pretrained(sys.argv[1], dtype="bfloat16")
print("READ", architecture, config.hidden_size, config.num_layers)
"""
    assert "READ InternLM2ForRewardModel 192 5" in run(python, program, str(tmp_path / "exported"))


@contextmanager
def two_nodes() -> Iterator[str]:
    """A Ray cluster of two nodes on this machine with a processor each; gives its address."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        yield nodes.address
    finally:
        nodes.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_serves_the_bundled_model_on_two_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    monkeypatch.setenv("POLAR_API_KEYS", "secret")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "ray.serve.scripts"]
    with two_nodes() as address, (tmp_path / "log").open("wb") as log:
        start = ["start", "--address", address, "--http-port", str(port), "--proxy-location", "HeadOnly"]
        subprocess.run([*program, *start], stdout=log, stderr=log, timeout=120, check=True)
        serve = ["run", "--address", address, "--working-dir", ".", "ray_serve:build", "replicas=2"]
        process = subprocess.Popen([*program, *serve], stdout=log, stderr=log, cwd=RECIPES, start_new_session=True)
        try:
            deadline = time.monotonic() + 400
            while "is ready at" not in (text := (tmp_path / "log").read_text()):  # both replicas are
                assert process.poll() is None, text[-3000:]
                assert time.monotonic() < deadline, text[-3000:]
                time.sleep(0.5)
            assert main(["parity", f"127.0.0.1:{port}", "--device", "cpu"]) == 2
            assert "401" in capsys.readouterr().err
            monkeypatch.setenv("POLAR_API_KEY", "secret")
            assert main(["parity", f"127.0.0.1:{port}", "--device", "cpu"]) == 0, capsys.readouterr().err
        finally:
            process.terminate()  # what it started in the cluster ends with the cluster
            process.wait(60)
