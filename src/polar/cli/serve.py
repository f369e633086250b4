"""`polar serve`: rewards over HTTP."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

from polar.core.checkpoint import BUNDLED_NAME
from polar.core.errors import InputError
from polar.core.template import Compat


def serve(
    model: str = BUNDLED_NAME,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 30000,
    backend: Annotated[Sequence[str], Parameter(negative="")] = (),
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
        max_queue: Inputs that may be in flight; further requests get 429 and are told when to come back.
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
