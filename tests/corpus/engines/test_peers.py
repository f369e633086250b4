"""The engines against real ones: `transformers serve`, vLLM in this process and vLLM's own server."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tokenizers import Tokenizer

from polar.core.records import Message
from polar.corpus.engines import Completion, Engine, Failure, Request, Result, open_engine
from polar.corpus.pool import Policy
from tests.corpus.engines.tiny import save_policy

needs_serving = pytest.mark.skipif(not find_spec("openai"), reason="transformers[serving] is not installed")
needs_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")
slow = pytest.mark.slow  # vLLM takes about a minute to start

START_UP = 240
"""Seconds; vLLM compiles."""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
TEXTS = ["The reward model reads", "What is", "1 2 3 4 5", "  spaces and\n", "中文"]
CHATS = [(Message("system", "Be brief."), Message("user", text)) for text in TEXTS]
SAMPLING = '{"do_sample": true, "top_k": 50}'


@pytest.fixture(scope="module")
def checkpoint(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    return save_policy(directory, tokenizer, hidden=128, max_position_embeddings=256)  # vLLM wants heads of 32


@contextmanager
def running(log: Path, *command: str, python: str = sys.executable) -> Iterator[str]:
    """Start a server on a free port, wait until it answers, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [python, *command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments, stdout=output, stderr=output, env=os.environ | ENVIRONMENT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_UP
        while not _healthy(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # its own group: the server and its workers
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx2.get(url, trust_env=False, timeout=5).is_success
    except httpx2.HTTPError:
        return False


def opened(kind: str, engine: dict[str, Any], **decoding: Any) -> Engine:
    settings = {"max_tokens": 16, **decoding}
    return open_engine(Policy.model_validate({"name": "peer", "kind": kind, "engine": engine, "decoding": settings}))


def draw(engine: Engine, *batches: list[Request]) -> list[list[Result]]:
    async def run() -> list[list[Result]]:
        return [await engine.sample(batch) for batch in batches]

    return asyncio.run(run())


def requests(kind: str, first: int = 0) -> list[Request]:
    return [Request(prompt, seed) for seed, prompt in enumerate(TEXTS if kind == "base" else CHATS, first)]


def greedy_here(checkpoint: Path, kind: str) -> list[Result]:
    local = {"type": "transformers", "model": str(checkpoint), "device": "cpu"}
    return draw(opened(kind, local, temperature=0), requests(kind))[0]


def counted(results: list[Result]) -> list[tuple[str, int | None, int | None]]:
    """Without the texts: engines write broken characters, which random models give, in different ways."""
    return [
        (result.finish_reason, result.prompt_tokens, result.output_tokens)
        for result in results
        if isinstance(result, Completion)
    ]


def readable(results: list[Result]) -> list[str]:
    return [
        "".join(character for character in result.output if character.isascii())
        for result in results
        if isinstance(result, Completion)
    ]


# transformers serve


@pytest.fixture(scope="module")
def transformers_server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    log = tmp_path_factory.mktemp("serve") / "log"
    program = "from transformers.cli.transformers import main; main()"
    with running(log, "-c", program, "serve", str(checkpoint), "--device", "cpu") as url:
        yield {"type": "http", "base_url": url, "model": str(checkpoint), "concurrency": 1}


@needs_serving
@pytest.mark.parametrize("kind", ["base", "chat"])
def test_transformers_serve_gives_greedy_samples_as_transformers_does_here(
    kind: str, transformers_server: dict[str, Any], checkpoint: Path
) -> None:
    (served,) = draw(opened(kind, transformers_server, temperature=0, top_k=None), requests(kind))
    here = greedy_here(checkpoint, kind)
    assert counted(served) == counted(here)
    assert readable(served) == readable(here)


@needs_serving
@pytest.mark.parametrize("kind", ["base", "chat"])
def test_transformers_serve_repeats_a_sample_for_its_seed_one_at_a_time(
    kind: str, transformers_server: dict[str, Any]
) -> None:
    sampled = {**transformers_server, "extra_body": {"generation_config": SAMPLING}}
    engine = opened(kind, sampled, top_k=None)
    first, again, others = draw(engine, requests(kind), requests(kind), requests(kind, first=50))
    assert first == again
    assert all(isinstance(result, Completion) for result in first)
    assert readable(first) != readable(others)


@needs_serving
def test_transformers_serve_refuses_another_model_and_unknown_fields(transformers_server: dict[str, Any]) -> None:
    wrong = {**transformers_server, "model": "another/model"}
    for engine, reason in (
        (opened("base", wrong, top_k=None), "HTTP 400: Server is pinned to"),
        (opened("base", transformers_server), "HTTP 422: Unexpected fields in the request: {'top_k'}"),
    ):
        ((result, *_),) = draw(engine, requests("base"))
        assert isinstance(result, Failure)
        assert reason in result.reason


# vLLM


@pytest.fixture(scope="module")
def vllm_server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    log = tmp_path_factory.mktemp("vllm") / "log"
    settings = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--generation-config", "vllm"]
    program = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--served-model-name", "tiny"]
    with running(log, *program, *settings) as url:
        yield {"type": "http", "base_url": url, "model": "tiny"}


@pytest.fixture(scope="module")
def vllm_engine(checkpoint: Path) -> Iterator[Engine]:
    os.environ.update(ENVIRONMENT)
    local = {"type": "vllm", "model": str(checkpoint), "dtype": "float32", "max_model_len": 256}
    engine = opened("base", local)
    yield engine
    asyncio.run(engine.close())


def assert_reproducible(engine: Engine, kind: str) -> None:
    """Again, in another order, and one at a time: the same samples; with other seeds: others."""
    batch = requests(kind) + requests(kind, first=20)
    singly = [[request] for request in batch]
    first, again, turned, others, *alone = draw(engine, batch, batch, batch[::-1], requests(kind, first=50), *singly)
    assert all(isinstance(result, Completion) for result in first)
    assert first == again == turned[::-1] == [result for results in alone for result in results]
    assert readable(first[: len(others)]) != readable(others)


@slow
@needs_vllm
@pytest.mark.parametrize("kind", ["base", "chat"])
def test_samples_of_vllm_depend_on_their_seed_alone(kind: str, vllm_engine: Engine) -> None:
    assert_reproducible(vllm_engine, kind)


@slow
@needs_vllm
@pytest.mark.parametrize("kind", ["base", "chat"])
def test_samples_of_a_vllm_server_depend_on_their_seed_alone(kind: str, vllm_server: dict[str, Any]) -> None:
    assert_reproducible(opened(kind, vllm_server), kind)


@slow
@needs_vllm
@pytest.mark.parametrize("kind", ["base", "chat"])
def test_a_vllm_server_gives_greedy_samples_as_transformers_does_here(
    kind: str, vllm_server: dict[str, Any], checkpoint: Path
) -> None:
    (served,) = draw(opened(kind, vllm_server, temperature=0), requests(kind))
    here = greedy_here(checkpoint, kind)
    assert counted(served) == counted(here)
    assert readable(served) == readable(here)


@slow
@needs_vllm
def test_the_same_seeds_give_the_same_samples_in_process_and_behind_the_server(
    vllm_engine: Engine, vllm_server: dict[str, Any]
) -> None:
    here, served = draw(vllm_engine, requests("base")), draw(opened("base", vllm_server), requests("base"))
    assert here == served


@slow
@needs_vllm
def test_a_prompt_without_room_fails_alone_in_vllm(vllm_engine: Engine, vllm_server: dict[str, Any]) -> None:
    batch = [*requests("base"), Request("x" * 400, 9)]
    for engine in (vllm_engine, opened("base", vllm_server)):
        (results,) = draw(engine, batch)
        assert all(isinstance(result, Completion) for result in results[:-1])
        assert isinstance(results[-1], Failure)
        assert "context" in results[-1].reason


@slow
@needs_vllm
def test_a_vllm_server_refuses_another_model_once(vllm_server: dict[str, Any]) -> None:
    (results,) = draw(opened("base", {**vllm_server, "model": "another"}), requests("base"))
    assert all(isinstance(result, Failure) and "does not exist" in result.reason for result in results)


@slow
@needs_vllm
@pytest.mark.timeout(600)
@pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed")
def test_ray_data_gives_the_samples_of_vllm_in_this_process(vllm_engine: Engine, checkpoint: Path) -> None:
    import ray

    from polar.corpus.engines import cluster

    os.environ.update(ENVIRONMENT)
    cluster.connect("local")
    try:
        engine = {"type": "vllm", "model": str(checkpoint), "dtype": "float32", "max_model_len": 256}
        policy = Policy.model_validate({"name": "p", "kind": "base", "engine": engine, "decoding": {"max_tokens": 16}})
        (over_ray,) = draw(cluster.open_on_cluster(policy), requests("base"))
    finally:
        ray.shutdown()
    (here,) = draw(vllm_engine, requests("base"))
    assert over_ray == here
