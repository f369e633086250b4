"""Reward servers made of recorded JSON, honest ones and others."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from typing import Any

from polar import EncodedGroup, RewardModel
from tests.servers import Reply, Server

__all__ = ["Fake", "Ids", "Reply", "reward"]

Ids = list[int]


def reward(ids: Ids) -> float:
    """The model of these servers: any number between -9 and 3, always the same for the same ids."""
    return zlib.crc32(json.dumps(ids).encode()) % 12_000_000 / 1e6 - 9


def rewards_of(model: RewardModel) -> Callable[[Ids], float]:
    """A real model for these servers."""
    return lambda ids: model.score_encoded([EncodedGroup([], [ids], [])])[0][0]


def sigmoid(ids: Ids) -> float:
    return 1 / (1 + math.exp(-reward(ids)))


def vllm(sequences: list[Ids], model: Callable[[Ids], Any] = reward) -> dict[str, Any]:
    data = [
        {"index": n, "label": "LABEL_0", "probs": [model(ids)], "num_classes": 1} for n, ids in enumerate(sequences)
    ]
    return {"id": "classify-83a5", "object": "list", "created": 1795324641, "model": "tiny", "data": data, "usage": {}}


def vllm_pooling(sequences: list[Ids], model: Callable[[Ids], Any] = reward) -> dict[str, Any]:
    data = [{"index": n, "object": "pooling", "data": [model(ids)]} for n, ids in enumerate(sequences)]
    return {"id": "pooling-a543", "object": "list", "data": data, "usage": {}}


def vllm_every_token(sequences: list[Ids], model: Callable[[Ids], Any] = reward) -> dict[str, Any]:
    data = [
        {"index": n, "object": "pooling", "data": [*([0.1] for _ in ids[1:]), [model(ids)]]}
        for n, ids in enumerate(sequences)
    ]
    return {"id": "pooling-a543", "object": "list", "data": data, "usage": {}}


def sglang(sequences: list[Ids], model: Callable[[Ids], Any] = reward) -> Any:
    items = [{"embedding": [model(ids)], "meta_info": {"id": "45a5", "prompt_tokens": len(ids)}} for ids in sequences]
    return items if len(items) > 1 else items[0]


def embeddings(sequences: list[Ids], model: Callable[[Ids], Any] = reward) -> dict[str, Any]:
    data = [{"embedding": [model(ids)], "index": n, "object": "embedding"} for n, ids in enumerate(sequences)]
    return {"data": data, "model": "default", "object": "list", "usage": {}}


def lmdeploy(sequences: list[Ids], model: Callable[[Ids], Any] = reward) -> dict[str, Any]:
    data = [{"index": n, "object": "pooling", "data": model(ids)} for n, ids in enumerate(sequences)]
    return {"id": "pool-1", "object": "list", "data": data, "usage": {}}


def too_long(limit: int = 2048) -> dict[str, Any]:
    text = f"This model's maximum context length is {limit} tokens. (parameter=input_tokens, value={limit + 1})"
    return {"error": {"message": text, "type": "BadRequestError", "param": "input_tokens", "code": 400}}


ROUTES: dict[str, dict[str, Callable[..., Any]]] = {
    "vllm": {"/classify": vllm, "/pooling": vllm_pooling},
    "vllm-pooling": {"/pooling": vllm_every_token},
    "sglang": {"/classify": sglang, "/v1/embeddings": embeddings},
    "sglang-embeddings": {"/v1/embeddings": embeddings},
    "lmdeploy": {"/pooling": lmdeploy},
    "polar": {"/classify": vllm},
}


Script = Callable[[int, str, list[Ids]], "Reply | None"]
"""From the number of the request, counted from 0, its path and its inputs to the reply; None for the honest one."""


class Fake(Server):
    """A reward server.

    Args:
        kind: Which engine it is.
        script: Replies to use in place of the honest ones.
        says_so: Whether `/v1/models` tells the engine.
        model: Its rewards.
        port: Default: a free one.
    """

    def __init__(
        self,
        kind: str = "vllm",
        script: Script | None = None,
        says_so: bool = True,
        model: Callable[[Ids], Any] = reward,
        port: int = 0,
    ) -> None:
        super().__init__(port=port)
        self.kind, self.replies, self.says_so, self.model = kind, script, says_so, model

    @property
    def batches(self) -> list[list[Ids]]:
        """Inputs of the requests, in their order; the first one holds the probes."""
        return [inputs(body) for body in self.bodies]

    def post(self, number: int, path: str, body: dict[str, Any]) -> Reply:
        reply = (self.replies(number, path, inputs(body)) if self.replies else None) or Reply()
        if reply.status == 200 and reply.body is None:
            route = ROUTES[self.kind].get(path)
            reply.status = 200 if route else 404
            reply.body = route(inputs(body), self.model) if route else {"detail": "Not Found"}
        return reply

    def get(self, path: str) -> Reply:
        family = self.kind.partition("-")[0]
        if path == "/v1/models" and self.says_so:
            return Reply(body={"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": family}]})
        if path == "/get_model_info" and family == "sglang":
            return Reply(body={"model_path": "tiny", "is_generation": False})
        if path == "/version" and family == "vllm":
            return Reply(body={"version": "0.32.0"})
        return super().get(path)


def inputs(body: dict[str, Any]) -> list[Ids]:
    found: list[Ids] = body.get("input_ids", body.get("input"))
    return found
