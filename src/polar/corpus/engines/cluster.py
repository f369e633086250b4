"""The same engines on a Ray cluster.

HTTP and transformers policies are sampled by plain actors, spread over the nodes; vLLM policies by Ray Data's vLLM
processor. The plan and the journal stay in the process that began the job, so the number of nodes changes nothing but
the speed. An actor whose process or node dies is started again elsewhere, and its batches with it.

A key is read from the environment of the node that sends the requests, so set it where the nodes are started.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from polar.core.errors import InputError
from polar.corpus.engines import Completion, Engine, Failure, Request, Result, open_engine
from polar.corpus.engines.local import end_tokens_of
from polar.corpus.pool import HttpEngine, Policy, VllmEngine

log = logging.getLogger(__name__)

TRIES = 3
"""How often a batch is begun again after its worker died, before it fails: it may be what kills the worker."""
ERROR = "__inference_error__"
"""Ray's column for what went wrong with a row; such rows do not pass through our own postprocessing."""
WAVE_SECONDS = 0.5
"""How long batches are collected before they become one Ray Data job."""


def connect(address: str) -> None:
    """Connect to a cluster: its address, "auto" for the one of this machine, or "local" for a new one in here.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs the package ray: pip install 'polar-rm[cluster]'") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone unless asked for
    try:
        where = urlsplit(address if "://" in address else f"ray://{address}")
        if where.port:  # Ray itself would try for minutes
            socket.create_connection((where.hostname or "", where.port), timeout=10).close()
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"--ray {address}: no Ray cluster there: {' '.join(str(error).split())[:300]}") from error


def open_on_cluster(policy: Policy) -> Engine:
    """Open a policy on the cluster that `connect` found, as `polar.corpus.engines.open_engine` does here.

    Raises:
        InputError: the model cannot be loaded there.
    """
    if isinstance(policy.engine, VllmEngine):
        return RayDataSampler(policy, policy.engine)
    return RayActors(policy)


class RayActors:
    """One policy in several actors: one per node for HTTP, one per GPU (or node without GPUs) for a model."""

    def __init__(self, policy: Policy) -> None:
        import ray

        nodes = sum(node["Alive"] for node in ray.nodes())
        gpus = int(ray.cluster_resources().get("GPU", 0))
        http = isinstance(policy.engine, HttpEngine)
        workers = nodes if http else gpus or nodes
        if isinstance(policy.engine, HttpEngine):  # the endpoint sees as many requests as without a cluster
            share = math.ceil(policy.engine.concurrency / workers)
            policy = policy.model_copy(update={"engine": policy.engine.model_copy(update={"concurrency": share})})
        actor = ray.remote(_Worker).options(
            num_cpus=0 if http else 1,
            num_gpus=1 if gpus and not http else 0,
            scheduling_strategy="SPREAD",
            max_restarts=-1,
            max_task_retries=TRIES,
        )
        self._actors = [actor.remote(policy) for _ in range(workers)]
        try:
            in_flight = ray.get([worker.open.remote() for worker in self._actors])
        except InputError as error:  # Ray raises a copy with the remote traceback in front
            raise InputError(
                str(error).strip().splitlines()[-1].removeprefix("polar.core.errors.InputError: ")
            ) from None
        self._busy = dict.fromkeys(range(workers), 0)
        self.in_flight = sum(in_flight)

    async def sample(self, requests: Sequence[Request]) -> list[Result]:
        """Sample a batch on the least busy worker."""
        import ray

        worker = min(self._busy, key=lambda number: self._busy[number])
        self._busy[worker] += 1
        try:
            results: list[Result] = await self._actors[worker].sample.remote(list(requests))
            return results
        except ray.exceptions.RayActorError as error:
            log.warning("a worker died %d times over one batch, which fails: %s", TRIES + 1, error)
            return [Failure(f"the worker died {TRIES + 1} times over this batch")] * len(requests)
        finally:
            self._busy[worker] -= 1

    async def close(self) -> None:
        """End the actors."""
        import ray

        for actor in self._actors:
            ray.kill(actor)


class _Worker:
    """One engine inside an actor; opened when first needed, since a restarted actor begins anew."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.engine: Engine | None = None
        self.lock = asyncio.Lock()

    async def open(self) -> int:
        async with self.lock:
            if self.engine is None:
                self.engine = await asyncio.to_thread(open_engine, self.policy)
        return self.engine.in_flight

    async def sample(self, requests: list[Request]) -> list[Result]:
        await self.open()
        assert self.engine is not None
        return await self.engine.sample(requests)


