"""A real Ray cluster of two nodes on this machine, sampling a small server on loopback and local models."""

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from polar.corpus.engines import cluster  # noqa: E402
from polar.corpus.plan import Plan  # noqa: E402
from polar.corpus.pool import Pool  # noqa: E402
from polar.corpus.sample import sample  # noqa: E402
from polar.errors import InputError  # noqa: E402
from tests.corpus.sampling import files, pool, prompts  # noqa: E402


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    cluster.connect(nodes.address)
    yield
    ray.shutdown()
    nodes.shutdown()


class Server(ThreadingHTTPServer):
    """Answers from the seed alone."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = 0
        self.at_request: dict[int, Callable[[], None]] = {}
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.requests += 1
            act = self.server.at_request.get(self.server.requests, lambda: None)
        act()
        time.sleep(0.01)
        text = hashlib.sha256(f"{asked['model']} {asked['seed']} {asked['messages']}".encode()).hexdigest()
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        body = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def endpoints(server: Server) -> Pool:
    return pool(base_url=f"http://127.0.0.1:{server.server_port}/v1", concurrency=4, deadline=30)


def workers() -> list[int]:
    """Process ids of the actors of this cluster; Ray names its processes by what they run."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                name = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if name.startswith(b"ray::_Worker"):
                found.append(int(process.name))
    return found


@pytest.mark.parametrize("killed", [False, True])
def test_two_nodes_give_the_corpus_of_one_process(
    tmp_path: Path, server: Server, two_nodes: None, killed: bool
) -> None:
    plan = Plan(endpoints(server))
    sample(plan, prompts(60), str(tmp_path / "one"), shard_prompts=20)
    victims: list[int] = []

    def kill() -> None:
        victims.append(sorted(workers())[0])
        os.kill(victims[0], signal.SIGKILL)

    if killed:
        server.at_request[server.requests + 40] = kill
    report = sample(plan, prompts(60), str(tmp_path / "two"), shard_prompts=20, open_engine=cluster.open_on_cluster)
    assert not report.set_aside
    assert len(victims) == killed
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path, two_nodes: None) -> None:
    missing = Pool.model_validate(
        {
            "policies": [
                {"name": name, "kind": "chat", "engine": {"type": "transformers", "model": str(tmp_path / "none")}}
                for name in "ab"
            ]
        }
    )
    with pytest.raises(InputError, match="none") as error:
        sample(Plan(missing), prompts(3), str(tmp_path / "out"), open_engine=cluster.open_on_cluster)
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)
