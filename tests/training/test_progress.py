"""Speed, utilization and what a run shows."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from polar import RewardModel
from polar.core.template import EncodedGroup, Truncation
from polar.model.tree import TreeBatch, tree_batch
from polar.training.config import PretrainConfig, ScratchConfig
from polar.training.run import pretrain
from polar.training.speed import Cost, Meter, cost_of, peak_of
from polar.training.trainer import RewardTrainer

SMALL = ScratchConfig(
    vocab_size=300, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=1, max_positions=256
)
TOKENS, PAIRS = Cost(1.0, 0.0), Cost(0.0, 1.0)


def group(prefix: int, *branches: int) -> EncodedGroup:
    return EncodedGroup([1] * prefix, [[2] * length for length in branches], [Truncation(0, 0, 0)] * len(branches))


def test_operations_of_a_case_counted_by_hand() -> None:
    """A prefix of 10 with branches of 4 and 6, and a sequence of 8 + 2 beside it."""
    table = tree_batch([group(10, 4, 6), group(8, 2)]).table_11S4
    assert TOKENS.of(table) == (20 + 10, 14 + 16 + 10)
    assert PAIRS.of(table) == (10**2 / 2 + 10 * 4 + 4**2 / 2 + 10 * 6 + 6**2 / 2 + 50, 14**2 / 2 + 16**2 / 2 + 50)
    assert Cost(3.0, 0.5).of(table) == (3 * 30 + 0.5 * 226, 3 * 40 + 0.5 * 276)


def test_separate_sequences_are_counted_as_if_they_were_laid_out_so() -> None:
    numbers = random.Random(0)
    for _ in range(50):
        groups = [
            group(numbers.choice([0, 1, 7]), *(numbers.randint(1, 9) for _ in range(numbers.randint(1, 4))))
            for _ in range(numbers.randint(1, 4))
        ]
        alone = tree_batch([group(0, len(ids)) for one in groups for ids in one.sequences()]).table_11S4
        assert TOKENS.of(tree_batch(groups).table_11S4) == (
            sum(len(one.prefix) + sum(map(len, one.branches)) for one in groups),
            TOKENS.of(alone)[0],
        )
        assert PAIRS.of(tree_batch(groups).table_11S4)[1] == PAIRS.of(alone)[0] == PAIRS.of(alone)[1]


def test_a_model_costs_six_operations_per_weight_and_token_and_less_when_weights_are_frozen(
    llama: RewardModel,
) -> None:
    model = llama.model
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32  # q, k and v, o, feed-forward, norms
    weights = 2 * layer + 32 + 32  # last norm, score head
    assert cost_of(model) == Cost(6 * weights, 12 * 2 * 4 * 8)
    try:
        model.model.requires_grad_(False)
        assert cost_of(model) == Cost(4 * weights + 2 * 32, 12 * 2 * 4 * 8)
    finally:
        model.model.requires_grad_(True)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_device_is_known_or_not_guessed(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now[0])
        yield now


def counted(meter: Meter) -> TreeBatch:
    batch = tree_batch([group(10, 4, 6)])
    meter.add(batch, 1, torch.tensor([0.5]))
    meter.add(batch, 1, torch.tensor([0.0]))
    return batch


def test_speed_and_utilization_of_two_processes_by_hand(llama: RewardModel, clock: list[float]) -> None:
    meter = Meter(llama.model, torch.device("cpu"))
    meter.start()
    batch = counted(meter)
    clock[0] += 3
    meter.pause()
    clock[0] += 100  # an evaluation, which does not count
    meter.start()
    clock[0] += 1
    meter.start()
    counted(meter)
    meter.peak = 1e6
    figures = meter.read(lambda sums: 2 * sums, 2)
    tree, separate = meter.cost.of(batch.table_11S4)
    assert figures == {
        "accuracy": 0.75,
        "margin": 0.25,
        "triples_per_second": 2.0,
        "tokens_per_second": 40,
        "mfu": round(4 * tree / 4 / 1e6, 4),
        "mfu_separate": round(4 * separate / 4 / 1e6, 4),
    }
    clock[0] += 50  # between the reading and the next step
    meter.peak = None
    meter.start()
    counted(meter)
    clock[0] += 2
    assert meter.read(lambda sums: sums, 1) == {
        "accuracy": 0.75,
        "margin": 0.25,
        "triples_per_second": 1.0,
        "tokens_per_second": 20,
    }


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows = [
        {
            "prompt": f"Number {number}?",
            "reference": "red fox",
            "positive": f"red {number}",
            "negative": f"{number} 7 9" + number % 5 * " 3",
        }
        for number in range(32)
    ]
    path = tmp_path / "triples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(data: str, output: Path, **values: Any) -> PretrainConfig:
    chosen = {"scratch": SMALL, "max_length": 128, "max_response_length": 32, "max_steps": 6, "batch_size": 4}
    return PretrainConfig(data=[data], output=str(output), **{**chosen, "log_steps": 2, **values})


def history(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "run" / "trainer_state.json").read_text())["log_history"]


def test_without_a_terminal_every_log_line_has_all_figures(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO", "polar")
    pretrain(settings(data, tmp_path / "out", eval_data=[data], eval_steps=4))
    lines = [record.getMessage() for record in caplog.records if record.name == "polar.training.speed"]
    steps = [line for line in lines if "held-out" not in line]
    assert [line.split(":")[0] for line in steps] == ["step 2 of 6", "step 4 of 6", "step 6 of 6"]
    for line in steps:
        assert all(name in line for name in ("loss 0.", "accuracy ", "lr ", " triples/s", " tokens/s")), line
        assert "MFU" not in line  # a CPU has no known peak
    held_out = [line for line in lines if "held-out" in line]
    assert [line.split(",")[0] for line in held_out] == ["step 4 of 6", "step 6 of 6"]
    out, err = capfd.readouterr()
    assert (out, "loss" in err, "6/6" in err) == ("", False, False)
    entries = [entry for entry in history(tmp_path / "out") if "loss" in entry]
    assert all(0 < entry["triples_per_second"] < entry["tokens_per_second"] for entry in entries)


def test_a_terminal_shows_a_bar_and_the_same_weights_come_out(
    data: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without = pretrain(settings(data, tmp_path / "lines"))
    caplog.clear()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with_bar = pretrain(settings(data, tmp_path / "bar", eval_data=[data], eval_steps=4))
    out, err = capsys.readouterr()
    assert "6/6" in err
    assert "triples_per_second" in out
    assert not [record for record in caplog.records if record.name == "polar.training.speed"]
    for first, second in zip(with_bar.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_figures_of_a_run_that_goes_on_are_of_its_own_steps(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = pretrain(settings(data, tmp_path / "straight", save_steps=3))
    done = 0

    def step(self: RewardTrainer, *arguments: Any, **named: Any) -> Any:
        nonlocal done
        done += 1
        if done == 6:
            raise KeyboardInterrupt
        return RewardTrainer.__mro__[1].training_step(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(RewardTrainer, "training_step", step, raising=False)
        with pytest.raises(KeyboardInterrupt):
            pretrain(settings(data, tmp_path / "out", save_steps=3))
    resumed = pretrain(settings(data, tmp_path / "out", save_steps=3))
    for first, second in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second)
    logged = [entry for entry in history(tmp_path / "out") if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    undisturbed = [entry for entry in history(tmp_path / "straight") if "loss" in entry]
    assert logged[0]["margin"] == undisturbed[0]["margin"]
    assert logged[2]["margin"] == undisturbed[2]["margin"]
    assert logged[1]["accuracy"] in (0, 0.25, 0.5, 0.75, 1)  # of step 4 alone: four triples


@pytest.mark.slow
def test_accuracy_and_margin_are_those_of_all_processes(data: str, tmp_path: Path) -> None:
    flags = "--max-steps 2 --log-steps 1 --max-length 128 --max-response-length 32"
    flags += " --scratch.hidden-size 16 --scratch.intermediate-size 32 --scratch.num-layers 1 --scratch.num-heads 1"
    flags += " --scratch.vocab-size 300 --warmup-ratio 0"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "polar.cli.main", "pretrain", "--data", data, "--output", str(tmp_path / "two")]
    with subprocess.Popen(
        [*command, *flags.split(), "--batch-size", "4"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            _, errors = process.communicate(timeout=240)
        finally:
            process.terminate()  # unlike a kill, it ends the processes that were launched
    assert process.returncode == 0, errors
    assert errors.count("step 1 of 2:") == 1  # the main process alone
    pretrain(settings(data, tmp_path / "one", max_steps=2, log_steps=1, batch_size=8, warmup_ratio=0.0))
    for two, one in logged_together(history(tmp_path / "two"), history(tmp_path / "one")):
        assert two["accuracy"] == one["accuracy"]
        assert two["margin"] == pytest.approx(one["margin"], abs=1e-6)


def logged_together(first: list[dict[str, float]], second: list[dict[str, float]]) -> list[tuple[dict, dict]]:
    lists = [[entry for entry in entries if "loss" in entry] for entries in (first, second)]
    return list(zip(*lists, strict=True))
