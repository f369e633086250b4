"""The model that a command asks for rewards: in this process, or on servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from polar.client.engines import ServerType
from polar.client.sync import RewardModelClient
from polar.core.checkpoint import Calibration, read_calibration, served_directory
from polar.core.errors import InputError, RewardError
from polar.core.template import Compat, Template
from polar.model.reward_model import RewardModel


@dataclass(frozen=True, slots=True)
class Model:
    """What a command needs of a reward model."""

    template: Template
    calibration: Calibration | None
    score_encoded: Callable[..., list[list[float]]]
    """As in `RewardModel`, with the arguments groups and progress."""
    local: RewardModel | None
    """None where servers have it."""


@contextmanager
def open_model(
    name: str,
    *,
    server_address: str | None,
    engine: ServerType,
    device: str | None,
    dtype: str | None,
    max_length: int | None = None,
    max_response_length: int | None = None,
    batch_tokens: int | None = None,
    compat: Compat | None = None,
) -> Iterator[Model]:
    """Load a model, or connect to the servers that have it.

    Raises:
        InputError: it cannot be had, or a reward could not be had from its servers.
    """
    if batch_tokens is not None and batch_tokens < 1:
        raise InputError(f"batch_tokens must be at least 1, found {batch_tokens}")
    if server_address is None:
        if engine != "auto":
            raise InputError("--engine says what serves at --server-address: give both")
        model = RewardModel.load(name, device=device, dtype=dtype, compat=compat)
        template = model.template = model.template.with_lengths(max_length, max_response_length)
        yield Model(template, model.calibration, partial(model.score_encoded, batch_tokens=batch_tokens), model)
        return
    if device is not None or dtype is not None or batch_tokens is not None:
        raise InputError("device, dtype and batch_tokens are the server's own: leave those flags out")
    calibration = read_calibration(served_directory(name))
    with RewardModelClient(
        name,
        max_length,
        max_response_length,
        server_address=server_address,
        server_type=engine,
        compat=compat,
    ) as client:
        client.connect()
        try:
            yield Model(client.template, calibration, client.score_encoded, None)
        except RewardError as error:
            raise InputError(f"{server_address}: {error}") from error
