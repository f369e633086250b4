import asyncio
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from polar.core.errors import InputError
from polar.core.records import prompt_id
from polar.corpus import journal
from polar.corpus.engines import Failure, Request
from polar.corpus.plan import Plan
from polar.corpus.pool import Policy
from polar.corpus.sample import SampleReport, sample_plan
from polar.data.readers import read_trajectories
from tests.corpus.sampling import SeededEngine, files, pool, prompts

PLAN = Plan(pool())
OpenEngine = Callable[[Policy], SeededEngine]


def run(directory: Path, plan: Plan = PLAN, count: int = 50, open_engine: OpenEngine = SeededEngine) -> SampleReport:
    return sample_plan(plan, prompts(count), str(directory), shard_prompts=20, open_engine=open_engine)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("undisturbed")
    run(directory)
    return files(directory)


def test_the_corpus_has_the_papers_design(tmp_path: Path) -> None:
    report = run(tmp_path)
    per_prompt: dict[str, Counter[str]] = {}
    trajectories = list(read_trajectories(tmp_path))
    for trajectory in trajectories:
        per_prompt.setdefault(prompt_id(trajectory.prompt), Counter())[trajectory.policy] += 1
    assert len(per_prompt) == 50
    assert all(sorted(counts.values()) == [1, 2] for counts in per_prompt.values())
    assert len({trajectory.output for trajectory in trajectories}) == 150
    assert trajectories[0].decoding == {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "max_tokens": 4096}
    assert (report.expected, report.drawn, report.found) == (150, 150, 0)
    assert report.manifest["totals"] == {
        "samples": 150,
        "prompt_tokens": 7 * 150,
        "output_tokens": 11 * 150,
        "uncounted": 0,
    }
    assert [shard["rows"] for shard in report.manifest["shards"]] == [60, 60, 30]
    assert json.loads((tmp_path / "_manifest.json").read_text()) == report.manifest


def test_the_grid_samples_every_policy(tmp_path: Path) -> None:
    run(tmp_path, Plan(pool(), "grid", samples=4), count=5)
    counts = Counter((prompt_id(row.prompt), row.policy, row.sample) for row in read_trajectories(tmp_path))
    assert len(counts) == 5 * 4 * 4
    assert set(counts.values()) == {1}


