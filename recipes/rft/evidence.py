"""The evidence: the same fine-tuning under five rewards, from the first network to the table and the plot.

    python recipes/rft/evidence.py WORK --seeds 0 1 2          # all arms, about 20 minutes of one CPU core per seed
    python recipes/rft/evidence.py WORK --seeds 0 --arms polar # the recipe for one arm

A seed is a whole replication: its own policies, corpus, reward models and fine-tuning. What is done is not done again,
so a run that was stopped goes on, and seeds can run beside each other. `recipes/rft/report.py` makes table and plot.

Arms: polar (pre-trained and fine-tuned), scratch (the same network fine-tuned without pre-training), blind (pre-trained
and fine-tuned like polar, but fine-tuned and used without a reference), rouge-l, exact (the verifier itself: the upper
bound).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
import yaml
from grpo import named_reward, train
from policies import make, write_rows
from problems import RULES, WORDINGS, draw_problem, number_in, say

from polar import RewardModel
from polar.core.records import prompt_id, text_of
from polar.data.readers import read_trajectories
from polar.training.config import ScratchConfig
from polar.training.init_model import from_scratch

HERE = Path(__file__).parent
ARMS = ("polar", "scratch", "blind", "rouge-l", "exact")
NO_REFERENCE = "."
"""The reference where none is given: the same for every prompt, so it says nothing."""
PREFERENCES = 300


def polar(*words: str | Path | int) -> None:
    """Run a command of the package; a failure ends the whole."""
    print("+ polar", *words, flush=True)
    subprocess.run([sys.executable, "-m", "polar.cli.main", *map(str, words)], check=True)


def corpus(work: Path, seed: int) -> None:
    """Policies, what they say, triples for pre-training and preferences for fine-tuning."""
    if not (work / "prompts.jsonl").is_file():
        make(work, seed)
    if not (work / "triples.parquet").is_file():
        sampled = ("--design", "grid", "--samples", 2, "--seed", seed)
        polar("sample", work / "prompts.jsonl", "--pool", work / "pool.yaml", "--output", work / "corpus", *sampled)
        tasks = read_rows(work / "prompts.jsonl")
        (work / "pretrain-ids.txt").write_text("\n".join(prompt_id(row["prompt"]) for row in tasks[2 * PREFERENCES :]))
        found = list(preferences(work / "corpus", tasks[: 2 * PREFERENCES], Random(f"preferences {seed}")))
        write_rows(work / "preferences.jsonl", found[:PREFERENCES])
        write_rows(work / "preferences-blind.jsonl", blind(found[:PREFERENCES]))
        for name in ("rft", "held-out"):
            write_rows(work / f"{name}-blind.jsonl", blind(read_rows(work / f"{name}.jsonl")))
        drawn = ("--prompt-ids", work / "pretrain-ids.txt", "--negatives", 3, "--seed", seed)
        polar("pair", work / "corpus", "--output", work / "triples.parquet", *drawn)


def preferences(trajectories: Path, tasks: list[dict[str, str]], random: Random) -> Iterator[dict[str, str]]:
    """A right and a wrong output of the pool for every prompt that has both, beside a reference in words."""
    outputs: dict[str, list[str]] = {row["prompt"]: [] for row in tasks}
    for trajectory in read_trajectories(trajectories):
        if (prompt := text_of(trajectory.prompt)) in outputs:
            outputs[prompt].append(text_of(trajectory.output))
    for row in tasks:
        right = [text for text in outputs[row["prompt"]] if number_in(text) == int(row["answer"])]
        wrong = [text for text in outputs[row["prompt"]] if number_in(text) != int(row["answer"])]
        if right and wrong:
            chosen, rejected = random.choice(right), random.choice(wrong)
            yield {"prompt": row["prompt"], "reference": row["reference"], "chosen": chosen, "rejected": rejected}


def blind(rows: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """The same rows without what the reference says."""
    return ({**row, "reference": NO_REFERENCE} for row in rows)


def reward_model(work: Path, seed: int, arm: str) -> Path:
    """Train the reward model of an arm, if it is not there yet."""
    base, output = work / "base", work / f"rm-{arm}"
    if not (base / "polar.json").is_file():
        triples = ("--data", work / "triples.parquet", "--output", base)
        polar("pretrain", "--config", HERE / "pretrain.yaml", *triples, "--seed", seed)
    if not (output / "polar.json").is_file():
        start, data = base, work / ("preferences-blind.jsonl" if arm == "blind" else "preferences.jsonl")
        settings = HERE / ("finetune.yaml" if arm == "polar" else "finetune-longer.yaml")
        if arm == "scratch":
            start = work / "untrained"
            untrained(base, seed).save(start)
        files = ("--model", start, "--data", data, "--output", output)
        polar("finetune", "--config", settings, *files, "--seed", seed)
    return output


def untrained(base: Path, seed: int) -> RewardModel:
    """The network that the pre-training began with: same size, same tokenizer, same random weights."""
    settings = yaml.safe_load((HERE / "pretrain.yaml").read_text("utf-8"))
    return from_scratch(
        RewardModel.load(base).template.tokenizer,
        ScratchConfig(**settings["scratch"]),
        max_length=settings["max_length"],
        max_response_length=settings["max_response_length"],
        seed=seed,
    )


def run(work: Path, seed: int, arm: str) -> None:
    """Fine-tune the start policy under the reward of an arm, and write down what came out."""
    output, result = work / f"run-{arm}", work / f"result-{arm}.json"
    if result.is_file():
        return
    reward = arm if arm in ("rouge-l", "exact") else str(reward_model(work, seed, arm))
    data, held_out = (work / f"{name}{'-blind' if arm == 'blind' else ''}.jsonl" for name in ("rft", "held-out"))
    settings = yaml.safe_load((HERE / "rft.yaml").read_text("utf-8"))
    began = time.perf_counter()
    print("+ GRPO with the reward", reward, flush=True)
    measured, steps = train(work / "start", reward, data, held_out, settings, seed=seed, output=output)
    seconds = round(time.perf_counter() - began, 1)
    found = {"seed": seed, "arm": arm, "seconds": seconds, "held_out": measured, "steps": steps}
    if arm != "exact":
        found["judge"] = {kind: judge(reward, arm, seed, digits=kind == "digits") for kind in ("words", "digits")}
    result.write_text(json.dumps(found) + "\n", "utf-8")


def judge(reward: str, arm: str, seed: int, *, digits: bool, problems: int = 1000) -> float:
    """Share of held-out problems in which a right output has the higher reward than a wrong one; a tie counts half.

    Both are in digits, and each in a wording of its own; the reference is in words, or, beside what the fine-tuning
    needs, in digits.
    """
    random = Random(f"judge {seed}")
    prompts: list[str] = []
    outputs: list[str] = []
    references: list[str] = []
    while len(prompts) < 2 * problems:
        problem = draw_problem(random, held_out=True)
        wrong = RULES[random.choice([rule for rule in RULES if rule != "right"])](problem)
        if wrong != problem.answer:
            numbers = (problem.answer, wrong)
            outputs += [say(problem, number, random.choice(WORDINGS), digits=True) for number in numbers]
            reference = say(problem, problem.answer, random.choice(WORDINGS), digits=digits)
            references += 2 * [NO_REFERENCE if arm == "blind" else reference]
            prompts += 2 * [problem.text]
    rewards = named_reward(reward)(prompts=prompts, completions=outputs, reference=references)
    return fmean(
        (right > wrong) + (right == wrong) / 2 for right, wrong in zip(rewards[::2], rewards[1::2], strict=True)
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for number in options.seeds:
        directory = options.work / f"seed-{number}"
        directory.mkdir(parents=True, exist_ok=True)
        corpus(directory, number)
        for name in options.arms:
            run(directory, number, name)
