"""How fast `polar serve` is: against scoring without a server, behind a gateway, beside vLLM, and over a long time.

    python benchmarks/serving.py --rounds 5 --threads 2 --report serving.json
    python benchmarks/serving.py --vllm-python vllm/bin/python     # a real vLLM in the same run
    python benchmarks/serving.py --soak 10                         # minutes, with memory

A random Llama of 20 M parameters scores groups of 8 candidates (prompt about 100 tokens, reference 200, outputs 200).
The ways take turns within a round, since the machine may be busy with other things; the ratio of a round is what
counts.

- offline: `RewardModel` in this process, encoding included, as `polar score` does it.
- serve: `polar serve`, one group per request to /v1/rewards.
- flat: the same server asked as vLLM is, one text's token ids per request; what belongs together is not told.
- gateway: another `polar serve` in front of the first one.
- vllm: vLLM with prefix caching, one group of token ids per request to /classify.

Servers are asked by 64 clients at once (`--clients`). Then latency against the number of clients, and what the gateway
adds to a single request.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import httpx2
import torch
from scoring import save_random_model, vllm_server

from polar import Group, RewardModel, Template
from polar.core.checkpoint import BUNDLED

CANDIDATES = 8
Ask = Callable[[httpx2.AsyncClient, int, str], Awaitable[list[float]]]
"""Ask a server for the n-th group of the load; the salt keeps vLLM from using what it computed in another round."""


@dataclass(frozen=True, slots=True)
class Result:
    """One way on the load."""

    way: str
    rewards_per_second: float
    """Median of the rounds."""
    ratios: list[float]
    """Speed of this way / speed of offline, one per round, in increasing order."""
    error: float
    """Largest difference from the rewards of offline."""


@dataclass(frozen=True, slots=True)
class Latency:
    """One way asked by some clients at once."""

    way: str
    clients: int
    rewards_per_second: float
    p50: float
    """Milliseconds from a request to its answer."""
    p99: float


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that warms up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of offline and of every server")
    parser.add_argument("--groups", type=int, default=128, help="groups of 8 candidates in the load")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--loads", type=int, nargs="+", default=[1, 4, 16, 64], help="clients for the latency table")
    parser.add_argument("--vllm-python", type=Path, help="python of an environment with vllm")
    parser.add_argument("--soak", type=float, default=0, help="minutes; then nothing else is measured")
    parser.add_argument("--report", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    with TemporaryDirectory() as temporary, ExitStack() as servers:
        directory = f"{temporary}/model"
        save_random_model(Path(directory))
        groups = random_groups(arguments.groups)
        polar = ["-m", "polar.cli.main", "serve", directory, "--port", "0", "--device", "cpu"]
        url = servers.enter_context(server([sys.executable, *polar], arguments.threads))
        if arguments.soak:
            report["soak"] = asyncio.run(soak(url, groups, arguments.clients, arguments.soak))
        else:
            backend = ["--backend", f"polar={url.removeprefix('http://')}"]
            gateway = servers.enter_context(server([sys.executable, *polar, *backend], 1))
            ways = {"serve": by_parts(url, groups), "flat": by_ids(url, directory, groups, alone=True)}
            ways["gateway"] = by_parts(gateway, groups)
            if arguments.vllm_python:
                python = str(arguments.vllm_python)
                vllm = servers.enter_context(vllm_server(python, Path(directory), "float32", arguments.threads))
                ways["vllm"] = by_ids(str(vllm.client.base_url).rstrip("/"), directory, groups, alone=False)
            report["throughput"] = throughput(directory, groups, ways, arguments.clients, arguments.rounds)
            report["latency"] = latencies(ways, arguments.loads, len(groups))
    if arguments.report is not None:
        arguments.report.write_text(json.dumps({**vars(arguments), **report}, indent=1, default=str) + "\n", "utf-8")


def random_groups(count: int) -> list[Group]:
    """Texts of known lengths in tokens, about."""
    tokenizer, generator = Template.load(BUNDLED["polar-nano"]).tokenizer, random.Random(0)

    def text(mean: int) -> str:
        length = max(10, round(generator.gauss(mean, mean / 4)))
        return tokenizer.decode([generator.randrange(300, 8000) for _ in range(length)])

    return [Group(text(90), text(180), tuple(text(180) for _ in range(CANDIDATES))) for _ in range(count)]


def by_parts(url: str, groups: Sequence[Group]) -> Ask:
    """Ask with one group per request."""
    bodies = [{"prompt": g.prompt, "reference": g.reference, "candidates": g.candidates} for g in groups]

    async def ask(client: httpx2.AsyncClient, number: int, salt: str) -> list[float]:
        answer = await client.post(f"{url}/v1/rewards", json=bodies[number])
        rewards: list[float] = answer.raise_for_status().json()["rewards"]
        return rewards

    return ask


def by_ids(url: str, directory: str, groups: Sequence[Group], *, alone: bool) -> Ask:
    """Ask as vLLM is asked; `alone` sends every input in a request of its own, all at once."""
    template = Template.load(directory)
    inputs = [template.encode_group(group).sequences() for group in groups]

    async def post(client: httpx2.AsyncClient, sequences: list[list[int]], salt: str) -> list[float]:
        body = {"input": sequences, "use_activation": False, "cache_salt": salt}
        answer = await client.post(f"{url}/classify", json=body)
        return [item["probs"][0] for item in answer.raise_for_status().json()["data"]]

    async def ask(client: httpx2.AsyncClient, number: int, salt: str) -> list[float]:
        if not alone:
            return await post(client, inputs[number], salt)
        return [reward for (reward,) in await asyncio.gather(*(post(client, [ids], salt) for ids in inputs[number]))]

    return ask


def throughput(
    directory: str, groups: Sequence[Group], ways: dict[str, Ask], clients: int, rounds: int
) -> list[dict[str, Any]]:
    """Score the load in all ways, in turn."""
    model = RewardModel.load(directory, device="cpu")
    expected = model.score_groups(groups)  # warms up
    for ask in ways.values():
        asyncio.run(run(ask, len(groups), clients))
    seconds: dict[str, list[float]] = {way: [] for way in ("offline", *ways)}
    errors = dict.fromkeys(seconds, 0.0)
    for _ in range(rounds):
        start = time.perf_counter()
        model.score_groups(groups)
        seconds["offline"].append(time.perf_counter() - start)
        for way, ask in ways.items():
            start = time.perf_counter()
            answers, _ = asyncio.run(run(ask, len(groups), clients))
            seconds[way].append(time.perf_counter() - start)
            differences = (abs(a - b) for own, right in zip(answers, expected, strict=True) for a, b in zip(own, right, strict=True))  # noqa: E501  # fmt: skip
            errors[way] = max(errors[way], *differences)
    print("| way | rewards/s | ratio to offline | lowest to highest | error |\n|---|---:|---:|---|---:|")
    results = []
    for way, own in seconds.items():
        ratios = sorted(base / value for base, value in zip(seconds["offline"], own, strict=True))
        result = Result(way, len(groups) * CANDIDATES / statistics.median(own), ratios, errors[way])
        ratio = f"{statistics.median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"| {way} | {result.rewards_per_second:.1f} | {ratio} | {result.error:.1e} |", flush=True)
        results.append(asdict(result))
    return results


def latencies(ways: dict[str, Ask], loads: Sequence[int], groups: int) -> list[dict[str, Any]]:
    """Time of a request of 8 candidates against the number of clients, the ways in turn."""
    print("\n| clients | way | rewards/s | p50 ms | p99 ms |\n|---:|---|---:|---:|---:|")
    results = []
    for clients, (way, ask) in itertools.product(loads, ways.items()):
        count = min(groups, 16 * clients)
        start = time.perf_counter()
        _, seconds = asyncio.run(run(ask, count, clients))
        speed = count * CANDIDATES / (time.perf_counter() - start)
        cuts = statistics.quantiles(seconds, n=100, method="inclusive")
        latency = Latency(way, clients, speed, 1000 * cuts[49], 1000 * cuts[98])
        print(f"| {clients} | {way} | {speed:.1f} | {latency.p50:.0f} | {latency.p99:.0f} |", flush=True)
        results.append(asdict(latency))
    return results


async def run(ask: Ask, groups: int, clients: int) -> tuple[list[list[float]], list[float]]:
    """All groups once, by some clients; returns the rewards and the seconds of every request."""
    rewards: list[list[float]] = [[] for _ in range(groups)]
    seconds = [0.0] * groups
    numbers, salt = iter(range(groups)), uuid4().hex

    async def work(client: httpx2.AsyncClient) -> None:
        for number in numbers:
            start = time.perf_counter()
            rewards[number] = await ask(client, number, salt)
            seconds[number] = time.perf_counter() - start

    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:
        await asyncio.gather(*(work(client) for _ in range(clients)))
    return rewards, seconds


async def soak(url: str, groups: Sequence[Group], clients: int, minutes: float) -> dict[str, Any]:
    """Load without a pause, some of it malformed, some of it given up by its client; memory every ten seconds."""
    ask, end = by_parts(url, groups), time.monotonic() + 60 * minutes
    counts = {"answered": 0, "refused": 0, "given up": 0}
    memory: list[float] = []

    async def work(client: httpx2.AsyncClient, number: int) -> None:
        generator = random.Random(number)
        while time.monotonic() < end:
            kind = generator.random()
            if kind < 0.1:
                answer = await client.post(f"{url}/v1/rewards", json={"prompt": "p" * generator.randrange(100_000)})
                assert answer.status_code == 422, answer.text
                counts["refused"] += 1
            elif kind < 0.2:
                try:
                    await asyncio.wait_for(ask(client, generator.randrange(len(groups)), ""), 0.2)
                except TimeoutError:
                    counts["given up"] += 1
            else:
                await ask(client, generator.randrange(len(groups)), "")
                counts["answered"] += 1

    async def watch(client: httpx2.AsyncClient) -> None:
        while time.monotonic() < end:
            text = (await client.get(f"{url}/metrics")).text
            memory.append(float(re.findall(r"^process_resident_memory_bytes (\S+)", text, re.M)[0]) / 2**20)
            print(f"{memory[-1]:8.1f} MiB   {counts}", flush=True)
            await asyncio.sleep(min(10, 6 * minutes))

    async with httpx2.AsyncClient(timeout=600, limits=httpx2.Limits(max_connections=None), trust_env=False) as client:
        await asyncio.gather(watch(client), *(work(client, number) for number in range(clients)))
    half = len(memory) // 2
    return {"counts": counts, "memory_mib": memory, "growth_mib_in_second_half": memory[-1] - memory[half]}


@contextmanager
def server(command: list[str], threads: int) -> Iterator[str]:
    """Start `polar serve`; gives its address."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "POLAR_API_KEYS": ""}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"listening on (http://\S+)", line):
                yield found[1]
                return
        raise SystemExit("polar serve did not start")
    finally:
        process.terminate()
        process.communicate(timeout=60)


if __name__ == "__main__":
    main()
