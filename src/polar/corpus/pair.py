"""Trajectories become triples: two samples of one policy and one of another policy, for the same prompt (paper 4.1).

Trajectories are sorted by prompt on disk, so that a corpus may be far larger than memory; the triples of a prompt are
drawn by `polar.corpus.strategies`. Every prompt has random numbers of its own, made from the seed and the prompt, and
prompts are taken in the order of their ids: the order of the input changes nothing.

DuckDB sorts. An external sort needs memory in some proportion to what it sorts (with 256 MB and two threads, DuckDB 2.0
gives up at 4 GB), so prompts are dealt to `PARTS` tables by the beginning of their id, which are sorted one by one.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from polar.core.errors import InputError
from polar.core.records import Trajectory, Triple, Wrapper, prompt_id, text_of
from polar.corpus.plan import several
from polar.corpus.strategies import (
    Lineage,
    LineageEvidence,
    Outputs,
    PairReport,
    PairSampler,
    PromptOutputs,
    Sample,
    Strategy,
    decoded,
    encoded,
    read_lineages,
    resolve_lineages,
)
from polar.data.readers import OnBadRow, ReadReport, read_trajectories

if TYPE_CHECKING:
    import duckdb

    from polar.data.readers import Rows

MEMORY = "768MB"
"""Of DuckDB, before it writes to disk; Python comes on top."""
THREADS = 2
"""Each thread of the sort needs memory of its own."""
PARTS = 64
"""Ids are hexadecimal digits of a hash, so all parts are of about one size. They must divide 256."""
BATCH_ROWS, BATCH_CHARACTERS = 2048, 1 << 20
"""The rows that wait for a table are stored when there are so many, or about so many characters."""

COLUMN_NAMES = ("prompt_id", "wrapper", "policy", "prompt", "output", "text")
COLUMNS = "prompt_id VARCHAR, wrapper VARCHAR, policy INTEGER, prompt VARCHAR, output VARCHAR, text BIGINT"


def pair(
    trajectories: Rows | Sequence[str | Path],
    *,
    per_prompt: int | None = None,
    negatives: int = 1,
    strategy: Strategy = "random",
    lineages: Mapping[str, Lineage] | str | Path | None = None,
    balance: bool = True,
    match_length: bool = False,
    seed: int = 0,
    exclude_policies: str | None = None,
    policies: Collection[str] | None = None,
    prompt_ids: Collection[str] | None = None,
    wrapper: Wrapper | None = None,
    temporary: Path | None = None,
    report: PairReport | None = None,
    on_bad_row: OnBadRow = "error",
    read: ReadReport | None = None,
) -> Iterator[Triple]:
    """Yield triples in bounded memory: trajectories are sorted on disk and come back one prompt at a time.

    Reference and positive are two different texts of one policy. The negative is a text of another policy and differs
    from both: as no positive ever repeats its reference, a negative that does would teach that a copy is wrong.
    All outputs of one prompt, and a count for every pair of policies that meet, have to fit into memory.

    Args:
        trajectories: Samples of several policies, in any order: a path or several, such as the directory of
            `polar.sample`, dictionaries, or records. They are read when the first triple is asked for.
        per_prompt: At most this many policies of a prompt give a reference and a positive: if balanced, those that
            did so least so far, else chosen at random. Default: every policy with two different outputs gives one.
        negatives: Triples per drawn reference and positive. They follow one another and differ in the negative, which
            comes from as many different policies as there are; there are fewer when the outputs do not suffice.
        strategy: Where negatives come from (`polar.corpus.strategies`). Policies without a known family take no part
            in "family" and "checkpoint", those without a step none in "checkpoint"; a policy for which the strategy
            finds no other one gives no triple and is counted.
        lineages: Family and step of policies, or a file with them (`read_lineages`); overrides what the trajectories
            say.
        balance: Take as negative the policy that was positive most often so far beyond being negative, and one that
            can never be positive only when there is no other. Then other prompts matter for the triples of a prompt.
        match_length: Choose negatives near the positive in length, closer to that of the reference in one half of the
            triples and farther in the other half, as far as there are any. No reference and positive is lost for it;
            of several negatives some may be. Here, too, other prompts matter.
        seed: Another seed is another draw.
        exclude_policies: Leave out policies in whose name this regular expression is found.
        policies: Only these policies.
        prompt_ids: Only the prompts with these ids (`polar.core.records.prompt_id`).
        wrapper: Overrides the wrapper of the trajectories. Trajectories of different wrappers never share a triple.
        temporary: An existing directory for the temporary files; default: that of the system.
        report: Counts are added here.
        on_bad_row: "skip" leaves unreadable rows out.
        read: Counts the rows that are read and skipped.

    Yields:
        The triples, ordered by prompt id.

    Raises:
        InputError: A number is below 1 or the regular expression is not one (at once); a policy has two families or
            steps, none is known that the strategy needs, or the sort finds no room on disk (while iterating).
    """
    for name, number in (("per_prompt", per_prompt), ("negatives", negatives)):
        if number is not None and number < 1:
            raise InputError(f"pair: {name} must be at least 1, found {number}")
    try:
        excluded = None if exclude_policies is None else re.compile(exclude_policies)
    except re.error as error:
        raise InputError(
            f"pair: exclude_policies {exclude_policies!r} is not a regular expression ({error})"
        ) from error
    report = PairReport() if report is None else report
    table = read_lineages(lineages) if isinstance(lineages, str | Path) else lineages or {}
    wanted_policies = None if policies is None else set(policies)
    wanted_prompts = None if prompt_ids is None else set(prompt_ids)

    @cache
    def wanted(policy: str) -> bool:
        unasked = wanted_policies is not None and policy not in wanted_policies
        return not unasked and (excluded is None or not excluded.search(policy))

    def sort(sorter: PromptSorter) -> dict[str, LineageEvidence]:
        """Fill the sorter; return what the trajectories say about each policy that is wanted."""
        evidence: dict[str, LineageEvidence] = {}
        unseen_policies, unseen_prompts = set(wanted_policies or ()), set(wanted_prompts or ())
        for trajectory in _trajectories(trajectories, on_bad_row, read):
            report.trajectories += 1
            policy, prompt = trajectory.policy, prompt_id(trajectory.prompt)
            unseen_policies.discard(policy)
            unseen_prompts.discard(prompt)
            if not wanted(policy) or (wanted_prompts is not None and prompt not in wanted_prompts):
                report.left_out += 1
                continue
            evidence.setdefault(policy, LineageEvidence()).add(trajectory.family, trajectory.step)
            sorter.add(prompt, wrapper or trajectory.wrapper, trajectory)
        report.unknown_policies += len(unseen_policies)
        report.unknown_prompts += len(unseen_prompts)
        return evidence

    def triples() -> Iterator[Triple]:
        with open_sorter(temporary) as sorter:
            evidence = sort(sorter)
            known = {} if strategy == "random" else resolve_lineages(strategy, evidence, table)
            can_be_positive = sorter.policies_with_two_outputs()
            report.policies += len(evidence)
            report.policies_with_two_outputs += len(can_be_positive)
            sampler = PairSampler(
                per_prompt, negatives, strategy, known, balance, match_length, can_be_positive, report
            )
            for prompt in sorter.prompts():
                yield from sampler.sample(prompt, Random(f"{seed} {prompt.prompt_id} {prompt.wrapper}"))

    return triples()


def _trajectories(
    sources: Rows | Sequence[str | Path], on_bad_row: OnBadRow, report: ReadReport | None
) -> Iterator[Trajectory]:
    for source in several(sources):
        if isinstance(source, str | Path):
            yield from read_trajectories(source, on_bad_row=on_bad_row, report=report)
            continue
        rows = iter(source)
        for first in rows:
            if isinstance(first, Trajectory):  # records need no reading
                yield first
            else:
                yield from read_trajectories(chain([first], rows), on_bad_row=on_bad_row, report=report)


class PromptSorter:
    """Trajectories on disk, to be added first and read by prompt then; made by `open_sorter`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, place: Path) -> None:
        self.connection, self.place = connection, place
        self.policies: dict[str, int] = {}
        """Every policy and its number in the database, in order of appearance."""
        self.waiting: defaultdict[int, list[tuple[str, Wrapper, int, str, str, int]]] = defaultdict(list)
        """For every part that has rows, those that are not in its table yet."""
        self.characters: Counter[int] = Counter()

    def add(self, prompt_id: str, wrapper: Wrapper, trajectory: Trajectory) -> None:
        """Store a trajectory under a prompt id and a wrapper."""
        policy = self.policies.setdefault(trajectory.policy, len(self.policies))
        prompt, output = encoded(trajectory.prompt), encoded(trajectory.output)
        part = int(prompt_id[:2], 16) * PARTS // 256
        # The hash of a string differs from process to process; it only tells here whether two texts are the same.
        self.waiting[part].append((prompt_id, wrapper, policy, prompt, output, hash(text_of(trajectory.output))))
        self.characters[part] += len(prompt) + len(output)
        if len(self.waiting[part]) >= BATCH_ROWS or self.characters[part] >= BATCH_CHARACTERS:
            self._store(part)

    def policies_with_two_outputs(self) -> set[str]:
        """The policies with two different outputs for at least one prompt."""
        found: set[int] = set()
        for part in sorted(self.waiting):
            self._store(part)
            with temporary_files(self.place):
                rows = self.connection.execute(
                    f"SELECT DISTINCT policy FROM (SELECT policy FROM part_{part} "
                    "GROUP BY prompt_id, wrapper, policy HAVING min(text) <> max(text))"
                ).fetchall()
            found.update(number for (number,) in rows)
        return {name for name, number in self.policies.items() if number in found}

    def prompts(self) -> Iterator[PromptOutputs]:
        """The prompts in the order of their ids, each with all its outputs (which have to fit into memory)."""
        names = list(self.policies)
        for (name, wrapper), rows in groupby(self._sorted_rows(), key=itemgetter(0, 1)):
            outputs: Outputs = {}
            identical = 0
            for _, _, number, *stored in rows:
                samples, sample = outputs.setdefault(names[number], {}), Sample(*stored)
                text = text_of(decoded(sample.output))
                identical += text in samples
                # One prompt may be spelt in several ways; which spelling stays must not depend on the order of rows.
                samples[text] = min(samples.get(text, sample), sample)
            yield PromptOutputs(name, wrapper, outputs, identical)

    def _sorted_rows(self) -> Iterator[tuple[Any, ...]]:
        for part in sorted(self.waiting):
            self._store(part)
            order = f"SELECT prompt_id, wrapper, policy, prompt, output FROM part_{part} ORDER BY prompt_id, wrapper"
            with temporary_files(self.place):
                reader = self.connection.sql(order).to_arrow_reader(BATCH_ROWS)
            while True:
                with temporary_files(self.place):
                    batch = next(reader, None)
                if batch is None:
                    break
                yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
            self.connection.execute(f"DROP TABLE part_{part}")

    def _store(self, part: int) -> None:
        rows = self.waiting[part]
        if not rows:
            return
        self.waiting[part], self.characters[part] = [], 0
        try:
            batch = pa.table([pa.array(column) for column in zip(*rows, strict=True)], COLUMN_NAMES)
        except UnicodeEncodeError as error:
            raise InputError(
                f"a trajectory holds text that UTF-8 cannot express ({error.reason}); repair it"
            ) from error
        with temporary_files(self.place):
            self.connection.execute(f"CREATE TABLE IF NOT EXISTS part_{part} ({COLUMNS})")
            self.connection.register("batch", batch)
            self.connection.execute(f"INSERT INTO part_{part} SELECT * FROM batch")
            self.connection.unregister("batch")


