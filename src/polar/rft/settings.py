"""How rewards are asked for in a run: from arguments of the framework's own config, or from the environment."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from polar.client.engines import ServerType
from polar.core.checkpoint import Scale
from polar.core.errors import InputError
from polar.core.records import Aggregate
from polar.core.template import Compat
from polar.rft.sample import Thinking

PREFIX = "POLAR_REWARD_"
"""Of the environment variables, as in POLAR_REWARD_ADDRESS."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Settings:
    """Where rewards come from and on which scale they are wanted.

    The key of the servers is no setting: it is read from the environment variable POLAR_API_KEY.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    address: str = "127.0.0.1:30000"
    """host:port or a URL of the reward server; several separated by commas."""
    model: str | None = None
    """The checkpoint that is served there: a directory on every machine that asks, or "polar-nano". None: what a
    `polar serve` there says that it has; other servers do not tell."""
    server_type: ServerType = "auto"
    """What serves there; "auto" finds out."""
    compat: Compat | None = None
    """"seed" builds the inputs exactly as the original POLAR client does."""
    scale: Scale = "raw"
    """"zscore" and "probability" use the calibration of the checkpoint (`polar calibrate`)."""
    aggregate: Aggregate = "max"
    """What becomes of the rewards against several references."""
    thinking: Thinking = "strip"
    """"strip": <think> blocks are taken out (`polar.core.text`). "opened": so they are, and the chat template of the
    policy opens the first one itself. "keep": texts are scored as they are."""
    floor: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """The reward of a sample whose reward could not be had, on the scale above; None: that is an error."""
    concurrency: Annotated[int, Field(gt=0)] = 8
    """Requests in flight at each address, per process."""
    timeout: Positive = 300
    """Seconds for one request."""
    deadline: Positive = 1800
    """Seconds until a reward that cannot be had counts as failed; a restart of the server should fit in."""


def read_settings(given: Mapping[str, Any]) -> Settings:
    """The settings of some arguments; what they leave out is looked up in the environment.

    Raises:
        InputError: an argument or variable is unknown or of no use.
    """
    names = [field.name for field in dataclasses.fields(Settings)]
    variables = {name: f"{PREFIX}{name.upper()}" for name in names}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in variables.values())
    if unknown:
        raise InputError(f"environment variable {unknown[0]}: unknown; expected one of {', '.join(variables.values())}")
    values: dict[str, Any] = {
        name: os.environ[variable] for name, variable in variables.items() if os.environ.get(variable)
    }
    values |= {name: value for name, value in given.items() if value is not None}
    if isinstance(address := values.get("address"), Sequence) and not isinstance(address, str):
        values["address"] = ",".join(map(str, address))
    try:
        return TypeAdapter(Settings).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if name not in names:
            raise InputError(f"reward setting {name}: unknown; expected one of {', '.join(names)}") from error
        place = f"reward setting {name}" if name in given else f"environment variable {variables[name]}"
        raise InputError(f"{place}: {first['msg']}, found {first['input']!r}") from error
