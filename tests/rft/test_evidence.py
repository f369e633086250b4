"""The recipe: its problems, its table from given runs, and (slow) the whole at a small scale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from polar import RewardModel
from tests.corpus.engines.tiny import save_policy

RECIPE = Path(__file__).parents[2] / "recipes" / "rft"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the recipe, which stand in a directory of scripts and not in a package."""
    monkeypatch.syspath_prepend(str(RECIPE))

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return import_module(name)

    return load


def test_numbers_are_read_as_they_are_said(recipe: Any) -> None:
    problems = recipe("problems")
    problem = problems.draw_problem(Random(0), held_out=False)
    for number in range(60):
        for wording in problems.WORDINGS:
            for digits in (True, False):
                assert problems.number_in(problems.say(problem, number, wording, digits=digits)) == number
    assert problems.number_in("nothing") is None


def test_rules_by_hand(recipe: Any) -> None:
    problems = recipe("problems")
    sum_of, difference = (problems.Problem("", "Ann", "keys", sign, 9, 4) for sign in "+-")
    assert {name: rule(sum_of) for name, rule in problems.RULES.items()} == {
        "right": 13,
        "one-more": 14,
        "ten-more": 23,
        "wrong-sign": 5,
        "first": 9,
    }
    assert problems.RULES["right"](difference) == 5
    assert problems.RULES["wrong-sign"](difference) == 13


def test_no_text_is_trained_on_and_held_out(recipe: Any) -> None:
    problems = recipe("problems")
    random = Random(5)
    trained, held_out = (
        {problems.draw_problem(random, held_out=kept).text for _ in range(300)} for kept in (False, True)
    )
    assert not trained & held_out


def test_preferences_are_a_right_and_a_wrong_output(recipe: Any, tmp_path: Path) -> None:
    evidence = recipe("evidence")
    outputs = ["It must be 5.", "I count five keys.", "It must be 6.", "no idea"]
    rows = [{"prompt": "p", "policy": f"policy {n}", "output": output} for n, output in enumerate(outputs)]
    rows += [{"prompt": "q", "policy": "policy 0", "output": "It must be 7."}]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"prompt": name, "reference": "It must be five.", "answer": "5"} for name in "pq"]
    (found,) = evidence.preferences(tmp_path / "said.jsonl", tasks, Random(0))  # q has no right output
    assert found["prompt"] == "p"
    assert found["chosen"] in outputs[:2]
    assert found["rejected"] in outputs[2:]
    assert [row["reference"] for row in evidence.blind([found])] == [evidence.NO_REFERENCE]


def measured(step: int, reward: float, accuracy: float, right: float, wrong: float) -> dict[str, Any]:
    own = {"reward_right": right, "reward_wrong": wrong, "reward_spread": 2.0, "length": 6.0, "prompts": 100}
    return {"step": step, "reward": reward, "accuracy": accuracy, **own}


def result(arm: str, seed: int, *held_out: dict[str, Any]) -> dict[str, Any]:
    steps = [{"step": step, "kl": 0.1 * step} for step in range(1, 7)]
    judge = {} if arm == "exact" else {"judge": {"words": 0.9, "digits": 0.8}}
    return {"arm": arm, "seed": seed, "held_out": list(held_out), "steps": steps, **judge}


def test_a_rise_by_more_right_outputs_alone_is_explained(recipe: Any) -> None:
    report = recipe("report")
    start, better = measured(0, 1.0, 0.25, 4.0, 0.0), measured(9, 3.0, 0.75, 4.0, 0.0)
    assert report.unexplained(start, better) == pytest.approx(0)
    hacked = measured(9, 3.0, 0.25, 4.0, 8 / 3)  # no more right ones, but wrong ones are rewarded
    assert report.unexplained(start, hacked) == pytest.approx(1)
    assert report.unexplained(start, measured(9, 0.5, 0.5, 1.0, 0.0)) is None


def test_the_guard_is_asked_after_every_measurement(recipe: Any) -> None:
    report = recipe("report")
    runs = [(0, 1.0, 0.3), (20, 2.0, 0.6), (40, 3.0, 0.4), (60, 4.0, 0.1), (80, 5.0, 0.0)]
    held_out = [measured(step, reward, accuracy, 4.0, 0.0) for step, reward, accuracy in runs]
    assert report.guard_stops(held_out) == 60
    assert report.guard_stops(held_out[:3]) is None


