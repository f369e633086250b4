"""A checkpoint that is loaded under clients that keep their connection."""

import asyncio
from pathlib import Path

import httpx2
import pytest

from polar import AsyncRewardModelClient, Comparison, RewardError, RewardModel
from polar.core.http import CHECKPOINT_HEADER
from polar.serving.app import create_app
from polar.serving.checkpoint import load_checkpoint
from polar.serving.server import bind, serve
from tests.serving.serving import CPU, Stalled, ask, flat, service

COMPARISON = Comparison("2+2?", "It is 4.", "4")
BODY = {"prompt": "2+2?", "reference": "It is 4.", "candidates": ["4"]}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One checkpoint, a copy of it, and one whose rewards are so close that the probes cannot tell them apart."""
    model = RewardModel.load("polar-nano", device="cpu")
    directories = [tmp_path_factory.mktemp("checkpoints") / name for name in ("first", "copy", "other")]
    for directory in directories:
        if directory.name == "other":
            model.model.score.weight.data *= 1.0001
        model.save(directory)
    return list(map(str, directories))


def test_a_client_refuses_another_checkpoint_on_the_connection_it_keeps(checkpoints: list[str]) -> None:
    first, copy, other = checkpoints

    async def run() -> None:
        of = service(load_checkpoint(first, CPU))
        listener = bind("127.0.0.1", 0, protected=False)
        served = asyncio.create_task(serve(create_app(of), of, listener, drain_seconds=2, read_seconds=5))
        try:
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            async with AsyncRewardModelClient(first, server_address=address) as client:
                before = await client.score([COMPARISON])
                await of.reload(copy)
                assert await client.score([COMPARISON]) == before
                (server,) = client._transport.servers
                connected_at = server.connected_at
                await of.reload(other)
                for _ in range(2):
                    with pytest.raises(RewardError, match="loaded another checkpoint .* in place of .* compare"):
                        await client.score([COMPARISON])
                assert server.connected_at == connected_at
                await client.connect()  # proves it anew, and its probes agree
                assert await client.score([COMPARISON]) == pytest.approx(before, rel=1e-3)
        finally:
            served.cancel()
            await asyncio.gather(served, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_every_reward_names_the_checkpoint_that_computed_it(checkpoints: list[str], tmp_path: Path) -> None:
    first, copy, other = (load_checkpoint(source, CPU) for source in checkpoints)
    assert first.identity == copy.identity != other.identity
    requests = {
        "/v1/rewards": BODY,
        "/classify": {"input": flat("2+2?", "It is 4.", "4")},
        "/encode": {"text": flat("2+2?", "It is 4.", "4")},
        "/pooling": {"input": flat("2+2?", "It is 4.", "4")},
        "/get_reward": {"query": ["2+2?4"], "prompts": ["2+2?"], "labels": ["It is 4."]},
    }
    stalled = Stalled()
    of = stalled.service(1000)
    of.checkpoint = first

    async def questions(client: httpx2.AsyncClient) -> list[str]:
        asked = [asyncio.create_task(client.post(path, json=body)) for path, body in requests.items()]
        while stalled.started < len(asked):
            await asyncio.sleep(0.01)
        of.checkpoint = other  # requests that are in flight end with the checkpoint that they began with
        stalled.free.set()
        return [(await one).headers[CHECKPOINT_HEADER] for one in asked]

    assert ask(questions, of) == [first.identity] * len(requests)
