"""`polar serve`: rewards over HTTP; `polar parity`: does a server give the rewards of the checkpoint here?"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from polar.cli.common import Files, progress_bar
from polar.client.engines import ServerType
from polar.core.checkpoint import BUNDLED_NAME
from polar.core.errors import EngineError, InputError, RewardError
from polar.core.files import write_json
from polar.core.records import Group
from polar.core.template import Compat
from polar.core.version import __version__

if TYPE_CHECKING:
    from polar.client.transport import Limits

QUESTIONS = (
    ("What is the capital of China?", "Beijing."),
    ("How many 'r's are there in the word 'strawberry'?", "There are 3 'r's in the word 'strawberry'."),
    ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b\n"),
    ("为什么天空是蓝色的？", "因为空气分子对蓝光的散射比对红光强，这叫做瑞利散射。"),
    ("Give me three tips for watering house plants.", "1. Feel the soil.\n2. Water until it drains.\n3. Let it dry."),
    ("用一句话介绍长江。", "长江是中国最长的河流，全长约 6300 公里，流入东海。"),
    ("Answer with an emoji: how do you feel?", "😀"),
    ("Tell me a long story.", "Once upon a time there was a bear who could not sleep. " * 12),
)
"""Without a file every reference here is scored as the output of every question: 64 inputs of all lengths."""


def serve(
    model: str = BUNDLED_NAME,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 30000,
    backend: Files = (),
    name: str | None = None,
    api_key_env: str = "POLAR_API_KEYS",
    allow_no_key: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    compat: Compat | None = None,
    max_length: int | None = None,
    max_response_length: int | None = None,
    batch_tokens: int | None = None,
    max_queue: int = 4096,
    max_body_mb: int = 32,
    read_seconds: float = 30.0,
    drain_seconds: float = 30.0,
) -> None:
    """Serve rewards over HTTP, for programs and for people.

    POST /v1/rewards takes prompts, references and candidates; the routes of vLLM, SGLang, LMDeploy and OpenRLHF are
    there for their clients, a page at / for people, counters at /metrics, and all routes are listed at /openapi.json.

    Concurrent requests are batched, and what they share at their beginning is computed once. SIGTERM ends the server
    when everything in flight is answered; SIGHUP or POST /v1/reload loads the checkpoint again without a pause. With
    --backend the model runs on other servers, and this one needs only its tokenizer and input format.

    Examples:
      polar serve
      polar serve runs/reward-model --port 8000 --dtype bfloat16
      POLAR_API_KEYS=secret polar serve runs/reward-model --host 0.0.0.0
      polar serve runs/reward-model --backend vllm=10.0.0.1:8000,10.0.0.2:8000
      curl 127.0.0.1:30000/v1/rewards --json '{"prompt": "2+2?", "reference": "4", "candidates": ["4", "5"]}'

    Args:
        model: Checkpoint directory, hub name, or polar-mini or polar-nano, which are bundled.
        host: Address to listen on; one that other machines can reach needs a key.
        port: Port to listen on; 0 for any free one.
        backend: Servers that compute, ENGINE=HOST:PORT,...; ENGINE is vllm, sglang, lmdeploy, polar or auto.
        name: The model's name in requests and answers (default: the last part of MODEL).
        api_key_env: Environment variable with the API keys, separated by commas.
        allow_no_key: Let everybody ask who can reach the address.
        device: Torch device (default: a GPU if there is one).
        dtype: float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on a CPU).
        compat: "seed" builds the inputs exactly as the original POLAR client does.
        max_length: Longest input in tokens (default: the checkpoint's).
        max_response_length: Longest reference and candidate in tokens (default: the checkpoint's).
        batch_tokens: Tokens of one forward pass (default: 4096 on a CPU, 16384 elsewhere).
        max_queue: Inputs that may be in flight; further requests get 429 with a time to come back.
        max_body_mb: Largest request in MiB.
        read_seconds: Most time for a request to arrive.
        drain_seconds: Most time for requests in flight after SIGTERM.
    """
    try:
        from polar import serving  # needs torch, which --help does not
    except ModuleNotFoundError as error:
        raise InputError(f"polar serve needs {error.name}: pip install 'polar-rm[serve]'") from error

    for flag, count in {"batch_tokens": batch_tokens, "max_queue": max_queue, "max_body_mb": max_body_mb}.items():
        if count is not None and count < 1:
            raise InputError(f"{flag} must be at least 1, found {count}")
    for flag, seconds in {"read_seconds": read_seconds, "drain_seconds": drain_seconds}.items():
        if not seconds > 0:
            raise InputError(f"{flag} must be positive, found {seconds}")
    keys = serving.parse_keys(os.environ.get(api_key_env, ""), api_key_env)
    listener = serving.bind(host, port, protected=bool(keys) or allow_no_key)
    server = serving.create_server(
        model,
        backends=backend,
        name=name,
        keys=keys,
        loading=serving.Loading(device, dtype, compat, max_length, max_response_length),
        batch_tokens=batch_tokens,
        max_queue=max_queue,
        limits=serving.RequestLimits(max_body_mb << 20, read_seconds),
    )
    asyncio.run(server.serve(listener, drain_seconds=drain_seconds))


@dataclass(frozen=True, slots=True)
class Parity:
    """Agreement of a server's rewards with the local ones."""

    inputs: int
    tokens: int
    max_difference: float
    mean_difference: float
    kendall: float | None
    """Rank correlation tau-b; None when all rewards are the same."""
    spearman: float | None
    seconds: float
    """Time of the server for everything."""
    rewards_per_second: float
    tokens_per_second: float


def parity(
    address: str,
    /,
    inputs: Annotated[Sequence[str], Parameter(negative="", allow_leading_hyphen=False)] = (),
    *,
    triples: Files = (),
    model: str = BUNDLED_NAME,
    engine: ServerType = "auto",
    limit: int = 1000,
    tolerance: float = 1e-3,
    device: str | None = None,
    max_length: int | None = None,
    concurrency: int = 8,
    deadline: float = 1800,
    output: str | None = None,
) -> None:
    """Compare a server's rewards with those of the same checkpoint in float32 in this process.

    The same inputs are scored here and there. Ends with exit code 2 when the largest difference exceeds the tolerance.
    Engines differ by about 5e-5 in float32 and by 0.1 or more in bfloat16. A key for the server is taken from the
    environment variable POLAR_API_KEY.

    Examples:
      polar parity 127.0.0.1:30000
      polar parity 127.0.0.1:8000 answers.jsonl --model ./rm --engine vllm --tolerance 0.2
      polar parity http://gpu1:8000,http://gpu2:8000 --triples held-out.parquet --limit 500 --output parity.json

    Args:
        address: host:port or URL of the server; several separated by commas.
        inputs: Files as for `polar score` (prompt, reference, output or candidates; default: a small built-in set).
        triples: File of triples, as `polar pair` writes them; repeat the flag for more.
        model: The checkpoint that is served: a directory, or the name of a bundled model.
        engine: What serves there; auto finds out.
        limit: At most this many groups, from the beginning.
        tolerance: The largest difference that is accepted.
        device: Torch device of the local model (default: a GPU if there is one).
        max_length: Longest input in tokens (default: the checkpoint's).
        concurrency: Requests in flight.
        deadline: Seconds that the server may take for everything.
        output: JSON file for the numbers and all rewards.
    """
    from polar.client.transport import Limits
    from polar.model.reward_model import RewardModel

    if limit < 1:
        raise InputError(f"limit must be at least 1, found {limit}")
    if output is not None and not Path(output).parent.is_dir():
        raise InputError(f"{output}: expected a file in a directory that exists")
    groups = [group for group, _ in zip(_groups(inputs, triples), range(limit), strict=False)]
    local = RewardModel.load(model, device=device, dtype="float32")
    local.template = local.template.with_lengths(max_length)
    encoded = [local.template.encode_group(group) for group in groups]
    sequences = [ids for one in encoded for ids in one.sequences()]
    limits = Limits(concurrency=concurrency, deadline=deadline)
    served, seconds, refusal = asyncio.run(_ask(model, address, engine, limits, sequences))
    with progress_bar() as progress:
        task = progress.add_task("scoring here", total=len(sequences))
        expected = list(
            chain.from_iterable(local.score_encoded(encoded, progress=lambda count: progress.advance(task, count)))
        )
    found = compare(served, expected, sum(map(len, sequences)), seconds)
    Console(stderr=True).print(_table(found, tolerance))
    if output is not None:
        _save(Path(output), {"address": address, "model": model, "tolerance": tolerance}, found, served, expected)
    if found.max_difference > tolerance:
        raise InputError(
            f"{address}: rewards differ by up to {found.max_difference:.2g}, more than the tolerance {tolerance:g}; "
            f"{refusal or 'the engine probably computes in half precision (see its --dtype)'}"
        )


def compare(served: Sequence[float], expected: Sequence[float], tokens: int, seconds: float) -> Parity:
    """Return the numbers of a comparison; both lists are rewards of the same inputs."""
    from scipy.stats import kendalltau, spearmanr

    differences = [abs(a - b) for a, b in zip(served, expected, strict=True)]
    several = len(set(served)) > 1 and len(set(expected)) > 1  # otherwise there are no ranks to compare
    return Parity(
        inputs=len(served),
        tokens=tokens,
        max_difference=max(differences),
        mean_difference=sum(differences) / len(differences),
        kendall=float(kendalltau(served, expected).statistic) if several else None,
        spearman=float(spearmanr(served, expected).statistic) if several else None,
        seconds=seconds,
        rewards_per_second=len(served) / seconds,
        tokens_per_second=tokens / seconds,
    )


def _groups(inputs: Sequence[str], triples: Sequence[str]) -> Iterator[Group]:
    from polar.data.readers import read_groups, read_triples

    if not inputs and not triples:
        outputs = tuple(reference for _, reference in QUESTIONS)
        yield from (Group(prompt, reference, outputs) for prompt, reference in QUESTIONS)
    for path in inputs:
        yield from read_groups(path)
    for path in triples:
        for triple in read_triples(path):
            yield Group(triple.prompt, triple.reference, (triple.positive, triple.negative), wrapper=triple.wrapper)


async def _ask(
    model: str, address: str, engine: ServerType, limits: Limits, sequences: Sequence[list[int]]
) -> tuple[list[float], float, str]:
    """Return the server's rewards, the seconds that they took, and why the probes refuse it, if they do."""
    from polar.client.client import AsyncRewardModelClient

    refusal = ""
    async with AsyncRewardModelClient(model, server_address=address, server_type=engine, limits=limits) as client:
        try:
            await client.connect()
        except EngineError as error:
            refusal = str(error)
    # A server that fails the probes is measured too: this command says by how much it differs.
    unproven = AsyncRewardModelClient(model, server_address=address, server_type=engine, limits=limits, probe=False)
    async with unproven as client:
        await client.connect()
        with progress_bar() as progress:
            task = progress.add_task("scoring there", total=len(sequences))
            started = time.perf_counter()
            try:
                rewards = await client.score_ids(sequences, progress=lambda count: progress.advance(task, count))
            except RewardError as error:
                raise InputError(f"{address}: {error}") from error
            return rewards, time.perf_counter() - started, refusal


def _table(found: Parity, tolerance: float) -> Table:
    table = Table("", "server against this process", show_header=False)
    table.add_row("inputs", f"{found.inputs:,} ({found.tokens:,} tokens)")
    table.add_row("largest difference", f"{found.max_difference:.2g} (tolerance {tolerance:g})")
    table.add_row("mean difference", f"{found.mean_difference:.2g}")
    if found.kendall is not None:
        table.add_row("rank agreement", f"Kendall {found.kendall:.4f}, Spearman {found.spearman:.4f}")
    table.add_row("throughput", f"{found.rewards_per_second:,.1f} rewards/s, {found.tokens_per_second:,.0f} tokens/s")
    return table


def _save(
    path: Path, settings: dict[str, object], found: Parity, served: Sequence[float], expected: Sequence[float]
) -> None:
    rewards = [{"server": a, "local": b} for a, b in zip(served, expected, strict=True)]
    content = {"polar": __version__, **settings, **asdict(found), "rewards": rewards}
    write_json(path, content)
