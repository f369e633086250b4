"""References by a model: an OpenAI-compatible server answers prompts.

It is a sampling job with a pool of one policy, so it has the same plan and journal: stopped at any moment, the same
call goes on; what fails is reported and tried again next time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from polar.core.errors import InputError, first_mistake
from polar.core.records import Text, prompt_id
from polar.corpus.plan import Plan, Prompt
from polar.corpus.pool import Decoding, HttpEngine, Policy, Pool
from polar.corpus.sample import SampleReport, sample_plan
from polar.data.readers import rows


@dataclass(frozen=True, slots=True)
class Asking:
    """The model that gives references, and how it is asked."""

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
    prompts: Iterable[Text],
    directory: Path,
    asking: Asking,
    *,
    begin: Callable[[SampleReport], None] = lambda report: None,
    progress: Callable[[int], None] = lambda count: None,
) -> SampleReport:
    """Sample references for prompts into a directory, or go on with that.

    Args:
        prompts: Each is asked once, however often it is there.
        directory: Where the answers are kept; see `polar.corpus.journal`.
        asking: The model, and how it is asked.
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
    return sample_plan(
        Plan(pool, "grid", asking.per_prompt, asking.seed),
        (Prompt(prompt_id(prompt), prompt, "sft") for prompt in prompts),
        directory,
        begin=begin,
        progress=lambda totals: progress(totals.samples),
    )


def read_answers(directory: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the id and the sampled rows of every prompt that has some, in the order of the prompts."""
    for name, several in groupby((row.fields for row in rows(directory)), itemgetter("prompt_id")):
        yield str(name), list(several)
