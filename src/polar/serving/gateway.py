"""A fleet of servers in the place of the model: vLLM, SGLang, LMDeploy or `polar serve` elsewhere.

Balancing, tries and the proof that the servers give this checkpoint's rewards are the client's (`polar.client`).
"""

from __future__ import annotations

from collections.abc import Sequence

from polar.client.client import AsyncRewardModelClient
from polar.client.errors import EngineError, RewardError
from polar.client.servers import Limits
from polar.serving.checkpoint import Checkpoint
from polar.serving.refusal import RefusalError
from polar.template import EncodedGroup

DEADLINE = 300.0
"""Seconds that the servers have for one request, with all tries."""


class Gateway:
    """Scores elsewhere.

    Args:
        source: The checkpoint that the servers serve.
        backends: Addresses as `AsyncRewardModelClient` takes them: `vllm=HOST:PORT,HOST:PORT`.

    Raises:
        InputError: An address or the checkpoint is unusable.
    """

    def __init__(self, source: str, backends: Sequence[str]) -> None:
        limits = Limits(timeout=DEADLINE, deadline=DEADLINE)
        self._client = AsyncRewardModelClient(source, server_address=addresses(backends), limits=limits)

    async def connect(self) -> None:
        """Prove the servers before the first request.

        Raises:
            EngineError: One gives other rewards, or none can be reached.
        """
        await self._client.connect()

    async def score(self, checkpoint: Checkpoint, groups: Sequence[EncodedGroup]) -> list[list[float]]:
        """Rewards of every branch of every group, in their order.

        Raises:
            RefusalError: The servers did not give all of them.
        """
        try:
            return await self._client.score_encoded(groups)
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
