"""`polar serve` as a process, with sockets and signals."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from polar import AsyncRewardModelClient, Comparison, RewardModel, Template
from polar.cli.main import main
from polar.client.transport import Limits
from polar.serving.app import create_app
from polar.serving.server import bind, create_server, serve
from tests.conftest import build_model
from tests.serving.serving import CPU, JSON, Process, Stalled, flat, serving

TEXTS = flat("How much is it?", "It is 4.", *(f"answer number {number}" for number in range(400)))
POST = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = {"prompt": "2+2?", "reference": "It is 4.", "candidates": ["4", "five"]}


@pytest.fixture(scope="module")
def current(tmp_path_factory: pytest.TempPathFactory, template: Template) -> Path:
    """A link to the checkpoint "first", beside "second" and "broken"."""
    directory = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(["first", "second"]):
        build_model("llama", template, seed).save(directory / name)
    (directory / "broken").mkdir()
    (directory / "current").symlink_to("first")
    return directory / "current"


@pytest.fixture(scope="module")
def process(current: Path) -> Iterator[Process]:
    with serving("--read-seconds", "1", "--name", "reward", "--max-queue", "100000", model=current) as found:
        yield found


def connect(process: Process) -> socket.socket:
    return socket.create_connection(("127.0.0.1", process.port), timeout=20)


def received(connection: socket.socket) -> bytes:
    """All bytes until the server closes the connection."""
    content = b""
    try:
        while chunk := connection.recv(1 << 16):
            content += chunk
    except ConnectionResetError:
        pass
    return content


def start_scoring(process: Process, texts: list[str]) -> "Future[httpx2.Response]":
    """A large request that is being computed when this returns."""
    pool = ThreadPoolExecutor(1)
    answer = pool.submit(httpx2.post, f"{process.url}/classify", json={"input": texts}, timeout=120)
    pool.shutdown(wait=False)
    while not in_flight(process):
        time.sleep(0.01)
    return answer


def in_flight(process: Process) -> int:
    metrics = httpx2.get(f"{process.url}/metrics").text
    return int(
        float(next(line for line in metrics.splitlines() if line.startswith("polar_inputs_in_flight")).split()[1])
    )


def test_slow_clients_are_cut_off_and_do_not_keep_others_waiting(process: Process) -> None:
    quiet, headers, body = (connect(process) for _ in range(3))
    headers.sendall(POST + b"X-Slow: ")
    body.sendall(POST + b"Content-Length: 100\r\n\r\n{")
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.2):
            try:
                headers.sendall(b"a")
                body.sendall(b" ")
            except OSError:
                return

    dripping = threading.Thread(target=drip)
    dripping.start()
    assert httpx2.post(f"{process.url}/v1/rewards", json=BODY).status_code == 200
    assert received(quiet) == received(headers) == b""
    answer = received(body)
    stop.set()
    dripping.join()
    assert answer.startswith(b"HTTP/1.1 408")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "RequestTimeoutError"


def test_a_large_body_is_refused_in_json_though_the_client_sends_it_all(process: Process) -> None:
    for content in (b" " * 50_000_000, (b" " * 1_000_000 for _ in range(50))):
        answer = httpx2.post(f"{process.url}/v1/rewards", content=content, headers=JSON, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, 413)
    resident = Path(f"/proc/{process.popen.pid}/status")
    if resident.exists():
        (kilobytes,) = [line.split()[1] for line in resident.read_text().splitlines() if line.startswith("VmHWM")]
        assert int(kilobytes) < 2_000_000
    assert httpx2.post(f"{process.url}/v1/rewards", json=BODY).status_code == 200


def test_a_body_without_an_end_is_cut_off(process: Process) -> None:
    connection = connect(process)
    connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    sent = 0
    try:
        while sent < 2000:
            connection.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
            sent += 1
            time.sleep(0.01)
    except OSError:
        pass
    assert sent < 2000


def test_what_a_client_that_left_had_asked_for_is_not_computed(process: Process) -> None:
    connection = connect(process)
    content = json.dumps({"input": TEXTS * 10}).encode()
    connection.sendall(POST + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    while not in_flight(process):
        time.sleep(0.01)
    connection.close()
    end = time.monotonic() + 10
    while in_flight(process) and time.monotonic() < end:
        time.sleep(0.05)
    assert in_flight(process) == 0


def test_after_the_drain_seconds_the_server_ends_anyway(caplog: pytest.LogCaptureFixture) -> None:
    stalled = Stalled()
    of = stalled.service(max_queue=10)

    async def run() -> float:
        listener = bind("127.0.0.1", 0, protected=False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/rewards"
        running = asyncio.create_task(serve(create_app(of), of, listener, drain_seconds=1.5, read_seconds=5))
        async with httpx2.AsyncClient() as client:
            while not stalled.started:
                await asyncio.sleep(0.05)
                request = asyncio.create_task(client.post(url, json=BODY))
            start = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
            await running
            assert isinstance(
                (await asyncio.gather(request, return_exceptions=True))[0], httpx2.TransportError | httpx2.Response
            )
            return time.monotonic() - start

    assert asyncio.run(run()) < 10
    assert "given up after 1.5 s" in caplog.text


def test_a_server_runs_in_a_thread_of_another_program() -> None:
    server = create_server("polar-nano", loading=CPU, keys=[b"a-key"], name="reward")
    listener = bind("127.0.0.1", 0, protected=False)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    loop = asyncio.new_event_loop()
    with ThreadPoolExecutor(1) as pool:
        running = loop.create_task(server.serve(listener, drain_seconds=2))
        finished = pool.submit(loop.run_until_complete, asyncio.wait([running], timeout=120))
        try:
            for _ in range(100):
                with suppress(httpx2.TransportError):
                    answer = httpx2.post(f"{url}/v1/rewards", json=BODY, headers={"X-API-Key": "a-key"}, timeout=60)
                    break
                time.sleep(0.1)
            refused = httpx2.post(f"{url}/v1/rewards", json=BODY)
        finally:
            loop.call_soon_threadsafe(running.cancel)
        finished.result(60)
    assert (answer.status_code, answer.json()["model"], refused.status_code) == (200, "reward", 401)


def test_a_port_is_free_again_at_once() -> None:
    with bind("127.0.0.1", 0, protected=False) as listener:
        listener.listen()
        address = listener.getsockname()
        with socket.create_connection(address), listener.accept()[0]:
            pass
    bind("127.0.0.1", address[1], protected=False).close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_public_address_needs_a_key(host: str, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.delenv("POLAR_API_KEYS", raising=False)
    assert main(["serve", "--host", host, "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert "POLAR_API_KEYS" in error
    assert "--allow-no-key" in error
    bind(host, 0, protected=True).close()


def test_mistakes_show_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0, protected=False) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        for flags, words in [
            (["--port", port], "cannot listen there"),
            (["--port", "70000"], "expected 0 to 65535"),
            (["--max-queue", "0"], "max_queue must be at least 1"),
            (["--drain-seconds", "nan"], "drain_seconds must be positive"),
            (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        ]:
            assert main(["serve", "no-such-model", *flags]) == 2
            assert words in capsys.readouterr().err
    assert main(["serve", "no-such-model", "--port", "0"]) == 2
    assert "no such checkpoint directory" in capsys.readouterr().err


def test_sighup_loads_the_checkpoint_again_without_losing_a_request(process: Process, current: Path) -> None:
    def reward() -> float:
        return httpx2.post(f"{process.url}/v1/rewards", json=BODY, timeout=60).json()["rewards"][0]

    def switch(target: str, log: str) -> None:
        (current.parent / "next").symlink_to(target)
        (current.parent / "next").rename(current)
        process.popen.send_signal(signal.SIGHUP)
        assert process.popen.stderr is not None
        assert any(log in line for line in process.popen.stderr)

    old = reward()
    stop = threading.Event()
    seen: list[float] = []

    def keep_asking() -> None:
        while not stop.is_set():
            seen.append(reward())

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_asking) for _ in range(3)]
        switch("second", "loaded; new requests use it")
        new = reward()
        switch("broken", "not loaded, the present checkpoint stays")
        assert reward() == pytest.approx(new, abs=1e-5)
        stop.set()
    assert [thread.exception() for thread in asking] == [None] * 3
    assert abs(new - old) > 1e-3
    assert all(min(abs(value - old), abs(value - new)) < 1e-5 for value in seen)
    assert httpx2.get(f"{process.url}/v1/models").json()["data"][0]["id"] == "reward"


def test_sigterm_answers_what_was_accepted_and_ends_with_0(process: Process) -> None:
    """The last of the process."""
    answer = start_scoring(process, TEXTS)
    process.popen.send_signal(signal.SIGTERM)
    states = set()
    while not answer.done():
        try:
            states.add(httpx2.get(f"{process.url}/ready", timeout=5).status_code)
        except httpx2.TransportError:
            break
        time.sleep(0.01)
    assert 503 in states
    assert answer.result().status_code == 200
    assert len(answer.result().json()["data"]) == len(TEXTS)
    assert process.popen.wait(30) == 0
    assert "Traceback" not in process.log()


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_in_mid_run_loses_no_reward(current: Path) -> None:
    """A real SIGKILL, the same port, and a client that was asking all the time."""
    outputs = [Comparison("How much is it?", "It is 4.", f"answer number {number}") for number in range(3000)]
    expected = RewardModel.load(current, device="cpu", dtype="float32").score(outputs)
    finished = threading.Event()

    async def ask(port: int) -> list[float]:
        address = f"127.0.0.1:{port}"
        async with AsyncRewardModelClient(current, server_address=address, limits=Limits(batch_items=50)) as client:
            return await client.score(outputs, progress=lambda _: finished.set())

    with ThreadPoolExecutor(1) as pool:
        with serving(model=current) as first:
            answer = pool.submit(asyncio.run, ask(first.port))
            assert finished.wait(60)
            first.popen.kill()
            first.popen.wait(30)
        assert not answer.done()
        with serving(model=current, port=first.port):
            assert answer.result(200) == pytest.approx(expected, abs=1e-4)