class RayDataSampler:
    """A vLLM policy through Ray Data's processor: as many replicas as the GPUs of the cluster allow.

    Batches that are asked for at about the same time become one data set, so that a replica loads its model once for
    very many samples; each batch is answered as soon as its own rows are there.
    """

    in_flight = 1024

    def __init__(self, policy: Policy, settings: VllmEngine) -> None:
        self.policy, self.settings = policy, settings
        self._waiting: list[tuple[list[Request], asyncio.Future[list[Result]]]] = []
        self._waves: asyncio.Task[None] | None = None
        self._processor = self._build()

    async def sample(self, requests: Sequence[Request]) -> list[Result]:
        """Sample a batch as part of the next wave."""
        future: asyncio.Future[list[Result]] = asyncio.get_running_loop().create_future()
        self._waiting.append((list(requests), future))
        if self._waves is None or self._waves.done():
            self._waves = asyncio.create_task(self._run_waves())
        return await future

    async def close(self) -> None:
        """Nothing stays open between waves."""

    async def _run_waves(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            await asyncio.sleep(WAVE_SECONDS)
            wave, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._run_wave, wave, loop)
            except Exception as error:
                log.exception("a Ray Data job failed")
                lines = str(error).strip().splitlines() or [type(error).__name__]
                reason = f"the Ray Data job failed: {lines[-1][:200]}"  # above the last line is the remote traceback
                for requests, future in wave:
                    _answer(future, [Failure(reason)] * len(requests))

    def _run_wave(
        self, wave: list[tuple[list[Request], asyncio.Future[list[Result]]]], loop: asyncio.AbstractEventLoop
    ) -> None:
        import ray

        rows = [
            {"batch": batch, "place": place, **_input(request)}
            for batch, (requests, _) in enumerate(wave)
            for place, request in enumerate(requests)
        ]
        results: list[dict[int, Result]] = [{} for _ in wave]
        for row in self._processor(ray.data.from_items(rows)).iter_rows():
            requests, future = wave[row["batch"]]
            done = results[row["batch"]]
            done[row["place"]] = _result(row)
            if len(done) == len(requests):
                loop.call_soon_threadsafe(_answer, future, [done[place] for place in range(len(requests))])
        for (requests, future), done in zip(wave, results, strict=True):
            if len(done) < len(requests):
                lost = Failure("the Ray Data job lost this sample")
                loop.call_soon_threadsafe(_answer, future, [done.get(place, lost) for place in range(len(requests))])

    def _build(self) -> Any:
        import ray
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        settings, decoding = self.settings, self.policy.decoding
        gpus = int(ray.cluster_resources().get("GPU", 0))
        engine = {
            "dtype": settings.dtype,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "max_model_len": settings.max_model_len,
            "trust_remote_code": False,
        }
        chat = self.policy.kind == "chat"
        config = vLLMEngineProcessorConfig(
            model_source=settings.model,
            engine_kwargs={name: value for name, value in engine.items() if value is not None},
            batch_size=min(settings.batch_size, 64),
            concurrency=max(1, gpus // settings.tensor_parallel_size),
            chat_template_stage={"enabled": chat},
            detokenize_stage={"enabled": False},  # vLLM does it as it does without Ray
            should_continue_on_error=True,
            log_engine_metrics=False,  # they need more of Ray than its data room
            placement_group_config=None if gpus else {"bundle_per_worker": {"CPU": 1}},
        )
        sampling = {
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k or 0,
            "max_tokens": decoding.max_tokens,
        }

        def before(row: dict[str, Any]) -> dict[str, Any]:
            text = {"messages": row["messages"]} if chat else {"prompt": row["prompt"]}
            return {**text, "sampling_params": {**sampling, "seed": int(row["seed"])}}

        def after(row: dict[str, Any]) -> dict[str, Any]:
            return {
                "batch": row["batch"],
                "place": row["place"],
                "output": row["generated_text"],
                "finish_reason": _finish_reason(settings.model, row["generated_tokens"]),
                "prompt_tokens": row["num_input_tokens"],
                "output_tokens": row["num_generated_tokens"],
                ERROR: row.get(ERROR, ""),
            }

        return build_processor(config, preprocess=before, postprocess=after)


def _finish_reason(model: str, output: Sequence[int]) -> str:
    """Return why an output ended (an end token, max_tokens or the context), which the processor does not say."""
    return "stop" if len(output) and output[-1] in end_tokens_of(model) else "length"


def _result(row: dict[str, Any]) -> Result:
    if row.get(ERROR):
        return Failure(" ".join(str(row[ERROR]).split())[:200])
    return Completion(row["output"], row["finish_reason"], int(row["prompt_tokens"]), int(row["output_tokens"]))


def _answer(future: asyncio.Future[list[Result]], results: list[Result]) -> None:
    if not future.done():  # whoever asked may have been cancelled, and a row may come twice
        future.set_result(results)


def _input(request: Request) -> dict[str, Any]:
    if isinstance(request.prompt, str):
        return {"prompt": request.prompt, "seed": request.seed}
    return {"messages": [asdict(message) for message in request.prompt], "seed": request.seed}
