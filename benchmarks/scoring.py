"""Speed of scoring groups: prefix sharing against padded batches, one text at a time, and vLLM.

    python benchmarks/scoring.py --rounds 5 --threads 1 --vllm-python vllm/bin/python --report scoring

A random Llama of 20 M parameters scores groups of K candidates (prompt about 100 tokens, reference 200, outputs 200),
new ones in every round. All ways and types take turns within a round, since the machine may be busy with other things;
the ratio of a round is what counts, and it is always to padded batches in float32.

- padded: `AutoModelForSequenceClassification`, batches of 16 full texts in the order of the input, padded.
- single: the same, one text at a time, so without padding and without a mask.
- shared: one group at a time with its prefix computed once (`polar.model.tree`), and nothing else changed.
- vllm: a vLLM server with its prefix cache, which is the default, asked by HTTP on this machine for all candidates in
  one request. Its time includes HTTP and JSON. Every call has a cache salt of its own, so nothing is left from others.
- vllm-groups: the same, one request per group and four of them in flight.
- polar: `RewardModel.score_encoded`, which also packs rows and takes the faster kernel (`polar.model.cpu`).

With --cpu-time processor time counts in place of wall time: for a machine whose cores others use too, without vLLM.

Encoding of the texts is not timed; all ways get token ids. Differences are those from single texts in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import httpx2
import psutil  # type: ignore[import-untyped]
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from polar import RewardModel, Template
from polar.core.checkpoint import BUNDLED
from polar.core.template import EncodedGroup
from polar.model.tree import rewards, tree_batch

BATCH = 16
IN_FLIGHT = 4
WAYS = ("padded", "single", "shared", "vllm", "vllm-groups", "polar")
TOLERANCE = 1e-3
"""Largest difference of a reward in float32."""

Run = Callable[[list[EncodedGroup]], list[float]]


@dataclass(frozen=True, slots=True)
class Result:
    """One way in one type on one load."""

    candidates_per_group: int
    dtype: str
    way: str
    seconds: list[float]
    """One per round."""
    ratios: list[float]
    """Speed of this way / speed of padded batches in float32, one per round."""
    rewards_per_second: float
    """Median of the rounds."""
    difference: float
    spread: float
    """Standard deviation of the rewards, to judge the difference by."""


@dataclass(frozen=True, slots=True)
class Server:
    """A vLLM server that runs."""

    client: httpx2.Client
    process: psutil.Process

    def score(self, groups: list[EncodedGroup], in_flight: int | None = None) -> list[float]:
        """Rewards; None sends one request, else there is one per group."""
        salt = uuid4().hex
        loads = [group.sequences() for group in groups]
        if in_flight is None:
            return self._request([ids for load in loads for ids in load], salt)
        with ThreadPoolExecutor(in_flight) as pool:
            return [value for values in pool.map(lambda load: self._request(load, salt), loads) for value in values]

    def _request(self, sequences: list[list[int]], salt: str) -> list[float]:
        body = {"input": sequences, "use_activation": False, "cache_salt": salt}
        answer = self.client.post("/classify", json=body).raise_for_status().json()
        return [item["probs"][0] for item in sorted(answer["data"], key=lambda item: item["index"])]

    def cpu_seconds(self) -> float:
        """Processor time of all its processes up to now."""
        times = [part.cpu_times() for part in (self.process, *self.process.children(recursive=True))]
        return float(sum(time.user + time.system for time in times))


def main() -> None:
    """Measure load by load; the report is written anew after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that warms up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every way, also of vLLM")
    parser.add_argument("--candidates", default="8", help="candidates per group, for example 1,2,4,8,16,32,64")
    parser.add_argument("--load", type=int, default=64, help="candidates of a round, at least one group")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--vllm-python", help="an interpreter with vLLM (default: this one, if it has vLLM)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time; not with vLLM, which is not counted")
    parser.add_argument("--report", type=Path, required=True, help="name of the report, without .json and .md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    python = arguments.vllm_python or (sys.executable if find_spec("vllm") else None)
    if arguments.cpu_time:
        python = None
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    results: list[Result] = []
    with TemporaryDirectory() as directory, ExitStack() as stack:
        model, servers = Path(directory) / "model", []
        save_random_model(model)
        runs: dict[tuple[str, str], Run] = {}
        for dtype in arguments.dtype.split(","):
            runs |= {(dtype, way): run for way, run in own_ways(model, dtype).items()}
            if python is not None:
                server = stack.enter_context(vllm_server(python, model, dtype, arguments.threads))
                machine["vllm"] = server.client.get("/version").json()["version"]
                runs |= {(dtype, "vllm"): server.score}
                runs |= {(dtype, "vllm-groups"): partial(server.score, in_flight=IN_FLIGHT)}
                servers.append(server)
        for count in map(int, arguments.candidates.split(",")):
            clock = time.process_time if arguments.cpu_time else time.perf_counter
            found, idle = measure(runs, servers, count, arguments.load, arguments.rounds, clock)
            results += found
            machine[f"vllm_cpu_while_idle_{count}"] = idle
            report = {"machine": machine, "runs": [asdict(result) for result in results]}
            arguments.report.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
            arguments.report.with_suffix(".md").write_text(markdown(results), "utf-8")
    print(markdown(results), machine)


def save_random_model(directory: Path) -> None:
    """A Llama whose rewards spread, with the template of the bundled model."""
    template = Template.load(BUNDLED["polar-nano"]).with_lengths(2048, 512)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        num_labels=1,  # type: ignore[call-arg]  # taken by the base class
        initializer_range=0.06,
    )
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["polar-nano"])
    RewardModel(LlamaForSequenceClassification(config), tokenizer, template).save(directory)


