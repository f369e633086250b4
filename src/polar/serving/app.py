"""The application: our own routes, what is asked about a server, and one shape for all errors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Annotated, Any

from fastapi import APIRouter, Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from polar.core.errors import InputError
from polar.core.version import __version__
from polar.serving import compat_routes, page
from polar.serving.errors import RefusalError
from polar.serving.middleware import Guard, Limits
from polar.serving.rewards import Rewards, score_candidates
from polar.serving.schemas import FieldError, ReloadRequest, RewardsRequest
from polar.serving.service import Service


class ErrorDetail(BaseModel):
    """Why a request was refused."""

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


def create_app(service: Service, keys: Sequence[bytes] = (), limits: Limits | None = None) -> FastAPI:
    """The ASGI application around a service.

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
    app.add_middleware(Guard, keys=tuple(keys), limits=limits or Limits(), metrics=service.metrics)
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
        return Response(page.HTML, headers=page.HEADERS, media_type="text/html")

    return routes


def _is_loopback(request: Request) -> bool:
    try:
        return request.client is not None and ip_address(request.client.host).is_loopback
    except ValueError:
        return False


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
    return RefusalError(500, "a fault of the server; its log tells more").response()
