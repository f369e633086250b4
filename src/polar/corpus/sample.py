"""Sampling a pool of policies: the plan says what, the engines do it, the journal keeps it.

Policies behind HTTP are sampled all at the same time; policies in this process one after the other, so that one model
is in memory at a time. Whatever the order, the corpus is the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar.core import aio
from polar.core.errors import InputError
from polar.core.version import __version__
from polar.corpus.engines import Completion, Engine, open_engine
from polar.corpus.journal import Journal, Totals, open_journal
from polar.corpus.plan import Batch, Design, Plan, Prompt, read_prompts
from polar.corpus.pool import HttpEngine, Policy, Pool, read_pool
from polar.data.readers import OnBadRow, ReadReport

if TYPE_CHECKING:
    from polar.data.readers import Rows

log = logging.getLogger(__name__)

PLANNED = 8
"""Shards whose plan is kept in memory: HTTP policies go through the shards at about the same pace."""

Results = dict[int, Completion]
"""Row in the shard, and what was drawn for it."""
OpenEngine = Callable[[Policy], Engine]
Progress = Callable[[Totals], None]


@dataclass(slots=True)
class SampleReport:
    """Counts of a run."""

    expected: int = 0
    """Samples of the whole job."""
    found: int = 0
    """Of them, drawn by earlier runs."""
    drawn: int = 0
    """Of them, drawn by this run."""
    set_aside: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Samples that could not be drawn, by policy and reason."""
    manifest: dict[str, Any] = field(default_factory=dict)

    def shortfall(self, what: str = "samples") -> str:
        """How many samples the corpus lacks and why most of them, as one line; empty when it is complete."""
        if not self.manifest["missing"]:
            return ""
        (policy, reason), most = self.set_aside.most_common(1)[0]
        others = "the others are written, and " if self.found or self.drawn else ""
        return (
            f"{self.manifest['missing']:,} of {self.expected:,} {what} could not be drawn (most often, {most:,} times, "
            f"{policy}: {reason}); {others}the same command tries these again"
        )


class IncompleteError(InputError):
    """Some samples could not be drawn; the others are written, and the same call tries these again."""

    def __init__(self, message: str, report: SampleReport) -> None:
        super().__init__(message)
        self.report = report


def sample(
    prompts: Rows | Sequence[str | Path],
    pool: str | Path | Mapping[str, Any] | Pool,
    output: str | Path,
    *,
    design: Design = "paper",
    samples: int = 2,
    seed: int = 0,
    shard_prompts: int = 1000,
    ray: str | None = None,
    on_bad_row: OnBadRow = "error",
    read: ReadReport | None = None,
    begin: Callable[[SampleReport], None] = lambda report: None,
    progress: Progress = lambda totals: None,
) -> SampleReport:
    """Sample a pool of policies into a directory of Parquet files, or go on with one that was begun there.

    It works in a script, in a thread and in a notebook. `polar.corpus.clean` and `polar.pair` read the directory.

    Example:
        >>> engine = {"type": "http", "base_url": "http://127.0.0.1:8000/v1", "model": "qwen"}
        >>> policies = [{"name": name, "kind": "chat", "engine": engine | {"model": name}} for name in ("a", "b")]
        >>> polar.sample([{"prompt": "2+2?"}], {"policies": policies}, "corpus")

    Args:
        prompts: Rows {"prompt" [, "wrapper"]}: a path, several paths, dictionaries, or a data set.
        pool: The policies, or the YAML file with them (`polar.corpus.pool`).
        output: Directory for the corpus.
        design: "paper" draws two policies per prompt and samples the first twice, the second once; "grid" samples
            every policy that takes the prompt.
        samples: Samples per policy and prompt in the grid design.
        seed: Another seed is another corpus.
        shard_prompts: Prompts per Parquet file.
        ray: Sample on a Ray cluster: its address, "auto", or "local" for a new one on this machine.
        on_bad_row: "skip" leaves unreadable rows out.
        read: Counts the rows that are read and skipped.
        begin: See `sample_plan`.
        progress: See `sample_plan`.

    Raises:
        InputError: bad prompts or pool, another job in the directory, a model that cannot be loaded, a full disk.
        IncompleteError: some samples could not be drawn.
    """
    for name, number in (("samples", samples), ("shard_prompts", shard_prompts)):
        if number < 1:
            raise InputError(f"{name} must be at least 1, found {number}")
    plan = Plan(read_pool(pool), design, samples, seed)
    if ray is None:
        from polar.corpus.engines.local import check  # the other engines do without numpy and jinja2

        opener: OpenEngine = open_engine
        for policy in plan.pool.policies:
            check(policy)
    else:
        from polar.corpus.engines import cluster

        opener = cluster.open_on_cluster
        cluster.connect(ray)
    report = sample_plan(
        plan,
        read_prompts(prompts, on_bad_row=on_bad_row, report=read),
        output,
        shard_prompts=shard_prompts,
        open_engine=opener,
        begin=begin,
        progress=progress,
    )
    if shortfall := report.shortfall():
        raise IncompleteError(f"{output}: {shortfall}", report)
    return report


