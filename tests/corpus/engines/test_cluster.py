"""A real Ray cluster of two nodes on this machine, sampling a small server on loopback and local models."""

import asyncio
import hashlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from polar.core.errors import InputError  # noqa: E402
from polar.corpus.engines import Completion, Failure, Request, Result, cluster  # noqa: E402
from polar.corpus.engines.local import end_tokens_of  # noqa: E402
from polar.corpus.plan import Plan  # noqa: E402
from polar.corpus.pool import Pool, VllmEngine  # noqa: E402
from polar.corpus.sample import sample_plan  # noqa: E402
from tests.corpus.engines.tiny import save_policy  # noqa: E402
from tests.corpus.sampling import files, pool, prompts  # noqa: E402
from tests.servers import Reply, Server  # noqa: E402


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    cluster.connect(nodes.address)
    yield
    ray.shutdown()
    nodes.shutdown()


AT_REQUEST: dict[int, Callable[[], None]] = {}


def seeded(number: int, body: dict[str, Any]) -> Reply:
    """An answer from the seed alone."""
    AT_REQUEST.pop(number, lambda: None)()
    text = hashlib.sha256(f"{body['model']} {body['seed']} {body['messages']}".encode()).hexdigest()
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return Reply(body={"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}, delay=0.01)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(seeded) as server:
        yield server


def endpoints(server: Server) -> Pool:
    return pool(base_url=server.url, concurrency=4, deadline=30)


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
    sample_plan(plan, prompts(60), str(tmp_path / "one"), shard_prompts=20)
    victims: list[int] = []

    def kill() -> None:
        victims.append(sorted(workers())[0])
        os.kill(victims[0], signal.SIGKILL)

    if killed:
        AT_REQUEST[len(server.bodies) + 40] = kill
    report = sample_plan(
        plan, prompts(60), str(tmp_path / "two"), shard_prompts=20, open_engine=cluster.open_on_cluster
    )
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
        sample_plan(Plan(missing), prompts(3), str(tmp_path / "out"), open_engine=cluster.open_on_cluster)
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)


class Rows:
    """Ray Data's processor, which needs vLLM: gives the rows that a script makes of its input."""

    def __init__(self, script: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
        self.script = script

    def __call__(self, rows: list[dict[str, Any]]) -> "Rows":
        self.found = self.script(rows)
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return iter(self.found)


def wave(
    monkeypatch: pytest.MonkeyPatch,
    script: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    batches: Sequence[int] = (2, 3),
) -> list[list[Result]]:
    """What batches of some sizes get in one wave."""
    monkeypatch.setattr(cluster.RayDataSampler, "_build", lambda self: Rows(script))
    monkeypatch.setattr(cluster, "WAVE_SECONDS", 0.01)
    monkeypatch.setattr(ray.data, "from_items", lambda rows: rows)
    (policy,) = Pool.model_validate(
        {"policies": [{"name": "v", "kind": "base", "engine": {"type": "vllm", "model": "none"}}]}
    ).policies
    assert isinstance(policy.engine, VllmEngine)

    async def run() -> list[list[Result]]:
        engine = cluster.RayDataSampler(policy, policy.engine)
        return await asyncio.gather(
            *(engine.sample([Request(f"{size} {number}", number) for number in range(size)]) for size in batches)
        )

    return asyncio.run(asyncio.wait_for(run(), 20))


def finished(row: dict[str, Any]) -> dict[str, Any]:
    place = {name: row[name] for name in ("batch", "place")}
    return {**place, "output": row["prompt"], "finish_reason": "stop", "prompt_tokens": 3.0, "output_tokens": 5}


def test_rows_that_a_ray_data_job_loses_repeats_or_could_not_draw_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        failed = {"batch": 1, "place": 2, "prompt": "3 2", "generated_text": "", cluster.ERROR: "OOM\nfar away"}
        return [*map(finished, [rows[3], rows[0], rows[1], rows[1]]), failed]

    assert wave(monkeypatch, script) == [
        [Completion("2 0", "stop", 3, 5), Completion("2 1", "stop", 3, 5)],
        [Failure("the Ray Data job lost this sample"), Completion("3 1", "stop", 3, 5), Failure("OOM far away")],
    ]


def test_a_ray_data_job_that_gives_nothing_or_breaks_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wave(monkeypatch, lambda rows: []) == [[Failure("the Ray Data job lost this sample")] * n for n in (2, 3)]

    def breaks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        raise RuntimeError

    assert wave(monkeypatch, breaks) == [[Failure("the Ray Data job failed: RuntimeError")] * n for n in (2, 3)]


def test_an_output_of_ray_data_ended_by_itself_only_at_an_end_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Cut by max_tokens or by the end of the context: in either case there is none."""
    model = str(save_policy(tmp_path / "model", tokenizer, "llama", 0))
    (end, *_) = end_tokens_of(model)
    assert [cluster._finish_reason(model, output) for output in ([end + 1, end], [end, end + 1], [end + 1], [])] == [
        "stop",
        "length",
        "length",
        "length",
    ]
