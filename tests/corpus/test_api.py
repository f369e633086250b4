"""`sample` and `pair` from Python: in a script, in a thread, in a running event loop."""

import asyncio
import contextlib
import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from polar.core import aio
from polar.core.errors import InputError
from polar.core.records import Trajectory, Triple
from polar.corpus.pair import pair
from polar.corpus.sample import IncompleteError, SampleReport, sample
from polar.data.readers import read_trajectories
from tests.corpus.sampling import files
from tests.servers import Reply, Server

PROMPTS = [{"prompt": f"What is {number}+{number}?"} for number in range(12)]
Call = Callable[[], Any]


def seeded(number: int, body: dict[str, Any]) -> Reply:
    text = hashlib.sha256(f"{body['model']} {body['seed']}".encode()).hexdigest()
    return Reply(body={"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(seeded) as server:
        yield server


def pool(server: Server, **settings: Any) -> dict[str, Any]:
    engine = {"type": "http", "base_url": server.url, **settings}
    return {"policies": [{"name": name, "kind": "chat", "engine": {**engine, "model": name}} for name in "abc"]}


def in_a_loop(call: Call) -> Any:
    """As a cell of a notebook runs."""

    async def cell() -> Any:
        return call()

    return asyncio.run(cell())


def in_a_thread(call: Call) -> Any:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


@pytest.mark.parametrize("run", [in_a_loop, in_a_thread])
def test_they_do_the_same_everywhere(run: Callable[[Call], Any], tmp_path: Path, server: Server) -> None:
    def draw(name: str) -> tuple[SampleReport, list[Triple]]:
        report = sample(PROMPTS, pool(server), tmp_path / name)
        return report, list(pair(tmp_path / name))

    (report, triples), (_, expected) = run(lambda: draw("there")), draw("here")
    assert (report.expected, report.drawn, report.manifest["missing"]) == (36, 36, 0)
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert triples == expected
    assert len(triples) == 12


def test_prompts_and_trajectories_come_from_files_rows_or_records(tmp_path: Path, server: Server) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{row["prompt"]}"}}\n' for row in PROMPTS))
    sample([tmp_path / "prompts.jsonl"], pool(server), tmp_path / "files")
    sample(iter(PROMPTS), pool(server), tmp_path / "rows")
    assert files(tmp_path / "rows") == files(tmp_path / "files")
    records = list(read_trajectories(tmp_path / "rows"))
    rows = [{"prompt": one.prompt, "policy": one.policy, "output": one.output} for one in records]
    found = [list(pair(given)) for given in (str(tmp_path / "rows"), [tmp_path / "rows"], records, iter(records), rows)]
    assert found[0]
    assert all(triples == found[0] for triples in found)


def test_bad_rows_are_named_or_skipped(tmp_path: Path, server: Server) -> None:
    bad = [*PROMPTS, {"question": "?"}]
    with pytest.raises(InputError, match='13: field "prompt"'):
        sample(bad, pool(server), tmp_path / "a")
    assert sample(bad, pool(server), tmp_path / "b", on_bad_row="skip").drawn == 36
    with pytest.raises(InputError, match='field "policy"'):
        list(pair([{"prompt": "a", "output": "b"}]))
    with pytest.raises(InputError, match="samples must be at least 1"):
        sample(PROMPTS, pool(server), tmp_path / "c", samples=0)
    with pytest.raises(InputError, match="pool: policies"):
        sample(PROMPTS, {"policies": []}, tmp_path / "c")


def test_what_is_missing_is_an_error_that_keeps_the_rest(tmp_path: Path) -> None:
    def refuses(number: int, body: dict[str, Any]) -> Reply:
        return Reply(400, "filtered") if body["model"] == "a" else seeded(number, body)

    with Server(refuses) as server, pytest.raises(IncompleteError, match="could not be drawn .* HTTP 400") as caught:
        sample(PROMPTS, pool(server), tmp_path)
    report = caught.value.report
    assert 0 < report.drawn == len(list(read_trajectories(tmp_path))) < 36
    assert report.manifest["missing"] == 36 - report.drawn
    with Server(seeded) as server:
        assert sample(PROMPTS, pool(server), tmp_path).drawn == 36 - report.drawn


def test_ctrl_c_ends_the_work_in_the_other_thread() -> None:
    ended: list[str] = []

    async def work() -> None:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("work")

    async def cell() -> None:
        aio.run(work())

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets background jobs ignore it
    try:
        with contextlib.closing(asyncio.new_event_loop()) as loop, pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(cell())
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == ["work"]


def test_trajectories_are_records_of_any_kind_together() -> None:
    mixed = [Trajectory("p", "a", "1"), Trajectory("p", "a", "2"), {"prompt": "p", "policy": "b", "output": "3"}]
    assert [(triple.policy, triple.negative_policy) for triple in pair(mixed)] == [("a", "b")]
