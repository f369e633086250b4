"""A fleet of servers in the place of the model: vLLM, SGLang, LMDeploy or `polar serve` elsewhere.

Balancing, tries and the proof that the servers give the checkpoint's rewards are the client's (`polar.client`). Every
checkpoint that is loaded has a client of its own: a reward is never asked of servers that were proven for another one.
"""

from __future__ import annotations

from collections.abc import Sequence

from polar.client.client import AsyncRewardModelClient
from polar.client.transport import Limits
from polar.core.errors import EngineError, RewardError
from polar.core.template import EncodedGroup
from polar.serving.checkpoint import Checkpoint, Loading, load_template
from polar.serving.errors import RefusalError

DEADLINE = 300.0
"""Seconds that the servers have for one request, with all tries."""


def load_served(source: str, loading: Loading, backends: Sequence[str]) -> Checkpoint:
    """A checkpoint whose rewards servers compute; `Checkpoint.connect` proves them.

    Args:
        source: The checkpoint that the servers serve.
        loading: See `load_template`.
        backends: Addresses as `AsyncRewardModelClient` takes them: `vllm=HOST:PORT,HOST:PORT`.

    Raises:
        InputError: An address or the checkpoint is unusable.
    """
    limits = Limits(timeout=DEADLINE, deadline=DEADLINE)
    return load_template(
        source,
        loading,
        lambda directory: AsyncRewardModelClient(directory, server_address=addresses(backends), limits=limits),
    )


async def score_elsewhere(checkpoint: Checkpoint, groups: Sequence[EncodedGroup]) -> list[list[float]]:
    """Rewards of every branch of every group, in their order.

    Raises:
        RefusalError: The servers did not give all of them.
    """
    assert checkpoint.servers is not None
    try:
        return await checkpoint.servers.score_encoded(groups)
    except (RewardError, EngineError) as error:
        raise RefusalError(502, str(error)) from error


def addresses(backends: Sequence[str]) -> list[str]:
    """One address each; `vllm=a,b` names the engine of both."""
    found = []
    for backend in backends:
        kind = "auto"
        for word in backend.split(","):
            before, equals, after = word.strip().partition("=")
            kind, address = (before, after) if equals else (kind, before)
            found.append(f"{kind}={address}")
    return found
