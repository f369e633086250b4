"""The routes of vLLM, SGLang, LMDeploy and OpenRLHF, with their JSON, so that their clients work unchanged.

vLLM and LMDeploy both have `/pooling`, take the same request and answer a list of numbers or a number. Nothing tells
the clients apart, so `/pooling` answers as vLLM does, and a client of another kind is given an address with a path:

    HOST:PORT                 {"data": [reward]}        vLLM
    HOST:PORT/lmdeploy        {"data": reward}          LMDeploy; the original POLAR client with server_type lmdeploy
    HOST:PORT/token_classify  {"data": [[reward]]}      vLLM with one row per token (of which only the last is given);
                                                        the original POLAR client with server_type vllm
"""

from __future__ import annotations

import asyncio
import struct
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from uuid import uuid4

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from polar.core.records import Group
from polar.core.text import without_end
from polar.serving.checkpoint import Checkpoint
from polar.serving.errors import RefusalError
from polar.serving.schemas import (
    ClassifyRequest,
    EitherClassifyRequest,
    Flat,
    GetRewardRequest,
    PoolingRequest,
    SglangRequest,
)
from polar.serving.service import Service


def routes(service: Service) -> APIRouter:
    """The routes around a service."""
    router = APIRouter(tags=["other servers"])

    @router.post("/classify", summary="vLLM (input) and SGLang (text or input_ids)")
    async def classify(request: EitherClassifyRequest) -> Response:
        if isinstance(request, SglangRequest):
            return await _sglang(service, request)
        checkpoint, rewards, tokens = await _score_vllm(service, request)
        data = [
            {"index": index, "label": "LABEL_0", "probs": [reward], "num_classes": 1}
            for index, reward in enumerate(rewards)
        ]
        return checkpoint.answer(_listing(service, "classify", data, tokens))

    @router.post("/encode", summary="SGLang")
    async def encode(request: SglangRequest) -> Response:
        return await _sglang(service, request)

    @router.post("/pooling", summary="vLLM")
    async def pooling(request: PoolingRequest) -> Response:
        shape = _as_base64 if request.encoding_format == "base64" else _as_list
        return await _pooling(service, request, "pooling", shape)

    @router.post("/token_classify/pooling", summary="vLLM with a row per token, of which the last is given")
    async def pooling_of_tokens(request: PoolingRequest) -> Response:
        return await _pooling(service, request, "pooling", lambda reward: [[reward]])

    @router.post("/lmdeploy/pooling", summary="LMDeploy")
    async def pooling_of_lmdeploy(request: PoolingRequest) -> Response:
        return await _pooling(service, request, "pool", lambda reward: reward)

    @router.post("/get_reward", summary="OpenRLHF; labels are the references")
    async def get_reward(request: GetRewardRequest) -> Response:
        return await _openrlhf(service, request)

    return router


async def _score(
    service: Service, flat: Flat, where: str, limit: int | None = None
) -> tuple[Checkpoint, list[float], list[int]]:
    """The checkpoint that scored complete inputs, their rewards, and their lengths in tokens."""
    async with service.admit(len(flat.inputs)) as checkpoint:
        group = await asyncio.to_thread(checkpoint.encode_inputs, flat.inputs, where, limit)
        (rewards,) = await service.rewards(checkpoint, [group], lambda number: f"{where}[{number}]")
    return checkpoint, rewards, [len(ids) for ids in group.branches]


async def _score_vllm(service: Service, request: ClassifyRequest) -> tuple[Checkpoint, list[float], int]:
    service.require_model(request.model)
    checkpoint, rewards, lengths = await _score(service, request.input, "input", request.limit)
    return checkpoint, rewards, sum(lengths)


async def _pooling(
    service: Service, request: PoolingRequest, prefix: str, shape: Callable[[float], object]
) -> Response:
    checkpoint, rewards, tokens = await _score_vllm(service, request)
    data = [{"index": index, "object": "pooling", "data": shape(reward)} for index, reward in enumerate(rewards)]
    return checkpoint.answer(_listing(service, prefix, data, tokens))


def _as_list(reward: float) -> object:
    return [reward]


def _as_base64(reward: float) -> object:
    """A vector of one little-endian float32."""
    return b64encode(struct.pack("<f", reward)).decode("ascii")


def _listing(service: Service, prefix: str, data: list[dict[str, object]], tokens: int) -> dict[str, object]:
    """The answer of vLLM around its items."""
    usage = {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
    return {
        "id": f"{prefix}-{uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": service.name,
        "data": data,
        "usage": usage,
    }


async def _sglang(service: Service, request: SglangRequest) -> Response:
    """One object for one input, a list for a list; the model's name in the request is ignored, as there."""
    start = time.monotonic()
    where, flat = request.flat
    checkpoint, rewards, lengths = await _score(service, flat, where)
    seconds = time.monotonic() - start
    items = [
        {
            "embedding": [reward],
            "meta_info": {
                "id": uuid4().hex,
                "finish_reason": {"type": "length", "length": 0},
                "prompt_tokens": tokens,
                "weight_version": "default",
                "num_retractions": 0,
                "e2e_latency": seconds,
                "response_sent_to_client_ts": time.time(),
            },
        }
        for reward, tokens in zip(rewards, lengths, strict=True)
    ]
    return checkpoint.answer(items[0] if flat.single else items)


async def _openrlhf(service: Service, request: GetRewardRequest) -> Response:
    """Prompt and response come as one text. A trainer with several servers sends no samples to some: an empty list."""
    if not request.query:
        return JSONResponse({"rewards": [], "scores": [], "extra_logs": {}})
    async with service.admit(len(request.query)) as checkpoint:
        special = checkpoint.template.special_tokens
        groups = [
            Group(prompt, label, (_response(query, prompt, special, number),))
            for number, (query, prompt, label) in enumerate(
                zip(request.query, request.prompts, request.labels, strict=True)
            )
        ]
        encoded = await asyncio.to_thread(lambda: [checkpoint.template.encode_group(group) for group in groups])
        rewards = await service.rewards(checkpoint, encoded, lambda number: f"query[{number}]")
    values = [reward for (reward,) in rewards]
    truncated = [float(bool(group.truncations[0])) for group in encoded]
    return checkpoint.answer({"rewards": values, "scores": values, "extra_logs": {"truncated": truncated}})


def _response(query: str, prompt: str, special_tokens: Sequence[str], number: int) -> str:
    """The response within prompt + response, without the tokens that ended it."""
    if not query.startswith(prompt):
        raise RefusalError(422, f"query[{number}]: expected it to begin with prompts[{number}]", f"query[{number}]")
    return without_end(query.removeprefix(prompt), special_tokens)
