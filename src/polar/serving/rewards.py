"""`POST /v1/rewards`: the parts of an input go in, and rewards come out in the scale that was asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from uuid import uuid4

from pydantic import BaseModel
from starlette.responses import Response

from polar.core.errors import InputError
from polar.core.references import aggregated, groups_of
from polar.core.template import EncodedGroup
from polar.model.calibration import scaling, with_reference
from polar.serving.checkpoint import Checkpoint
from polar.serving.errors import RefusalError
from polar.serving.schemas import RewardsRequest
from polar.serving.service import Service


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
