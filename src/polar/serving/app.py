"""The application: our own routes, the state of the server, the page for people, and one shape for all errors."""

from __future__ import annotations

import asyncio
import re
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

from fastapi import APIRouter, Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from polar.core.checkpoint import scaling, with_reference
from polar.core.errors import InputError
from polar.core.records import aggregated, groups_of
from polar.core.template import EncodedGroup
from polar.core.version import __version__
from polar.serving import compat_routes
from polar.serving.checkpoint import Checkpoint
from polar.serving.errors import RefusalError
from polar.serving.middleware import Guard, RequestLimits
from polar.serving.schemas import FieldError, ReloadRequest, RewardsRequest
from polar.serving.service import Service


class ErrorDetail(BaseModel):
    """Reason of a refusal."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(BaseModel):
    """The shape of every refusal."""

    error: ErrorDetail


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in {
        400: "An input cannot be scored by this model",
        401: "No valid API key",
        404: "Another model was asked for",
        408: "The request did not arrive in time",
        413: "The request is too large",
        422: "The request is malformed, or an input turned out to have no reward",
        429: "Too much is in flight; Retry-After says when to come back",
        500: "A fault of the server",
        502: "A server behind the gateway failed",
        503: "The server is shutting down",
    }.items()
}


class Cut(BaseModel):
    """Tokens that were cut from each part because the input was too long; all zero when it fitted."""

    prompt: int
    reference: int
    candidate: int


class Detail(BaseModel):
    """One candidate against one reference."""

    reward: float
    tokens: int
    """Tokens that were read."""
    truncation: Cut


class Candidate(BaseModel):
    """One candidate."""

    index: int
    reward: float
    references: list[Detail]
    """One per reference, in their order."""


class Rewards(BaseModel):
    """The answer to `POST /v1/rewards`."""

    id: str
    object: str
    created: int
    model: str
    output: str
    rewards: list[float]
    """One per candidate, in their order."""
    candidates: list[Candidate]
    usage: dict[str, int]


PAGE = (Path(__file__).parent / "index.html").read_text("utf-8")
"""The page for people at `/`: one HTML file that loads nothing from elsewhere."""


def _page_hash(tag: str) -> str:
    """The hash by which the content security policy allows the one element of this name."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"


PAGE_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_page_hash('script')}; "
    f"style-src {_page_hash('style')}; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(service: Service, keys: Sequence[bytes] = (), limits: RequestLimits | None = None) -> FastAPI:
    """Return the ASGI application around a service.

    Args:
        service: What computes.
        keys: API keys; without any, every client may ask.
        limits: Size and time of requests.
    """
    app = FastAPI(
        title="polar serve",
        version=__version__,
        description="Rewards of outputs by their closeness to a reference.",
        docs_url=None,  # both pages load scripts from elsewhere
        redoc_url=None,
    )
    app.include_router(_own_routes(service, keyed=bool(keys)), responses=REFUSALS)
    app.include_router(compat_routes.routes(service), responses=REFUSALS)
    app.include_router(_state_routes(service))
    app.add_middleware(Guard, keys=tuple(keys), limits=limits or RequestLimits(), metrics=service.metrics)
    app.add_exception_handler(RefusalError, _refused)
    app.add_exception_handler(InputError, _bad_input)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_exception_handler(Exception, _our_fault)
    return app


def _own_routes(service: Service, *, keyed: bool) -> APIRouter:
    routes = APIRouter(tags=["polar"])

    @routes.post("/v1/rewards", response_model=Rewards, summary="Score candidates of one prompt")
    async def rewards(request: RewardsRequest) -> Response:
        service.require_model(request.model)
        return await score_candidates(service, request)

    @routes.get("/v1/checkpoint", summary="What a client needs of the checkpoint: template, probes and tokenizer")
    async def checkpoint() -> Response:
        checkpoint = service.checkpoint
        return checkpoint.answer(await asyncio.to_thread(checkpoint.description))

    needs_key: dict[int | str, dict[str, Any]] = {403: {"model": ErrorAnswer, "description": "Not without a key"}}

    @routes.post("/v1/reload", summary="Load a checkpoint without dropping a request", responses=needs_key)
    async def reload(request: Request, body: Annotated[ReloadRequest | None, Body()] = None) -> dict[str, object]:
        source = body.model if body else None
        if not keyed and not _is_loopback(request):
            raise RefusalError(403, "loading a checkpoint needs an API key, or a client on the server's own machine")
        if not keyed and source is not None:
            raise RefusalError(403, "loading another checkpoint than the present one needs an API key", "model")
        checkpoint = await service.reload(source)
        return {"status": "loaded", "model": service.name, "source": checkpoint.source, "created": checkpoint.created}

    return routes


