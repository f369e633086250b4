"""The package as a whole: every module imports, rooms keep their order, README commands run, recipes parse."""

import json
import os
import pkgutil
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx2
import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from tokenizers import Tokenizer
from trl.trainer.grpo_config import GRPOConfig

import polar
from polar.cli.main import main
from polar.data.writers import open_writer
from polar.evaluation.suites import read_suite
from polar.training.config import FinetuneConfig, PretrainConfig, ScratchConfig
from tests.corpus.engines.tiny import save_policy

ROOT = Path(__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(polar.__path__, "polar."))
EXTRAS = ["datasets", "peft", "tensorboard", "trl", "ray", "fastapi", "uvicorn", "sentencepiece", "hypothesis"]
HEAVY = ("model", "serving", "training", "evaluation", "cli")
TRAINING_WITH_REWARDS = ("polar.rft.guard", "polar.rft.trl")


def run_blocking(modules: list[str], imports: list[str], then: str = "") -> subprocess.CompletedProcess[str]:
    """Import modules in a fresh interpreter in which others cannot be imported."""
    program = (
        f"import sys\nfor name in {modules!r}: sys.modules[name] = None\n"
        f"import importlib\nfor name in {imports!r}: importlib.import_module(name)\n{then}\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)


def test_every_module_imports_with_the_base_dependencies() -> None:
    extras = [name for name in EXTRAS if name not in base_dependencies()]
    result = run_blocking(extras, [name for name in MODULES if not name.startswith("polar.serving")])
    assert result.returncode == 0, result.stderr
    serve = run_blocking(extras, ["polar.cli.main"], "sys.exit(sys.modules['polar.cli.main'].main(['serve']))")
    assert serve.returncode == 2
    assert "polar serve needs" in serve.stderr
    assert "pip install 'polar-rm[serve]'" in serve.stderr


def base_dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {re.split(r"[<>=\[ ]", dependency)[0] for dependency in project["dependencies"]}


def test_records_template_reading_and_corpus_need_no_torch() -> None:
    light = [name for name in MODULES if name.split(".")[1] not in HEAVY and name not in TRAINING_WITH_REWARDS]
    result = run_blocking(["torch", "transformers", "accelerate"], [*light, "polar.cli.main"])
    assert result.returncode == 0, result.stderr


def test_names_of_the_package_are_imported_without_torch() -> None:
    program = (
        "import sys\nfrom polar import *\nfrom polar import RewardModel\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
        "RewardModel.load(device='cpu').score({'prompt': 'p', 'reference': 'r', 'output': 'o'})\n"
        "assert 'torch' in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_the_contract_of_the_floors_sees_imports_of_every_form(tmp_path: Path) -> None:
    wrong = {
        "core.records -> polar.data.fields": "def f():\n    from polar.data import fields",
        "rft.reward -> polar.evaluation.records": "import polar.evaluation.records as records",
        "data.fields -> polar.cli.main": "from ..cli.main import main",
        "model.tree -> polar": "from polar import RewardModel",
    }
    shutil.copytree(ROOT / "src" / "polar", tmp_path / "polar", ignore=shutil.ignore_patterns("checkpoints", "*.pyc"))
    for name, line in wrong.items():
        with (tmp_path / "polar" / f"{name.split()[0].replace('.', '/')}.py").open("a") as file:
            file.write(f"\n{line}\n")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    command += ["--no-cache", str(ROOT / "pyproject.toml")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    options = {"capture_output": True, "text": True, "timeout": 120, "cwd": tmp_path, "env": environment}
    result = subprocess.run(command, check=False, **options)
    assert result.returncode == 1, result.stderr
    assert all(f"polar.{name} (l." in result.stdout for name in wrong), result.stdout


def test_readmes_are_in_step() -> None:
    english, chinese = (re.findall(r"```\w*\n(.*?)```", (ROOT / name).read_text("utf-8"), re.S) for name in READMES)
    strip = lambda block: [line.split("  #")[0].rstrip() for line in block.splitlines()]  # noqa: E731
    assert [strip(block) for block in english] == [strip(block) for block in chinese]


READMES = ("README.md", "README_zh-CN.md")


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)


def test_the_readmes_python_runs() -> None:
    (block,) = readme_blocks("python")
    result = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert re.match(r"\[-?\d+\.\d+\]\n\[\[(-?\d+\.\d+(, )?){3}\]\]\n$", result.stdout)


def test_the_python_of_the_docs_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text("utf-8"), re.S)
    program = re.sub(r"max_steps=\d+", "max_steps=2", "\n".join(blocks))
    options = {"capture_output": True, "text": True, "timeout": 240, "cwd": tmp_path, "check": False}
    result = subprocess.run([sys.executable, "-c", program], **options)
    assert result.returncode == 0, result.stderr
    assert re.match(r"\[-?\d+\.\d+\]\n\[(-?\d+\.\d+(, )?){3}\]\n", result.stdout)
    assert "unigram F1" in result.stdout
    assert (tmp_path / "results" / "rm" / "summary.json").is_file()


@pytest.mark.timeout(600)  # it runs fifteen commands one after the other
def test_the_readmes_commands_run(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `polar` line, in order, where the files they name exist (short runs, a tiny official model)."""
    monkeypatch.chdir(tmp_path)
    with open_writer(tmp_path / "prompts.jsonl") as writer:
        for number in range(30):
            writer.write({"prompt": f"What would you do with {number} apples?"})
    policies = []
    for number, architecture in enumerate(["llama", "qwen2", "qwen3"]):
        model = str(save_policy(tmp_path / architecture, tokenizer, architecture, number))
        engine = {"type": "transformers", "model": model, "batch_size": 32, "dtype": "float32"}
        policies.append({"name": architecture, "kind": "chat", "engine": engine, "decoding": {"max_tokens": 12}})
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"policies": policies}))
    preference = {"prompt": "2+2?", "reference": "4", "chosen": "It is 4.", "rejected": "5", "output": "4"}
    for name in ("preferences.jsonl", "dev.jsonl", "answers.jsonl"):
        (tmp_path / name).write_text((json.dumps(preference) + "\n") * 3)
    triple = {"prompt": "2+2?", "reference": "4", "positive": "It is 4.", "negative": "5"}
    with open_writer(tmp_path / "held-out.parquet") as writer:
        writer.write(triple)
    shutil.copytree(ROOT / "tests" / "fixtures" / "golden" / "model1", tmp_path / "internlm" / "POLAR-7B")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    short = {
        "POLAR_PRETRAIN_MAX_STEPS": "2",
        "POLAR_PRETRAIN_SCRATCH_HIDDEN_SIZE": "24",
        "POLAR_PRETRAIN_SCRATCH_VOCAB_SIZE": "300",
        "POLAR_PRETRAIN_MAX_LENGTH": "256",
        "POLAR_PRETRAIN_MAX_RESPONSE_LENGTH": "64",
        "OMP_NUM_THREADS": "1",
    }
    for name, value in short.items():
        monkeypatch.setenv(name, value)
    lines = [line for block in readme_blocks("bash") for line in block.splitlines() if line.startswith("polar ")]
    assert [shlex.split(line)[1] for line in lines] == [
        *"score score convert score serve parity sample corpus corpus pair pretrain finetune eval rft-data".split()
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    server = None
    for line in lines:
        words = [word.replace("30000", port) for word in shlex.split(line, comments=True)[1:]]
        if words[0] == "serve":
            server = subprocess.Popen([sys.executable, "-m", "polar.cli.main", *words])
            wait_until_ready(f"http://127.0.0.1:{port}/ready")
            continue
        assert main(words) == 0, line
        if words[0] == "parity":
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
    assert len((tmp_path / "rewards.jsonl").read_text().splitlines()) == 3


def wait_until_ready(address: str) -> None:
    for _ in range(300):
        try:
            if httpx2.get(address, trust_env=False).is_success:
                return
        except httpx2.TransportError:
            time.sleep(0.2)
    raise TimeoutError(address)


def test_the_readmes_make_targets_exist() -> None:
    targets = set(re.findall(r"^make (\S+)", "\n".join(readme_blocks("bash")), re.M))
    assert targets == {"demo", "test"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_every_link_in_the_docs_leads_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/*.md"), polar_card()]
    for page in pages:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def polar_card() -> Path:
    return polar.BUNDLED_MODEL / "README.md"


OWN_RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if "verl" not in path.parts)
"""Those for verl are checked in tests/rft."""


@pytest.mark.parametrize("recipe", OWN_RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_a_valid_configuration(recipe: Path) -> None:
    if recipe.parent.name == "launch":
        ClusterConfig.from_yaml_file(recipe)  # refuses unknown settings
    elif recipe.parent.name == "scaling":
        content = yaml.safe_load(recipe.read_text())
        PretrainConfig(**{"output": "y", **content["base"]})
        for shape in content["sizes"].values():
            assert shape.pop("learning_rate") > 0
            ScratchConfig(**shape)
    elif recipe.name == "suite.yaml":
        assert read_suite(str(recipe)).description
    elif recipe.name == "rft.yaml":
        GRPOConfig("x", use_cpu=True, bf16=False, report_to="none", **yaml.safe_load(recipe.read_text()))
    else:
        values = {"data": ["x"], "output": "y", "model": "z", **yaml.safe_load(recipe.read_text())}
        ScratchConfig(**values.pop("scratch", {}))
        kinds = {"finetune": FinetuneConfig, "pretrain": PretrainConfig}
        kinds[re.match("[a-z]+", recipe.name)[0]](**values)


def test_the_recipes_of_the_official_fine_tunings_differ_in_names_and_learning_rate_only() -> None:
    small, large = (yaml.safe_load((ROOT / "recipes" / f"finetune-{size}.yaml").read_text()) for size in ("1_8b", "7b"))
    differing = {name for name in small if small[name] != large[name]}
    assert differing == {"model", "output", "learning_rate"}
    assert (small["learning_rate"], large["learning_rate"]) == (1e-5, 2e-5)
    assert 8 * small["batch_size"] * small["gradient_accumulation"] == 320  # paper D.2


def test_the_demo_runs() -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "POLAR-7B" in result.stdout
    assert "What is the capital of China?" in result.stdout
