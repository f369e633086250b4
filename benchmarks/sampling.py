"""What `polar sample` costs beside the engine itself: planning, saving, sorting into shards.

Each load is sampled by the bare engine and by `polar.corpus.sample.sample_plan`, in turn, in one process; the ratio
of a round is what counts, since the machine may be busy with other things.

- transformers: a random Llama of 20 M parameters, 128 samples of 64 tokens in batches of 16. The model is loaded once
  for both sides. Then the engine itself against the plain `generate(do_sample=True)` of the library on the same
  batches: what samples that do not depend on their batch cost.
- http: 1,024 requests, 64 at a time, to a server in another process that answers after a quarter of a second, and after
  a whole one (as a real model with so many requests hardly does); the bare side is a loop with the same HTTP library
  that tries nothing again and saves nothing.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2

from polar.core.records import prompt_id
from polar.corpus.engines import Engine, Request, Result
from polar.corpus.engines.http import HttpSampler
from polar.corpus.plan import BUNDLED_TOKENIZER, Batch, Plan, Prompt
from polar.corpus.pool import HttpEngine, Pool, TransformersEngine
from polar.corpus.sample import sample_plan

LATENCIES = (0.25, 1.0)
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """One load, over several rounds."""

    load: str
    samples: int
    bare_seconds: float
    """Median."""
    polar_seconds: float
    ratios: list[float]
    """polar / bare, one per round, in increasing order."""

    @property
    def median(self) -> float:
        """The ratio in the middle."""
        return statistics.median(self.ratios)


class Shared:
    """An engine that stays open over several runs."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.in_flight = engine, engine.in_flight

    async def sample(self, requests: Sequence[Request]) -> list[Result]:
        return await self.engine.sample(requests)

    async def close(self) -> None:
        pass


def measure(rounds: int) -> list[Overhead]:
    """All loads."""
    return [*_transformers(rounds), *(_http(rounds, latency) for latency in LATENCIES)]


def _prompts(count: int) -> list[Prompt]:
    texts = [f"Question {number}: what would you like to know about the number {number}?" for number in range(count)]
    return [Prompt(prompt_id(text), text, "pretrain") for text in texts]


def _plan(engine: dict[str, Any], max_tokens: int) -> Plan:
    policy = {"name": "policy", "kind": "base", "engine": engine, "decoding": {"max_tokens": max_tokens}}
    return Plan(Pool.model_validate({"policies": [policy]}), "grid", samples=2)


def _compare(load: str, rounds: int, samples: int, bare: Callable[[], None], polar: Callable[[], None]) -> Overhead:
    bare()  # both sides once without the clock
    polar()
    pairs = [(_seconds(bare), _seconds(polar)) for _ in range(rounds)]
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    return Overhead(load, samples, *medians, sorted(second / first for first, second in pairs))


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _with_polar(plan: Plan, prompts: list[Prompt], open_engine: Callable[[], Engine]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        report = sample_plan(plan, prompts, directory, open_engine=lambda policy: open_engine())
        assert report.drawn == report.expected


def _transformers(rounds: int) -> list[Overhead]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from polar.corpus.engines.local import TransformersSampler

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(BUNDLED_TOKENIZER), bos_token="<s>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=448,
        intermediate_size=1792,
        num_hidden_layers=6,
        num_attention_heads=7,
        num_key_value_heads=7,
        max_position_embeddings=512,
    )
    with tempfile.TemporaryDirectory() as directory:
        LlamaForCausalLM(config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        plan = _plan({"type": "transformers", "model": directory, "batch_size": 16, "dtype": "float32"}, 64)
        (policy,) = plan.pool.policies
        assert isinstance(policy.engine, TransformersEngine)
        engine = TransformersSampler(policy, policy.engine)
        prompts = _prompts(64)
        batches = plan.shard(0, prompts)

        def bare() -> None:
            asyncio.run(_all(engine, batches))

        def library() -> None:
            for batch in batches:
                texts = [str(item.prompt.text) for item in batch.items]
                inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
                inputs.pop("token_type_ids", None)
                settings = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "max_new_tokens": 64}
                ids = engine.model.generate(**inputs, do_sample=True, **settings)
                tokenizer.batch_decode(ids)

        return [
            _compare("transformers", rounds, 128, bare, lambda: _with_polar(plan, prompts, lambda: Shared(engine))),
            _compare("transformers, against plain generate", rounds, 128, library, bare),
        ]


async def _all(engine: Engine, batches: list[Batch]) -> None:
    for batch in batches:
        await engine.sample([item.request(batch.policy) for item in batch.items])


def _http(rounds: int, latency: float) -> Overhead:
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    server = context.Process(target=_serve, args=(port, latency), daemon=True)
    server.start()
    try:
        url = f"http://127.0.0.1:{port.get(timeout=60)}/v1"
        plan = _plan({"type": "http", "base_url": url, "model": "none"}, 64)
        (policy,) = plan.pool.policies
        settings = policy.engine
        assert isinstance(settings, HttpEngine)
        prompts = _prompts(512)
        batches = plan.shard(0, prompts)
        return _compare(
            f"http, answers after {latency} s",
            rounds,
            1024,
            lambda: asyncio.run(_ask(url, batches)),
            lambda: _with_polar(plan, prompts, lambda: HttpSampler(policy, settings)),
        )
    finally:
        server.terminate()
        server.join(10)


async def _ask(url: str, batches: list[Batch]) -> None:
    slots = asyncio.Semaphore(64)
    async with httpx2.AsyncClient(limits=httpx2.Limits(max_connections=64, max_keepalive_connections=64)) as client:

        async def one(prompt: str, seed: int) -> str:
            async with slots:
                body = {"model": "none", "prompt": prompt, "seed": seed, "max_tokens": 64}
                reply = await client.post(f"{url}/completions", json=body, timeout=60)
                return str(reply.json()["choices"][0]["text"])

        await asyncio.gather(*(one(str(item.prompt.text), item.seed) for batch in batches for item in batch.items))


def _serve(port: Any, latency: float) -> None:
    asyncio.run(_serve_forever(port, latency))


async def _serve_forever(port: Any, latency: float) -> None:
    text = "An answer of about the length that a short answer has. " * 5
    choice = {"index": 0, "text": text, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 20, "completion_tokens": 64}}).encode()
    reply = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    line.split(b":")[1] for line in head.lower().splitlines() if line.startswith(b"content-l")
                )
                await reader.readexactly(int(length))
                await asyncio.sleep(latency)
                writer.write(reply)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port.put(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def run(rounds: int, report: Path, machine: str) -> None:
    """Measure, and write JSON and a table."""
    results = measure(rounds)
    lines = [
        "| load | samples | bare s | polar sample s | ratio | lowest to highest |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for result in results:
        seconds = f"{result.bare_seconds:.1f} | {result.polar_seconds:.1f}"
        spread = f"{result.ratios[0]:.3f} to {result.ratios[-1]:.3f}"
        lines.append(f"| {result.load} | {result.samples:,} | {seconds} | {result.median:.3f} | {spread} |")
    table = "\n".join([*lines, "", machine, ""])
    sys.stdout.write(table)
    report.with_suffix(".md").write_text(table, "utf-8")
    runs = [{**asdict(result), "median": result.median} for result in results]
    report.with_suffix(".json").write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n", "utf-8")