def sample_plan(
    plan: Plan,
    prompts: Iterable[Prompt],
    directory: str | Path,
    *,
    shard_prompts: int = 1000,
    open_engine: OpenEngine = open_engine,
    one_at_a_time: Callable[[Policy], bool] = lambda policy: not isinstance(policy.engine, HttpEngine),
    progress: Progress = lambda totals: None,
    begin: Callable[[SampleReport], None] = lambda report: None,
) -> SampleReport:
    """Sample a plan into a directory, or go on with one that was begun there.

    A run that is stopped at any moment and started again gives, file by file, the corpus of an undisturbed run (where
    the engines are deterministic). Samples that fail for good are reported, the rest is drawn and written; the next run
    tries them again.

    Args:
        plan: Pool, design and seed.
        prompts: What the policies are asked; stored with the job.
        directory: Where the corpus goes, see `polar.corpus.journal`.
        shard_prompts: Prompts per file. Part of what decides the corpus, since batches do not span files.
        open_engine: Connects to a policy; `polar.corpus.engines.cluster` gives another one.
        one_at_a_time: Policies that must not be open at the same time.
        begin: Called once, when it is known how many samples are expected, and found in complete shards.
        progress: Called with what every batch of the other shards adds, be it found or drawn.

    Raises:
        InputError: bad prompts, another job in the directory, a model that cannot be loaded, a full disk.
    """
    identity = {
        "polar": __version__,
        "design": plan.design,
        "samples": plan.samples if plan.design == "grid" else None,
        "seed": plan.seed,
        "policies": [policy.identity() for policy in plan.pool.policies],
    }
    with open_journal(directory, prompts, identity, shard_prompts) as journal:
        wrappers = journal.wrappers()
        plan.check(set(wrappers))
        report = SampleReport(expected=sum(plan.samples_per_prompt(name) * count for name, count in wrappers.items()))
        run = _Run(plan, journal, report, open_engine, progress)
        report.found = report.expected - sum(
            plan.samples_per_prompt(prompt.wrapper) for shard in run.open_shards for prompt in journal.prompts_of(shard)
        )
        begin(report)
        try:
            aio.run(run.run(plan.pool.policies, one_at_a_time))
        except BaseExceptionGroup as group:
            raise _only(group) from None
        report.manifest = journal.manifest()
    return report


class _Run:
    def __init__(
        self, plan: Plan, journal: Journal, report: SampleReport, open_engine: OpenEngine, progress: Progress
    ) -> None:
        self.journal, self.report = journal, report
        self.open_engine, self.progress = open_engine, progress
        self.planned = lru_cache(PLANNED)(lambda shard: plan.shard(shard, journal.prompts_of(shard)))
        self.open_shards = journal.open_shards()
        self.unsettled: dict[int, int] = {}
        """Batches of each open shard that this run has still to ask for."""

    async def run(self, policies: Sequence[Policy], one_at_a_time: Callable[[Policy], bool]) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._in_turn([policy for policy in policies if one_at_a_time(policy)]))
            for policy in policies:
                if not one_at_a_time(policy):
                    group.create_task(self._sample_policy(policy))

    async def _in_turn(self, policies: Sequence[Policy]) -> None:
        for policy in policies:
            await self._sample_policy(policy)

    async def _sample_policy(self, policy: Policy) -> None:
        batches = self._unfinished(policy)
        first = next(batches, None)
        if first is None:  # nothing left to do: do not load the model
            return
        engine = await asyncio.to_thread(self.open_engine, policy)
        try:
            batches = chain([first], batches)
            async with asyncio.TaskGroup() as group:
                for _ in range(engine.in_flight):
                    group.create_task(self._work(engine, batches))
        finally:
            await engine.close()

    def _unfinished(self, policy: Policy) -> Iterator[tuple[Batch, Results]]:
        """The batches of a policy from which samples are missing, with those that are there."""
        for shard in self.open_shards:
            for batch in self.planned(shard):
                if batch.policy.name == policy.name:
                    saved = self.journal.results(batch)
                    self.report.found += len(saved)
                    self.progress(_totals(saved))
                    if len(saved) < len(batch.items):
                        yield batch, saved
                    else:
                        self._settle(shard)

    async def _work(self, engine: Engine, batches: Iterator[tuple[Batch, Results]]) -> None:
        for batch, saved in batches:
            missing = [item for item in batch.items if item.row not in saved]
            results = await engine.sample([item.request(batch.policy) for item in missing])
            drawn: Results = {}
            for item, result in zip(missing, results, strict=True):
                if isinstance(result, Completion):
                    drawn[item.row] = result
                else:
                    self.report.set_aside[batch.policy.name, result.reason] += 1
            if drawn:
                self.journal.save(batch, saved | drawn)
                self.report.drawn += len(drawn)
                self.progress(_totals(drawn))
            self._settle(batch.shard)

    def _settle(self, shard: int) -> None:
        """One batch less to wait for; after the last one the shard is written."""
        left = self.unsettled.get(shard, len(self.planned(shard))) - 1
        self.unsettled[shard] = left
        if not left:
            self.journal.finish(shard, self.planned(shard))


def _totals(results: Results) -> Totals:
    return sum((Totals.of(result) for result in results.values()), Totals())


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception in a group of groups: what stopped the run."""
    first = group.exceptions[0]
    return _only(first) if isinstance(first, BaseExceptionGroup) else first