@contextmanager
def open_sorter(temporary: Path | None = None) -> Iterator[PromptSorter]:
    """Open a sorter whose files lie in a new directory inside `temporary`, which is removed at the end.

    What fits into `MEMORY` is never written.

    Args:
        temporary: An existing directory with room for the texts of the corpus; default: that of the system.

    Raises:
        InputError: The directory cannot be written or has no room; also while the sorter is used.
    """
    place = temporary or Path(tempfile.gettempdir())
    with ExitStack() as stack:
        with temporary_files(place):
            directory = stack.enter_context(
                tempfile.TemporaryDirectory(prefix=".polar-pair-", dir=place, ignore_cleanup_errors=True)
            )
        import duckdb  # a third of a second at import

        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY,
            "threads": THREADS,
            "temp_directory": directory,
            "preserve_insertion_order": False,
        }
        yield PromptSorter(stack.enter_context(duckdb.connect(":memory:", config=config)), place)


@contextmanager
def temporary_files(place: Path) -> Iterator[None]:
    """Report what the system or DuckDB cannot write to `place` as `InputError`."""
    import duckdb

    try:
        yield
    except (OSError, duckdb.IOException, duckdb.OutOfMemoryException) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{place}: no room for temporary files ({reason}); make room, or choose another place (--temp or TMPDIR)"
        ) from error
