"""The wire formats of serving engines: what is asked, and which answers are rewards.

All are asked with token ids, so that no engine's tokenizer can add or cut anything. An answer is a reward only if it is
one finite number; everything else becomes a reason.

- vllm: `/classify` of vLLM. `use_activation: false` asks for the raw score; older releases ignore it and answer its
  sigmoid unless config.json has problem_type regression.
- vllm-pooling: `/pooling` of vLLM, also where the server pools every token (`task: token_classify`).
- sglang: `/classify` of SGLang with `--is-embedding`. Its other route `/v1/classify` answers a softmax over the one
  label, which is always 1.
- sglang-embeddings: `/v1/embeddings` of SGLang, where a router has no `/classify`.
- lmdeploy: `/pooling` of LMDeploy.
- polar: our own server, which speaks vLLM's `/classify`.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from polar.core.errors import EngineError

ServerType = Literal["auto", "polar", "vllm", "vllm-pooling", "sglang", "sglang-embeddings", "lmdeploy"]

Answer = float | str
"""A reward, or why there is none."""


class NonsenseError(Exception):
    """A reply that does not follow the engine's format, so that no part of it can be trusted."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One way to ask an engine for rewards."""

    path: str
    answer: str
    """The field of an item that holds its reward."""
    ids: str = "input"
    """The field of the request that takes lists of token ids."""
    more: Mapping[str, object] = field(default_factory=dict)

    def body(self, sequences: Sequence[list[int]]) -> dict[str, object]:
        """The request for some inputs."""
        return {**self.more, self.ids: sequences}

    def read(self, reply: Any, sequences: Sequence[list[int]]) -> list[Answer]:
        """The answers to these inputs, in their order.

        Raises:
            NonsenseError: the number of answers is wrong, they are out of order, or it is no such reply at all.
        """
        items = reply.get("data", reply) if isinstance(reply, dict) else reply
        if isinstance(items, dict):  # SGLang's form of a single answer
            items = [items]
        if not isinstance(items, list) or not all(isinstance(item, dict) and self.answer in item for item in items):
            raise NonsenseError(f'not an answer of {self.path}: expected a list of items with "{self.answer}"')
        if len(items) != len(sequences):
            raise NonsenseError(f"{len(items)} answers to {len(sequences)} inputs")
        for place, item in enumerate(items):
            if item.get("index", place) != place:
                raise NonsenseError(f"answers out of order: index {item['index']} at place {place}")
        return [_reward(item[self.answer], len(ids)) for item, ids in zip(items, sequences, strict=True)]


ENGINES: dict[str, Engine] = {
    "polar": Engine("/classify", "probs", more={"use_activation": False}),
    "vllm": Engine("/classify", "probs", more={"use_activation": False}),
    "vllm-pooling": Engine("/pooling", "data", more={"use_activation": False}),
    "sglang": Engine("/classify", "embedding", ids="input_ids"),
    "sglang-embeddings": Engine("/v1/embeddings", "embedding", more={"model": "default"}),
    "lmdeploy": Engine("/pooling", "data"),
}

FAMILIES: dict[str, list[Engine]] = {
    "polar": [ENGINES["polar"]],
    "vllm": [ENGINES["vllm"], ENGINES["vllm-pooling"]],
    "sglang": [ENGINES["sglang"], ENGINES["sglang-embeddings"]],
    "lmdeploy": [ENGINES["lmdeploy"]],
}
"""Engines to try at a server that says who it is (`owned_by` in `/v1/models`), best first."""


async def ways_to_ask(server_type: ServerType, get: Callable[[str], Awaitable[Any]]) -> list[Engine]:
    """The engines to try at a server, best first.

    Args:
        server_type: The user's choice; "auto" finds out.
        get: Fetches the JSON at a path of the server; None where it has no such path.

    Raises:
        EngineError: the server does not tell what it is.
    """
    if server_type != "auto":
        return [ENGINES[server_type]]
    match await get("/v1/models"):
        case {"data": [{"owned_by": str(owner)}, *_]} if owner in FAMILIES:
            return FAMILIES[owner]
    match await get("/get_model_info"):
        case {"is_generation": _}:
            return FAMILIES["sglang"]
    match await get("/version"):
        case {"version": _}:
            return FAMILIES["vllm"]
    raise EngineError(f"the server does not tell which engine it is; give its type: {', '.join(ENGINES)}")


def _reward(answer: Any, tokens: int) -> Answer:
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    elif isinstance(answer, list) and len(answer) == tokens and all(_is_single(item) for item in answer):
        answer = answer[-1][0]  # one score per token: the last one counts
    if isinstance(answer, list):
        return f"the server answers a vector of {len(answer)} values, not a reward"
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        return f"the server answers {str(answer)[:40]!r}, not a number"
    try:
        reward = float(answer)
    except OverflowError:
        reward = math.inf
    return reward if math.isfinite(reward) else f"the server answers {reward}"


def _is_single(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 1