def test_another_seed_is_another_corpus_and_the_same_seed_the_same(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    run(tmp_path / "same")
    run(tmp_path / "other", Plan(pool(), seed=1))
    assert files(tmp_path / "same") == undisturbed
    draws = [
        {(prompt_id(t.prompt), t.policy) for t in read_trajectories(tmp_path / name)} for name in ("same", "other")
    ]
    assert draws[0] != draws[1]


def test_a_finished_job_asks_no_engine_again(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    run(tmp_path)

    def refuse(policy: Policy) -> SeededEngine:
        raise AssertionError(f"{policy.name} was opened")

    report = run(tmp_path, open_engine=refuse)
    assert (report.found, report.drawn) == (150, 0)
    assert files(tmp_path) == undisturbed


def test_failures_are_set_aside_exactly_and_drawn_by_the_next_runs(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    reports = [run(tmp_path, open_engine=lambda policy: SeededEngine(policy, failing=0.6))]
    first = reports[0]
    assert first.set_aside
    assert {reason for _, reason in first.set_aside} == {"no choices"}
    assert first.manifest["missing"] == first.set_aside.total() == 150 - first.drawn
    assert len(list(read_trajectories(tmp_path))) == first.drawn
    while reports[-1].set_aside and len(reports) < 30:
        reports.append(run(tmp_path, open_engine=partial(SeededEngine, failing=0.6, run=len(reports))))
        assert reports[-1].found + reports[-1].drawn + reports[-1].set_aside.total() == 150
    assert sum(report.drawn for report in reports) == 150
    assert files(tmp_path) == undisturbed


def test_failures_are_the_same_in_every_order_and_others_in_another_run() -> None:
    (policy, *_), requests = pool().policies, [Request(f"question {number}", number) for number in range(200)]

    def failed(requests: list[Request], run: int) -> set[int]:
        results = asyncio.run(SeededEngine(policy, failing=0.5, run=run).sample(requests))
        return {request.seed for request, result in zip(requests, results, strict=True) if isinstance(result, Failure)}

    assert failed(requests, 0) == failed(requests[::-1], 0) != failed(requests, 1)
    assert 70 < len(failed(requests, 0)) < 130


@pytest.mark.parametrize("policies", ["abcd", "bcd"])
def test_shards_in_which_all_failed_are_drawn_by_the_next_run(
    tmp_path: Path, undisturbed: dict[str, bytes], policies: str
) -> None:
    """A wrong key, say: nothing at all was drawn."""
    for _ in range(2):
        report = run(tmp_path, open_engine=lambda policy: SeededEngine(policy, failing=policy.name in policies))
        assert report.manifest["missing"] == report.set_aside.total() == 150 - report.found - report.drawn > 0
        assert report.shortfall().startswith(f"{report.manifest['missing']} of 150 samples could not be drawn")
    last = run(tmp_path)
    assert last.found + last.drawn == 150
    assert last.shortfall() == ""
    assert files(tmp_path) == undisturbed


def test_a_damaged_shard_is_drawn_again(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    run(tmp_path)
    for number, content in enumerate([b"", (tmp_path / "shard-00001.parquet").read_bytes()[:-9]]):
        (tmp_path / f"shard-{number:05d}.parquet").write_bytes(content)
    pq.write_table(pq.read_table(tmp_path / "shard-00002.parquet").replace_schema_metadata(), tmp_path / "foreign")
    (tmp_path / "foreign").replace(tmp_path / "shard-00002.parquet")
    assert run(tmp_path).drawn == 150
    assert files(tmp_path) == undisturbed


def test_one_dead_policy_does_not_stop_the_others(tmp_path: Path) -> None:
    report = run(tmp_path, open_engine=lambda policy: SeededEngine(policy, failing=policy.name == "b"))
    assert {policy for policy, _ in report.set_aside} == {"b"}
    drawn = Counter(trajectory.policy for trajectory in read_trajectories(tmp_path))
    assert drawn.keys() == set("acd")
    assert drawn.total() == 150 - report.set_aside.total()


def test_killed_twenty_times_it_ends_with_the_undisturbed_corpus(tmp_path: Path) -> None:
    sample_plan(Plan(pool()), prompts(240), str(tmp_path / "whole"), shard_prompts=20, open_engine=SeededEngine)
    moments = random.Random(3)
    for _ in range(20):
        process = start(tmp_path / "killed")
        assert process.stdout is not None
        assert process.stdout.readline() == "sampling\n"  # the moment falls into the sampling, not into the imports
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL
    last = start(tmp_path / "killed")
    last.communicate(timeout=120)
    assert last.returncode == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert not any((tmp_path / "killed" / "_job" / "parts").iterdir())


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    run(tmp_path, open_engine=lambda policy: SeededEngine(policy, failing=0.5))
    part = next((tmp_path / "_job" / "parts").rglob("*.parquet"))
    left = [tmp_path / ".shard-00000.parquet.1.tmp", tmp_path / "_job" / ".job.json.1.tmp", part.with_name(".a.1.tmp")]
    for file in left:
        file.write_bytes(b"PAR1")
    run(tmp_path)
    assert not any(file.exists() for file in left)
    assert files(tmp_path) == undisturbed


def start(directory: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.corpus.sampling", str(directory)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("step", ["save", "write_shard", "remove_parts", "remove_half_of_the_parts"])
def test_a_crash_between_two_steps_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes], step: str
) -> None:
    """The moments that a random kill seldom meets."""
    calls = 0

    def crash(*arguments: object, **named: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            if step == "remove_half_of_the_parts":
                next(Path(str(arguments[0])).iterdir()).unlink()
            raise KeyboardInterrupt
        return real(*arguments, **named)

    target, name = {
        "save": (journal.Journal, "save"),
        "write_shard": (journal.Journal, "finish"),
        "remove_parts": (journal.Journal, "_remove_parts"),
        "remove_half_of_the_parts": (journal.shutil, "rmtree"),
    }[step]
    real = getattr(target, name)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, crash)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    run(tmp_path)
    assert files(tmp_path) == undisturbed
    assert not any((tmp_path / "_job" / "parts").iterdir())


def test_a_torn_part_is_drawn_again(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    run(tmp_path, open_engine=lambda policy: SeededEngine(policy, failing=0.5))
    parts = sorted((tmp_path / "_job" / "parts").rglob("*.parquet"))
    parts[0].write_bytes(parts[0].read_bytes()[:-9])
    parts[1].write_bytes(b"")
    run(tmp_path)
    assert files(tmp_path) == undisturbed


def test_a_full_disk_is_one_line_and_the_job_goes_on_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    written, real = 0, pq.write_table

    def full(*arguments: object, **named: object) -> None:
        nonlocal written
        written += 1
        if written > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(InputError, match="cannot be written: No space left on device"):
            run(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    assert run(tmp_path).found > 0
    assert files(tmp_path) == undisturbed


def test_the_systems_own_limit_on_files_is_one_line_too(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from tests.corpus.sampling import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))\n"
        "from polar.core.errors import InputError\n"
        "try:\n    sample_plan(Plan(pool()), prompts(200), sys.argv[1], open_engine=SeededEngine)\n"
        "except InputError as error: print(error)\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "cannot be written: File too large" in result.stdout, result.stderr
    run_again = sample_plan(PLAN, prompts(200), str(tmp_path), open_engine=SeededEngine)
    assert run_again.found + run_again.drawn == 600


@pytest.mark.parametrize(
    ("plan", "count", "message"),
    [
        (Plan(pool(), seed=1), 50, r"other seed \(0 there, 1 now\)"),
        (Plan(pool(), "grid"), 50, "other design|other samples"),
        (Plan(pool("abce")), 50, r"other policies \(e\)"),
        (Plan(pool(model="another")), 50, r"other policies \(a\)"),
        (Plan(pool()), 49, "other prompts"),
    ],
)
def test_another_job_in_the_same_directory_is_refused(tmp_path: Path, plan: Plan, count: int, message: str) -> None:
    run(tmp_path, open_engine=lambda policy: SeededEngine(policy, failing=0.5))
    with pytest.raises(InputError, match=message):
        run(tmp_path, plan, count)


def test_an_endpoint_may_move_between_runs(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    run(tmp_path, open_engine=lambda policy: SeededEngine(policy, failing=0.5))
    run(tmp_path, Plan(pool(base_url="https://elsewhere:9/v1", concurrency=2, deadline=1)))
    assert files(tmp_path) == undisturbed


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    def nested(policy: Policy) -> SeededEngine:
        with pytest.raises(InputError, match="another polar sample is writing there"):
            run(tmp_path)
        return SeededEngine(policy)

    assert run(tmp_path, open_engine=nested).drawn == 150


def test_a_directory_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty directory"):
        run(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_repeated_prompts_are_asked_once(tmp_path: Path) -> None:
    report = sample_plan(PLAN, [*prompts(5), *prompts(7)], str(tmp_path), open_engine=SeededEngine)
    assert report.drawn == 21
    assert (report.manifest["prompts"], report.manifest["repeated_prompts"]) == (7, 5)


def test_no_prompts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prompts to sample"):
        run(tmp_path, count=0)


def test_an_error_of_an_engine_is_raised_as_it_is(tmp_path: Path) -> None:
    def missing(policy: Policy) -> SeededEngine:
        raise InputError(f"{policy.name}: no such model")

    with pytest.raises(InputError, match="^a: no such model$"):
        run(tmp_path, open_engine=missing)