def random_groups(count: int, load: int, seed: int) -> list[EncodedGroup]:
    """Token ids of groups with `count` candidates each; no padding id among them."""
    generator = random.Random(f"{count} {seed}")

    def tokens(mean: int) -> list[int]:
        return [generator.randrange(10, 8000) for _ in range(max(10, round(generator.gauss(mean, mean / 4))))]

    groups = []
    for _ in range(max(1, load // count)):
        prompt = tokens(100)
        groups.append(EncodedGroup([1, *prompt, *tokens(200), 2, *prompt], [tokens(200) for _ in range(count)], []))
    return groups


def own_ways(directory: Path, dtype: str) -> dict[str, Run]:
    """The ways that run in this process."""
    plain = AutoModelForSequenceClassification.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    polar = RewardModel.load(directory, device="cpu", dtype=dtype)
    return {
        "padded": lambda groups: padded(plain, groups),
        "single": lambda groups: single(plain, groups),
        "shared": lambda groups: shared(polar.model, groups),
        "polar": lambda groups: [reward for values in polar.score_encoded(groups) for reward in values],
    }


@torch.inference_mode()
def padded(model: Any, groups: list[EncodedGroup]) -> list[float]:
    """Batches of full texts, padded on the right."""
    values: list[float] = []
    sequences = [ids for group in groups for ids in group.sequences()]
    for start in range(0, len(sequences), BATCH):
        batch = sequences[start : start + BATCH]
        longest, pad = max(map(len, batch)), model.config.pad_token_id
        ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in batch])
        values += model(ids, attention_mask=(ids != pad).long()).logits[:, 0].tolist()
    return values


@torch.inference_mode()
def single(model: Any, groups: list[EncodedGroup]) -> list[float]:
    """One text at a time."""
    return [model(torch.tensor([ids])).logits.item() for group in groups for ids in group.sequences()]


@torch.inference_mode()
def shared(model: Any, groups: list[EncodedGroup]) -> list[float]:
    """One group at a time, its prefix computed once."""
    return [reward for group in groups for reward in rewards(model, tree_batch([group])).tolist()]


