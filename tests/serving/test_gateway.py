import asyncio
import socket
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from polar import Comparison, InputError, Template
from polar.core.checkpoint import Probe
from polar.core.errors import EngineError
from polar.serving.app import create_app
from polar.serving.checkpoint import Checkpoint, addresses, load_served
from polar.serving.errors import RefusalError
from polar.serving.metrics import Metrics
from polar.serving.server import bind, serve
from polar.serving.service import Service, score_elsewhere
from tests.serving.serving import CPU, ask, flat, service

Result = TypeVar("Result")
BODY = {"prompt": "2+2?", "reference": "It is 4.", "candidates": ["4", "It is 4.", "five"]}
TEXTS = flat("2+2?", "It is 4.", "4", "five")


def behind(
    questions: Callable[[httpx2.AsyncClient, Service], Coroutine[Any, Any, Result]], kind: str, app: Any = None
) -> Result:
    """Run questions to a gateway before one server."""

    async def run() -> Result:
        of = service()
        listener = bind("127.0.0.1", 0, protected=False)
        backend = asyncio.create_task(serve(app or create_app(of), of, listener, drain_seconds=2, read_seconds=5))
        address = f"{kind}=127.0.0.1:{listener.getsockname()[1]}"

        def load(source: str) -> Checkpoint:
            return load_served(source, CPU, [address])

        front = Service("polar-nano", load("polar-nano"), load, score_elsewhere, Metrics(), 100)
        transport = httpx2.ASGITransport(app=create_app(front))
        async with httpx2.AsyncClient(transport=transport, base_url="http://gateway", timeout=60) as client:
            try:
                return await questions(client, front)
            finally:
                backend.cancel()
                await asyncio.gather(backend, return_exceptions=True)

    return asyncio.run(run())


@pytest.mark.parametrize("kind", ["auto", "polar", "vllm", "vllm-pooling", "sglang", "lmdeploy"])
def test_every_route_gives_the_rewards_of_the_servers_behind(kind: str) -> None:
    async def directly(client: httpx2.AsyncClient) -> list[httpx2.Response]:
        return [
            await client.post("/v1/rewards", json=BODY),
            await client.post("/classify", json={"text": TEXTS}),
            await client.post("/get_reward", json={"query": ["2+2?4"], "prompts": ["2+2?"], "labels": ["It is 4."]}),
        ]

    async def questions(client: httpx2.AsyncClient, front: Service) -> list[httpx2.Response]:
        await front.checkpoint.connect()
        return await directly(client)

    rewards, classes, openrlhf = (answer.json() for answer in behind(questions, kind))
    expected = [answer.json() for answer in ask(directly)]
    assert rewards["rewards"] == pytest.approx(expected[0]["rewards"], abs=1e-5)
    assert [item["embedding"] for item in classes] == [
        pytest.approx(item["embedding"], abs=1e-5) for item in expected[1]
    ]
    assert openrlhf["rewards"] == pytest.approx(expected[2]["rewards"], abs=1e-5)


def test_servers_that_give_other_rewards_are_refused() -> None:
    async def sigmoid(scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        inputs = (await request.json())["input"] if request.method == "POST" else []
        data = [{"index": index, "probs": [0.5]} for index in range(len(inputs))]
        response: Response = JSONResponse({"data": data})
        await response(scope, receive, send)

    async def questions(client: httpx2.AsyncClient, front: Service) -> httpx2.Response:
        with pytest.raises(EngineError):
            await front.checkpoint.connect()
        return await client.post("/v1/rewards", json=BODY)

    answer = behind(questions, "vllm", sigmoid)
    assert (answer.status_code, answer.json()["error"]["type"]) == (502, "BadGatewayError")


def test_no_server_at_all_shows_at_the_start() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        checkpoint = load_served("polar-nano", CPU, [f"vllm=127.0.0.1:{nobody.getsockname()[1]}"])
        with pytest.raises(InputError, match="no server answers"):
            asyncio.run(checkpoint.connect())


class Lengths:
    """A server whose weights can change: it answers the length of an input, times a factor."""

    def __init__(self) -> None:
        self.factor = 1.0
        self.free = asyncio.Event()
        self.free.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        inputs = (await Request(scope, receive).json())["input"]
        await self.free.wait()
        data = [{"index": index, "probs": [self.factor * len(ids)]} for index, ids in enumerate(inputs)]
        await JSONResponse({"data": data})(scope, receive, send)


def checkpoint_of_lengths(directory: Path, template: Template, factor: float) -> str:
    inputs = [template.encode(Comparison("1?", "one", output)).sequences()[0] for output in ("a", "b c d", "e f")]
    probes = [Probe(ids, "", factor * len(ids), factor * (len(ids) - 1), None) for ids in inputs]
    template.save(directory, probes=[asdict(probe) for probe in probes])
    return str(directory)


def test_another_checkpoint_is_loaded_only_if_the_servers_have_it(tmp_path: Path, template: Template) -> None:
    first, second = (
        checkpoint_of_lengths(tmp_path / name, template, factor) for name, factor in (("first", 1), ("second", 3))
    )
    app = Lengths()

    async def questions(client: httpx2.AsyncClient, front: Service) -> None:
        async def rewards() -> list[float]:
            return (await client.post("/v1/rewards", json=BODY)).json()["rewards"]

        await front.reload(first)
        before, lengths = front.checkpoint, await rewards()
        with pytest.raises(RefusalError, match="another model than .*present checkpoint stays"):
            await front.reload(second)
        assert (front.checkpoint, await rewards()) == (before, lengths)
        app.factor = 3
        await front.reload(second)
        assert await rewards() == [3 * length for length in lengths]
        checkpoint_of_lengths(tmp_path / "second", template, 5)
        with pytest.raises(RefusalError, match="another model than"):
            await front.reload()  # the same place, other weights

    behind(questions, "vllm", app)


def test_a_request_ends_with_the_servers_of_its_checkpoint(tmp_path: Path, template: Template) -> None:
    source = checkpoint_of_lengths(tmp_path / "model", template, 1)
    app = Lengths()

    async def questions(client: httpx2.AsyncClient, front: Service) -> None:
        await front.reload(source)
        before = front.checkpoint.servers
        assert before is not None
        (server,) = before._transport.servers
        app.free.clear()
        request = asyncio.create_task(client.post("/v1/rewards", json=BODY))
        while not server.in_flight:
            await asyncio.sleep(0.01)
        reload = asyncio.create_task(front.reload())
        await asyncio.sleep(0.1)
        app.free.set()
        await reload
        assert (await request).status_code == 200
        assert server.endpoint._http.is_closed
        assert front.checkpoint.servers is not before
        assert (await client.post("/v1/rewards", json=BODY)).status_code == 200
        assert front.idle

    behind(questions, "vllm", app)


def test_one_engine_may_stand_before_several_addresses() -> None:
    assert addresses(["vllm=a:1,b:2", "c:3", "sglang=d:4,polar=e:5,f:6"]) == [
        "vllm=a:1",
        "vllm=b:2",
        "auto=c:3",
        "sglang=d:4",
        "polar=e:5",
        "polar=f:6",
    ]