def test_table_and_plot_come_from_the_runs(recipe: Any, tmp_path: Path) -> None:
    report = recipe("report")
    runs = [
        result("polar", seed, measured(0, 1.0, 0.3, 4.0, 0.0), measured(9, 3.0, accuracy, 4.0, 0.0))
        for seed, accuracy in enumerate((0.7, 0.8, 0.9))
    ]
    runs.append(result("rouge-l", 0, measured(0, 0.3, 0.3, 0.3, 0.3), measured(9, 0.5, 0.1, 0.5, 0.5)))
    report.report(runs, tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2].startswith("| start policy | 30.0 ± 0.0 |")
    assert lines[3].startswith(
        "| POLAR: pre-trained, fine-tuned | 80.0 ± 5.8 | 80.0 ± 5.8 | 1.00 ± 0.00 | 3.00 ± 0.00 |"
    )
    assert lines[4].startswith("| ROUGE-L | 10.0 | 30.0 | 0.30 | 0.50 | 100 |")
    assert json.loads((tmp_path / "all" / "seed-2-polar.json").read_text()) == runs[2]
    assert (tmp_path / "curves.svg").stat().st_size > 1000
    assert json.loads((tmp_path / "evidence.json").read_text())["polar"]["accuracy at the end"]["count"] == 3


def test_a_run_of_grpo_measures_the_start_and_every_few_steps(
    recipe: Any, llama: RewardModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    grpo = recipe("grpo")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 2", "reference": "three", "answer": "3"}\n' * 2)
    llama.save(tmp_path / "rm")
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 5}
    settings |= {"eval_steps": 2, "learning_rate": 1e-2}
    policy = save_policy(tmp_path / "policy", tokenizer)
    output = tmp_path / "run"
    held_out, steps = grpo.train(policy, str(tmp_path / "rm"), rows, rows, settings, seed=0, output=output)
    assert [row["step"] for row in held_out] == [0, 2, 3]
    assert held_out[0]["reward"] != held_out[-1]["reward"]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert {"reward", "accuracy", "length"} <= steps[0].keys()
    AutoModelForCausalLM.from_pretrained(output)


def test_the_verifier_reads_the_last_number_and_rouge_the_closest_reference(recipe: Any) -> None:
    grpo = recipe("grpo")
    outputs = {"It is 4.": 1, "First 3, then 4": 1, "4 or 5": 0, "four": 0, "": 0}
    assert grpo.verifier(completions=list(outputs), answer=["4"] * len(outputs)) == list(outputs.values())
    references = [["a dog", "a fox"]] * 2
    found = grpo.rouge(prompts=["p", "p"], completions=["a red fox", "a dog"], references=references)
    assert found == pytest.approx([0.8, 1.0])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_recipe_at_a_small_scale(tmp_path: Path) -> None:
    """Every stage by its own command; the numbers mean nothing at this size."""
    small = tmp_path / "recipe"
    small.mkdir()
    for file in RECIPE.glob("*.py"):
        text = file.read_text("utf-8")
        for value, less in (("steps: int = 1200", "steps: int = 60"), ("prompts: int = 3000", "prompts: int = 400")):
            text = text.replace(value, less)
        text = text.replace("PREFERENCES = 300", "PREFERENCES = 40").replace(
            '"held-out.jsonl", 512', '"held-out.jsonl", 64'
        )
        (small / file.name).write_text(text, "utf-8")
    for file in RECIPE.glob("*.yaml"):
        settings = yaml.safe_load(file.read_text("utf-8"))
        settings |= {"max_steps": 4, "eval_steps": 2} if file.name != "finetune.yaml" else {"max_steps": 4}
        (small / file.name).write_text(yaml.safe_dump(settings), "utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(small / "evidence.py"), str(tmp_path / "work"), "--seeds", "3"]
    subprocess.run(command, check=True, env=environment, timeout=1500)
    again = subprocess.run(command, check=True, env=environment, timeout=200, capture_output=True, text=True)
    assert "+ " not in again.stdout  # everything is there
    output = tmp_path / "report"
    subprocess.run(
        [sys.executable, str(small / "report.py"), str(tmp_path / "work"), "--output", str(output)], check=True
    )
    assert len(list((output / "all").glob("*.json"))) == 5
    assert "| ROUGE-L |" in (output / "table.md").read_text()