@contextmanager
def vllm_server(python: str, model: Path, dtype: str, threads: int) -> Iterator[Server]:
    """vLLM on a free port, with as many threads as the other ways and, like them, not bound to cores."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(model), "--runner", "pooling", "--dtype", dtype, "--max-model-len", "2048"]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
    }
    log = model.parent / f"vllm-{dtype}.log"
    with log.open("w") as sink, httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
        process = psutil.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(process, client, log)
            yield Server(client, process)
        finally:
            started = [process, *process.children(recursive=True)] if process.is_running() else []
            for part in started[:1]:
                part.terminate()
            for part in psutil.wait_procs(started, timeout=30)[1]:
                part.kill()


def wait_until_ready(process: Any, client: httpx2.Client, log: Path) -> None:
    """Until the server answers; it compiles the model first."""
    while True:
        if process.poll() is not None:
            raise SystemExit(f"vLLM ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        try:
            client.get("/health").raise_for_status()
            return
        except httpx2.TransportError:
            time.sleep(1)


def measure(
    runs: dict[tuple[str, str], Run],
    servers: list[Server],
    count: int,
    load: int,
    rounds: int,
    clock: Callable[[], float],
) -> tuple[list[Result], float]:
    """All ways in turn, every second round in reverse, and the share of a processor that idle servers used."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    differences: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    expected: list[float] = []
    idle, others = 0.0, 0.0
    for number in range(rounds + 1):
        groups = random_groups(count, load, number)
        found: dict[tuple[str, str], list[float]] = {}
        for key in list(runs) if number % 2 else reversed(runs):
            busy, start = sum(server.cpu_seconds() for server in servers), clock()
            found[key] = runs[key](groups)
            elapsed = clock() - start
            if number == 0:  # warm-up
                continue
            seconds[key].append(elapsed)
            if not key[1].startswith("vllm"):
                idle += sum(server.cpu_seconds() for server in servers) - busy
                others += elapsed
        exact = found["float32", "single"]
        expected += exact
        for key, values in found.items():
            differences[key].append(max(abs(a - b) for a, b in zip(values, exact, strict=True)))
            if key[0] == "float32" and differences[key][-1] > TOLERANCE:
                raise SystemExit(f"{key[1]}: a reward in float32 differs by {differences[key][-1]:.1e}")
    base = seconds["float32", "padded"]
    results = [
        Result(
            count,
            dtype,
            way,
            own,
            [first / second for first, second in zip(base, own, strict=True)],
            len(expected) / (rounds + 1) / statistics.median(own),
            max(differences[dtype, way]),
            statistics.pstdev(expected),
        )
        for (dtype, way), own in seconds.items()
    ]
    return results, idle / others


def markdown(results: list[Result]) -> str:
    """One line per load and type, the ways as columns: median, lowest and highest ratio."""
    ways = [way for way in WAYS if any(result.way == way for result in results)]
    lines = [f"| K | type | {' | '.join(ways)} | polar, rewards/s |", "|---:|---|" + "---|" * len(ways) + "---:|"]
    table: dict[tuple[int, str], dict[str, Result]] = {}
    for result in results:
        table.setdefault((result.candidates_per_group, result.dtype), {})[result.way] = result
    for (count, dtype), row in table.items():
        cells = " | ".join(ratio(row[way].ratios) for way in ways)
        lines.append(f"| {count} | {dtype} | {cells} | {row['polar'].rewards_per_second:.1f} |")
        if "vllm" in row:
            best = [min(times) for times in zip(row["vllm"].seconds, row["vllm-groups"].seconds, strict=True)]
            faster = [first / second for first, second in zip(best, row["polar"].seconds, strict=True)]
            lines[-1] += f" {ratio(faster)} |"
    if "vllm" in ways:
        lines[0] += " polar / faster vllm |"
        lines[1] += "---|"
    lines += ["", "| type | way | largest difference | standard deviation of the rewards |", "|---|---|---:|---:|"]
    for dtype, way in dict.fromkeys((result.dtype, result.way) for result in results):
        same = [result for result in results if (result.dtype, result.way) == (dtype, way)]
        largest = max(result.difference for result in same)
        lines.append(f"| {dtype} | {way} | {largest:.1e} | {max(result.spread for result in same):.2f} |")
    return "\n".join(lines) + "\n"


def ratio(values: list[float]) -> str:
    """The middle and both ends."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
