"""Two processes on the CPU, over gloo.

This file is also the program that they run. It imports everything once and forks the processes of many launches, since
importing takes much longer than training does here; real launchers start it too.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from polar import Comparison, InputError, RewardModel
from polar.cli.main import main
from polar.training.config import FinetuneConfig
from polar.training.run import finetune

RECIPES = Path(__file__).parents[2] / "recipes" / "launch"
FLAGS = """--max-length 256 --max-response-length 64 --max-steps 6 --gradient-accumulation 2 --max-grad-norm 0.05
--log-steps 1 --save-steps 4 --eval-steps 3 --learning-rate 3e-3
--scratch.vocab-size 400 --scratch.hidden-size 32 --scratch.intermediate-size 64 --scratch.num-layers 2
--scratch.num-heads 2 --scratch.max-positions 512""".split()


@dataclass
class Launch:
    """What `torchrun` would start."""

    output: str
    processes: int = 2
    batch_size: int = 4
    flags: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    sharded: bool = False
    """Let accelerate take the CPU for GPUs, since it shards on those only."""
    copy_of: str | None = None
    """Go on with a copy of this one's directory."""
    sigterm: tuple[int, int] | None = None
    """Sent to this process in its micro-batch of this number."""
    infinite: tuple[int, int] | None = None
    """Likewise, where the loss is made infinite."""
    refused: tuple[int, int] | None = None
    """Likewise, where the batch is refused before it comes to the model."""


# ------------------------------------------------------------------------------------------------ started processes


