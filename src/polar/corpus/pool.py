"""The pool of policies: `pool.yaml`, typed and checked.

    policies:
      - name: qwen3-0.6b-base
        kind: base
        family: qwen3
        engine: {type: transformers, model: Qwen/Qwen3-0.6B-Base}
      - name: llama-3.1-8b-instruct
        kind: chat
        family: llama
        engine: {type: http, base_url: "http://127.0.0.1:8000/v1", model: meta-llama/Llama-3.1-8B-Instruct}
        decoding: {max_tokens: 2048}

A file never holds a key: `api_key_env` names the environment variable that does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from polar.core.errors import InputError, first_mistake
from polar.core.records import Wrapper

Kind = Literal["base", "chat"]
WRAPPERS: dict[Kind, Wrapper] = {"base": "pretrain", "chat": "sft"}
"""A base policy continues a document, so its output follows the prompt without a newline."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Decoding(_Settings):
    """Sampling parameters; the defaults are the paper's (D.1.1)."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=0.9, gt=0, le=1)
    top_k: int | None = Field(default=50, ge=1)
    """None is not sent: some commercial endpoints refuse the parameter."""
    max_tokens: int = Field(default=4096, ge=1)


class TransformersEngine(_Settings):
    """Hugging Face transformers in this process."""

    type: Literal["transformers"]
    model: str
    """Directory or hub name."""
    batch_size: int = Field(default=16, ge=1)
    """Samples of one `generate` call. Rounding depends on it, so another batch size may give another corpus."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    """Default: a GPU if there is one."""


class VllmEngine(_Settings):
    """vLLM in this process."""

    type: Literal["vllm"]
    model: str
    batch_size: int = Field(default=256, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tensor_parallel_size: int = Field(default=1, ge=1)
    max_model_len: int | None = Field(default=None, ge=1)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)


class HttpEngine(_Settings):
    """Any OpenAI-compatible server: vLLM, SGLang, LMDeploy, transformers serve, commercial ones."""

    type: Literal["http"]
    base_url: str
    """With its version, as in "http://127.0.0.1:8000/v1"."""
    model: str
    api_key_env: str | None = None
    """Environment variable that holds the key."""
    batch_size: int = Field(default=32, ge=1)
    """Samples that are saved together."""
    concurrency: int = Field(default=64, ge=1)
    """Requests in flight."""
    timeout: float = Field(default=300, gt=0)
    """Seconds for one request."""
    deadline: float = Field(default=600, gt=0)
    """Seconds of trying again before a sample, or a silent endpoint, is given up."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request, such as chat_template_kwargs."""

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:  # raises beyond 65535
            raise ValueError("expected an address such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("expected no user, password or query in the address; name a variable with api_key_env")
        return url.rstrip("/")

    @field_validator("extra_body")
    @classmethod
    def _leaves_the_request_as_it_is(cls, extra: dict[str, Any]) -> dict[str, Any]:
        own = {"model", "prompt", "messages", "seed", "n", "stream"}
        # A decoding field may be null, for servers that refuse it, but not another value than the one that is recorded.
        own |= {name for name in Decoding.model_fields if extra.get(name) is not None}
        if mistaken := own & extra.keys():
            raise ValueError(f"expected further fields of the request, found {', '.join(sorted(mistaken))}")
        return extra


Engine = Annotated[TransformersEngine | VllmEngine | HttpEngine, Field(discriminator="type")]


class Policy(_Settings):
    """One policy of the pool."""

    name: str = Field(min_length=1)
    kind: Kind
    """"base" continues text prefixes, "chat" answers instruction prompts through its chat template."""
    engine: Engine
    family: str | None = None
    step: int | None = Field(default=None, ge=0)
    """Training step, for one of several checkpoints of a run."""
    weight: float = Field(default=1.0, gt=0)
    """How often the policy is drawn, relative to the others."""
    system: str | None = None
    """System message before every prompt of a chat policy."""
    decoding: Decoding = Decoding()

    @model_validator(mode="after")
    def _has_a_place_for_its_system_message(self) -> Policy:
        if self.system is not None and self.kind == "base":
            raise ValueError("a base policy takes no system message")
        return self

    @property
    def wrapper(self) -> Wrapper:
        """How its outputs follow their prompts."""
        return WRAPPERS[self.kind]

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide which texts it gives, not those of place and speed."""
        settings = self.model_dump(mode="json")
        for name in ("base_url", "api_key_env", "concurrency", "timeout", "deadline", "device", *_PLACEMENT):
            settings["engine"].pop(name, None)
        return settings


_PLACEMENT = ("tensor_parallel_size", "gpu_memory_utilization")


class Pool(_Settings):
    """All policies."""

    policies: tuple[Policy, ...] = Field(min_length=1)

    @field_validator("policies")
    @classmethod
    def _have_different_names(cls, policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
        names = [policy.name for policy in policies]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"expected different names, found {name!r} twice")
        return policies

    def of_kind(self, wrapper: Wrapper) -> tuple[Policy, ...]:
        """The policies that take prompts of this wrapper."""
        return tuple(policy for policy in self.policies if policy.wrapper == wrapper)


def draw(policies: tuple[Policy, ...], count: int, random: Random) -> list[Policy]:
    """Draw different policies with probability proportional to weight, one after the other.

    Exponential keys (Efraimidis and Spirakis 2006): one random number per policy, whatever the weights.
    """
    keys = {policy.name: random.expovariate(1) / policy.weight for policy in policies}
    return sorted(policies, key=lambda policy: keys[policy.name])[:count]


def read_pool(source: str | Path | Mapping[str, Any] | Pool) -> Pool:
    """Return a checked pool from its file, or from the same content in memory.

    Raises:
        InputError: the file is missing, not YAML, or not a pool; or a key it names is not in the environment.
    """
    place = source if isinstance(source, str | Path) else "pool"
    pool = (
        source if isinstance(source, Pool) else _parse(place, source if isinstance(source, Mapping) else _load(place))
    )
    for policy in pool.policies:
        variable = policy.engine.api_key_env if isinstance(policy.engine, HttpEngine) else None
        if variable is not None and not os.environ.get(variable):
            raise InputError(f"{place}: policy {policy.name!r}: the environment variable {variable} is not set")
    return pool


def _load(path: str | Path) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as a pool of policies: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: expected YAML: {' '.join(str(error).split())}") from error


def _parse(place: str | Path, content: Any) -> Pool:
    if not isinstance(content, Mapping):
        raise InputError(f"{place}: expected a list of policies under the name policies (see polar sample --help)")
    try:
        return Pool.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{place}: {first_mistake(error)}") from error
