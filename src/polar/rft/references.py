"""References by a model: an OpenAI-compatible server is asked for answers to the prompts of a data set.

It is a sampling job of `polar.corpus` with a pool of one policy, so it has the same plan and journal: stopped at any
moment, the same command goes on; what fails is set aside and tried again next time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from polar.core.errors import InputError, first_mistake
from polar.core.records import prompt_id
from polar.corpus.plan import Plan, Prompt
from polar.corpus.pool import Decoding, HttpEngine, Policy, Pool
from polar.corpus.sample import SampleReport, sample
from polar.data.readers import rows
from polar.rft.dataset import DataReport
from polar.rft.prompts import Task, answer_in


@dataclass(frozen=True, slots=True)
class Asking:
    """Who is asked for references, and how."""

    endpoint: str
    """With its version, as in "http://127.0.0.1:8000/v1"."""
    model: str
    per_prompt: int = 1
    key_variable: str | None = None
    """Environment variable that holds the key."""
    temperature: float = 0.7
    max_tokens: int = 4096
    concurrency: int = 64
    deadline: float = 600
    """Seconds of trying again before a reference, or a server that never answers, is given up."""
    seed: int = 0


def ask_for_references(
    tasks: Iterable[Task],
    directory: Path,
    asking: Asking,
    *,
    begin: Callable[[SampleReport], None] = lambda report: None,
    progress: Callable[[int], None] = lambda count: None,
) -> SampleReport:
    """Sample references for the prompts into a directory, or go on with that.

    Args:
        tasks: The prompts; every prompt is asked once, however often it is there.
        directory: Where the answers are kept; see `polar.corpus.journal`.
        asking: Whom, and how.
        begin: See `polar.corpus.sample`.
        progress: Called with the number of answers that were just found or drawn.

    Raises:
        InputError: the address, the model or the key is of no use, or the directory holds another job.
    """
    try:
        engine = HttpEngine(
            type="http",
            base_url=asking.endpoint,
            model=asking.model,
            api_key_env=asking.key_variable,
            concurrency=asking.concurrency,
            deadline=asking.deadline,
        )
        # Commercial endpoints refuse top_k.
        decoding = Decoding(temperature=asking.temperature, top_p=1, top_k=None, max_tokens=asking.max_tokens)
        pool = Pool(policies=(Policy(name=asking.model, kind="chat", engine=engine, decoding=decoding),))
    except ValidationError as error:
        raise InputError(f"references from {asking.endpoint}: {first_mistake(error)}") from error
    prompts = (Prompt(prompt_id(task.prompt), task.prompt, "sft") for task in tasks)
    return sample(
        Plan(pool, "grid", asking.per_prompt, asking.seed),
        prompts,
        str(directory),
        begin=begin,
        progress=lambda totals: progress(totals.samples),
    )


def with_references(tasks: Iterable[Task], directory: Path, report: DataReport) -> Iterator[Task]:
    """The tasks with the references that were sampled for them.

    Answers that were cut off at the token limit, and those that are nothing but thinking, are no references. Tasks
    without any, for this reason or because the model gave no answer, and those that repeat an earlier prompt are set
    aside.

    Args:
        tasks: The same, in the same order, as for `ask_for_references`.
        directory: The same.
        report: Counts what is set aside.
    """
    answers = _answers(directory)
    found_id, found = next(answers, ("", []))
    seen: set[str] = set()
    for number, task in enumerate(tasks):
        name = prompt_id(task.prompt)
        place = f"prompt {number} ({name})"
        if name in seen:
            report.leave("a prompt that repeats an earlier one", place)
            continue
        seen.add(name)
        if name != found_id:
            report.leave("no answer from the model", place)
            continue
        references = tuple(dict.fromkeys(filter(None, map(_reference, found))))
        found_id, found = next(answers, ("", []))
        if references:
            yield replace(task, references=references)
        else:
            report.leave("no usable reference from the model", place)


def _answers(directory: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The id and the answers of every prompt that has some, in the order of the prompts."""
    for name, several in groupby((row.fields for row in rows(directory)), itemgetter("prompt_id")):
        yield str(name), list(several)


def _reference(row: dict[str, Any]) -> str:
    return "" if row["finish_reason"] == "length" else answer_in(row["output"]).strip()