def launch(start: Launch, directory: Path) -> list[int]:
    """Run all processes; returns their exit codes. What they print is in `<output>.<number>.txt`."""
    if start.copy_of:
        shutil.copytree(directory / start.copy_of, directory / start.output)
    port, children = free_port(), []
    for number in range(start.processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with (directory / f"{start.output}.{number}.txt").open("w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                for name, value in {"RANK": number, "WORLD_SIZE": start.processes, "MASTER_PORT": port}.items():
                    os.environ[name] = os.environ[f"LOCAL_{name}"] = str(value)
                os.environ["MASTER_ADDR"] = "127.0.0.1"
                code = process(start, directory)
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def process(start: Launch, directory: Path) -> int:
    signal.alarm(120)  # processes that wait for each other for ever end so
    os.environ.update(start.environment)
    if start.sharded:
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        real = PartialState.__init__
        PartialState.__init__ = lambda self, cpu=False, **named: real(self, **named)
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
        os.environ["ACCELERATE_TORCH_DEVICE"] = os.environ["DS_ACCELERATOR"] = "cpu"
    number = int(os.environ["RANK"])
    if start.sigterm and start.sigterm[0] == number:
        at_micro_batch(start.sigterm[1], lambda _: os.kill(os.getpid(), signal.SIGTERM))
    if start.infinite and start.infinite[0] == number:
        at_micro_batch(start.infinite[1], lambda inputs: inputs["margin_N"].fill_(torch.inf))
    if start.refused and start.refused[0] == number:
        at_micro_batch(start.refused[1], lambda _: refuse_batches())
    data = ["--data", str(directory / "triples.jsonl"), "--eval-data", str(directory / "held-out.jsonl")]
    output = ["--output", str(directory / start.output), "--batch-size", str(start.batch_size)]
    return main(["pretrain", *data, *output, *FLAGS, *start.flags])


def refuse_batches() -> None:
    from polar.training import trainer

    def refuse(*_: Any, **__: Any) -> None:
        raise InputError("an input is too long for this model")

    trainer.hidden_states = refuse  # type: ignore[assignment]


def at_micro_batch(count: int, event: Callable[[dict[str, Any]], object]) -> None:
    from polar.training.trainer import RewardTrainer

    real, done = RewardTrainer.training_step, 0

    def step(self: Any, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
        nonlocal done
        done += 1
        if done == count:
            event(inputs)
        return real(self, model, inputs, *more, **named)

    RewardTrainer.training_step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    import polar.cli.train  # noqa: F401

    torch.set_num_threads(1)
    where, launches = Path(sys.argv[1]), [Launch(**start) for start in json.loads(sys.argv[2])]
    if "RANK" in os.environ:  # a launcher started this process
        sys.exit(process(launches[0], where))
    (where / "codes.json").write_text(json.dumps({start.output: launch(start, where) for start in launches}))
    sys.exit()


# ------------------------------------------------------------------------------------------------------------ tests


def write_data(directory: Path) -> None:
    digits, words = "0 1 2 3 4 5 6 7 8 9".split(), "red blue green fox dog cat sun moon tree sea".split()

    def answer(source: list[str], start: int) -> str:
        return " ".join(source[(start * 3 + step) % 10] for step in range(3 + start % 5))

    for name, rows in (("triples", range(64)), ("held-out", range(100, 105))):
        lines = [
            {
                "prompt": f"Say something, number {number}.",
                "reference": answer(words, number),
                "positive": answer(words, number + 1),
                "negative": answer(digits, number),
            }
            for number in rows
        ]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    (directory / "bad.jsonl").write_text('{"prompt": "no more"}\n')


def command(directory: Path, *launches: Launch) -> list[str]:
    return [__file__, str(directory), json.dumps([asdict(start) for start in launches])]


def environment_of(recipe: str) -> dict[str, str]:
    """What `accelerate launch` tells the processes."""
    arguments = launch_command_parser().parse_args(["--config_file", str(RECIPES / recipe), "script"])
    told = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    return {name: value for name, value in told.items() if os.environ.get(name) != value}


@dataclass
class Done:
    directory: Path
    codes: dict[str, list[int]]

    def printed(self, output: str, number: int) -> str:
        return (self.directory / f"{output}.{number}.txt").read_text()

    def history(self, output: str, value: str) -> list[float]:
        state = json.loads((self.directory / output / "run" / "trainer_state.json").read_text())
        return [entry[value] for entry in state["log_history"] if value in entry]

    def model(self, output: str) -> RewardModel:
        return RewardModel.load(self.directory / output)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    directory = tmp_path_factory.mktemp("launches")
    write_data(directory)
    fsdp: dict[str, Any] = {"sharded": True, "flags": ["--fsdp"]}
    launches = (
        Launch("single", processes=1, batch_size=8),
        Launch("fsdp", sharded=True, environment=environment_of("fsdp2.yaml")),
        Launch("bf16", sharded=True, flags=["--fsdp", "--bf16", "--lexical-weight", "1"]),
        Launch("stopped", sigterm=(1, 3), **fsdp),
        Launch("resumed", copy_of="stopped", **fsdp),
        Launch("on-one", processes=1, batch_size=8, copy_of="stopped", sigterm=(0, 3), **fsdp),
        Launch("on-two", copy_of="on-one", **fsdp),
        Launch("copies", sigterm=(0, 3)),
        Launch("copies-on-one", processes=1, batch_size=8, copy_of="copies"),
        Launch("unsharded", copy_of="stopped"),
        Launch("infinite", infinite=(1, 2), **fsdp),
        Launch("refused", refused=(1, 2), **fsdp),
        Launch("bad-row", flags=["--eval-data", str(directory / "bad.jsonl")]),
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command(directory, *launches)], env=environment, check=True, timeout=250)
    return Done(directory, json.loads((directory / "codes.json").read_text()))


def largest_difference(first: RewardModel, second: RewardModel) -> float:
    others = second.model.state_dict()
    return max(float((weight - others[name]).abs().max()) for name, weight in first.model.state_dict().items())


def test_sharded_over_two_processes_the_loss_curve_is_that_of_one(done: Done) -> None:
    assert done.codes["fsdp"] == [0, 0], done.printed("fsdp", 0) + done.printed("fsdp", 1)
    for value in ("loss", "grad_norm", "eval_loss", "eval_accuracy", "accuracy", "learning_rate"):
        assert len(done.history("fsdp", value)) == (2 if "eval" in value else 6)
        assert done.history("fsdp", value) == pytest.approx(done.history("single", value), rel=1e-4), value
    assert min(done.history("single", "grad_norm")) > 0.05  # so it is clipped
    comparisons = [Comparison("Say something.", "red blue", text) for text in ("green fox", "1 2 3")]
    rewards = done.model("single").score(comparisons)
    assert done.model("fsdp").score(comparisons) == pytest.approx(rewards, abs=1e-5)
    assert largest_difference(done.model("fsdp"), done.model("single")) < 1e-5


def test_in_bfloat16_the_sharded_weights_stay_float32(done: Done) -> None:
    assert done.codes["bf16"] == [0, 0], done.printed("bf16", 0)
    assert done.model("bf16").model.config.dtype == torch.float32
    weights = done.model("bf16").model.state_dict().values()
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights)


def test_a_signal_to_one_process_stops_all_after_the_same_step(done: Done) -> None:
    for output in ("stopped", "copies"):
        assert done.codes[output] == [143, 143]
        assert [path.name for path in (done.directory / output / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_resumed_with_as_many_processes_the_weights_are_bit_identical(done: Done) -> None:
    assert done.codes["resumed"] == [0, 0], done.printed("resumed", 0)
    assert largest_difference(done.model("resumed"), done.model("fsdp")) == 0


def test_a_sharded_run_goes_from_two_processes_to_one_and_back(done: Done) -> None:
    assert done.codes["on-one"] == [143], done.printed("on-one", 0)
    assert done.codes["on-two"] == [0, 0], done.printed("on-two", 0)
    assert done.history("on-two", "loss") == pytest.approx(done.history("single", "loss"), rel=1e-4)
    assert largest_difference(done.model("on-two"), done.model("single")) < 1e-5


def test_a_run_with_a_copy_in_every_process_goes_on_with_one(done: Done) -> None:
    assert done.codes["copies-on-one"] == [0], done.printed("copies-on-one", 0)
    assert done.history("copies-on-one", "loss") == pytest.approx(done.history("single", "loss"), rel=1e-4)
    assert largest_difference(done.model("copies-on-one"), done.model("single")) < 1e-5


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("unsharded", "has sharding fsdp, now it is none"),
        ("infinite", "the loss is inf in the batch of records"),
        ("bad-row", "bad.jsonl"),
    ],
)
def test_what_is_wrong_is_said_once_and_ends_all_processes(output: str, message: str, done: Done) -> None:
    assert done.codes[output] == [2, 2]
    errors = [line for line in done.printed(output, 0).splitlines() if line.startswith("polar: error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.printed(output, 0)
    assert not [line for line in done.printed(output, 1).splitlines() if "kernels" not in line]


def test_what_one_process_finds_inside_the_model_ends_all_without_waiting(done: Done) -> None:
    """The others are in the exchange of weights there: they see the connection break, and launchers end them too."""
    assert done.codes["refused"][1] == 2
    assert done.codes["refused"][0] not in (0, -signal.SIGALRM)
    assert "process 1: an input is too long for this model" in " ".join(done.printed("refused", 1).split())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FSDP_VERSION": "2"}, "fsdp needs a process for every GPU"),
        ({}, "FSDP of version 1 is not supported; set fsdp_version: 2"),
    ],
)
def test_sharding_that_would_not_be_done_is_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        finetune(FinetuneConfig(model="polar-nano", data=["no.jsonl"], output=str(tmp_path / "rm")))


@pytest.mark.parametrize(("recipe", "kind"), [("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")])
def test_accelerate_understands_the_recipes(recipe: str, kind: str) -> None:
    found = load_config_from_file(str(RECIPES / f"{recipe}.yaml"))
    assert found.distributed_type == kind
    assert found.mixed_precision == "no"  # ours decides


ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "PORT", "--config_file"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "PORT"],
        *([*ACCELERATE, str(RECIPES / recipe)] for recipe in ("fsdp2.yaml", "zero2.yaml", "zero3.yaml")),
    ],
    ids=["torchrun", "fsdp2", "zero2", "zero3"],
)
def test_launchers_and_their_recipes(launcher: list[str], done: Done) -> None:
    """Stopped and gone on with, in every way that the documentation names."""
    name = Path(launcher[-1]).stem
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    flags = [] if "accelerate" in launcher[0] else ["--fsdp"]
    for sigterm in ((1, 3), None):
        words = [word.replace("PORT", str(free_port())) for word in launcher]
        start = Launch(name, sharded=True, flags=flags, sigterm=sigterm)
        ended = subprocess.run(
            [sys.executable, "-m", *words, *command(done.directory, start)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert (ended.returncode == 0) == (sigterm is None), ended.stderr
        assert "stopped at step 2" in ended.stderr or sigterm is None
    assert done.history(name, "loss") == pytest.approx(done.history("single", "loss"), rel=1e-4)
    assert done.history(name, "grad_norm") == pytest.approx(done.history("single", "grad_norm"), rel=1e-4)
    assert largest_difference(done.model(name), done.model("single")) < 1e-5
