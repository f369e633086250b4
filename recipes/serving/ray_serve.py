"""Many replicas of our own server on the machines of a Ray cluster; README.md beside this file says how to start it.

Ray reads the class of the settings from the annotation of `build`, so annotations are not postponed here.
"""

import os

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, PositiveInt
from ray import serve

from polar.core.checkpoint import BUNDLED_NAME
from polar.core.errors import InputError
from polar.serving import Loading, create_server, parse_keys
from polar.serving.checkpoint import Checkpoint

KEYS = "POLAR_API_KEYS"


class Settings(BaseModel):
    """What `serve run ray_serve:build` takes as NAME=VALUE."""

    model_config = ConfigDict(extra="forbid")

    model: str = BUNDLED_NAME
    """A hub name, or a directory by its whole path, which every machine has."""
    replicas: PositiveInt = 2
    gpus: float = 0
    """Of one replica."""
    cpus: float = 1
    """Of one replica; it computes with so many threads."""
    dtype: str | None = None
    """Default: bfloat16 on a GPU, float32 on a CPU."""
    batch_tokens: PositiveInt = 16384
    """Tokens of one forward pass; 4096 is better on a CPU."""
    max_requests: PositiveInt = 64
    """At one replica at a time."""
    max_waiting: PositiveInt = 1024
    """Requests that wait for a replica, on each machine; further ones get 503 and are tried again by our client."""


def build(settings: Settings) -> serve.Application:
    """The deployment. API keys are read where it is built, so that replicas elsewhere need no environment."""
    keys = parse_keys(os.environ.get(KEYS, ""), KEYS)

    def replica() -> FastAPI:
        server = create_server(
            settings.model, keys=keys, loading=Loading(dtype=settings.dtype), batch_tokens=settings.batch_tokens
        )
        server.service.load = _refuse_reload
        return server.app

    deployment = serve.deployment(serve.ingress(replica)()).options(
        name="polar",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_requests,
        max_queued_requests=settings.max_waiting,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )
    return deployment.bind()


def _refuse_reload(source: str) -> Checkpoint:
    raise InputError(f"{source}: replicas change their checkpoint together, by another `serve run`")