def _state_routes(service: Service) -> APIRouter:
    routes = APIRouter(tags=["state"])

    @routes.get("/health", summary="The process is alive")
    async def health() -> Response:
        return Response()

    @routes.get("/ready", summary="Requests are accepted", responses={503: REFUSALS[503]})
    async def ready() -> dict[str, str]:
        if service.draining:
            raise RefusalError(503, "the server is shutting down", headers={"Retry-After": "1"})
        return {"status": "ready"}

    @routes.get("/metrics", summary="Counters for Prometheus")
    async def metrics() -> Response:
        content = await asyncio.to_thread(service.metrics.text)
        return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})

    @routes.get("/v1/models", summary="The model that is served")
    async def models() -> dict[str, object]:
        checkpoint = service.checkpoint
        model = {
            "id": service.name,
            "object": "model",
            "created": checkpoint.created,
            "owned_by": "polar",
            "root": checkpoint.source,
            "max_model_len": checkpoint.max_length,
        }
        return {"object": "list", "data": [model]}

    @routes.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__, "server": "polar"}

    @routes.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(PAGE, headers=PAGE_HEADERS, media_type="text/html")

    return routes


def _is_loopback(request: Request) -> bool:
    try:
        return request.client is not None and ip_address(request.client.host).is_loopback
    except ValueError:
        return False


async def score_candidates(service: Service, request: RewardsRequest) -> Response:
    """Score every candidate against every reference.

    Raises:
        RefusalError: Nothing could be scored, or not in the scale that was asked for.
    """
    # For probabilities the reference is scored as one more candidate: under the same truncation as the others.
    with_it = request.output == "probability"
    count = len(request.candidates) + with_it

    def encode() -> list[EncodedGroup]:
        groups = groups_of(request.prompt, request.all_references, request.candidates, wrapper=request.wrapper)
        return [checkpoint.template.encode_group(with_reference(one) if with_it else one) for one in groups]

    async with service.admit(count * len(request.all_references)) as checkpoint:
        in_scale = _scaling(request, checkpoint)
        groups = await asyncio.to_thread(encode)
        rewards = await service.rewards(checkpoint, groups, lambda number: _place(number % count, request))
    values = [in_scale(row) for row in rewards]
    return checkpoint.answer(_answer(service, request, groups, values))


def _answer(
    service: Service, request: RewardsRequest, groups: Sequence[EncodedGroup], values: Sequence[Sequence[float]]
) -> dict[str, object]:
    candidates = []
    for index, reward in enumerate(aggregated(values, request.aggregate)):
        details = []
        for group, row in zip(groups, values, strict=True):
            cut = group.truncations[index]
            truncation = {"prompt": cut.prompt, "reference": cut.reference, "candidate": cut.output}
            tokens = len(group.prefix) + len(group.branches[index])
            details.append({"reward": row[index], "tokens": tokens, "truncation": truncation})
        candidates.append({"index": index, "reward": reward, "references": details})
    tokens = sum(len(group.prefix) + len(branch) for group in groups for branch in group.branches)
    return {
        "id": request.id or f"rewards-{uuid4().hex}",
        "object": "rewards",
        "created": int(time.time()),
        "model": service.name,
        "output": request.output,
        "rewards": [candidate["reward"] for candidate in candidates],
        "candidates": candidates,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _scaling(request: RewardsRequest, checkpoint: Checkpoint) -> Callable[[Sequence[float]], list[float]]:
    try:
        return scaling(request.output, checkpoint.calibration)
    except InputError as error:
        raise RefusalError(422, f'output: {error}; or ask for "raw" or "probability"', "output") from error


def _place(index: int, request: RewardsRequest) -> str:
    return f"candidates[{index}]" if index < len(request.candidates) else "reference"


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusalError)
    return error.response()


async def _bad_input(request: Request, error: Exception) -> Response:
    return RefusalError(422, str(error)).response()


async def _malformed(request: Request, error: Exception) -> Response:
    """The first mistake that validation found, in one line."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        return RefusalError(422, str(cause), cause.param).response()
    if first["type"] == "json_invalid":
        return RefusalError(422, f"the body is not valid JSON: {cause} at character {first['loc'][-1]}").response()
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:]).lstrip(".")
    return RefusalError(422, f"{place or 'body'}: {first['msg']}", place or None).response()


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    hint = "; GET /openapi.json lists the routes" if error.status_code in (404, 405) else ""
    message = f"{request.method} {request.url.path}: {error.detail}{hint}"
    return RefusalError(error.status_code, message, headers=error.headers).response()


async def _our_fault(request: Request, error: Exception) -> Response:
    return RefusalError(500, "a fault of the server; its log says more").response()
