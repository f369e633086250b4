"""The plan of a sampling job: a pure function of prompts, pool, design and seed (D.1.1).

A shard is a block of prompts. Its samples are numbered in the order in which its file will hold them, and grouped by
policy into batches, the unit that an engine works on and that is saved at once. As nothing here depends on what ran
before, or where, a job can be stopped, continued and spread over machines without changing the corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal, cast

from polar.core.errors import InputError
from polar.core.records import Message, Text, Wrapper, prompt_id
from polar.corpus.engines import Request
from polar.corpus.pool import Policy, Pool, draw
from polar.data.fields import Row, text_at
from polar.data.formats import wrapper_of
from polar.data.readers import OnBadRow, ReadReport, convert_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from polar.data.readers import Rows

Design = Literal["paper", "grid"]
BUNDLED_TOKENIZER = Path(__file__).parents[1] / "checkpoints" / "polar-nano" / "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a sampling job."""

    id: str
    """`polar.core.records.prompt_id` of the text."""
    text: Text
    wrapper: Wrapper
    """"pretrain" for a prefix that base policies continue, "sft" for an instruction that chat policies answer."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How prompts meet policies."""

    pool: Pool
    design: Design = "paper"
    """"paper": two policies are drawn for every prompt, the first is sampled twice and the second once (D.1.1).
    "grid": every policy that takes the prompt is sampled `samples` times."""
    samples: int = 2
    """Samples of every policy and prompt in the grid design."""
    seed: int = 0

    def check(self, wrappers: set[Wrapper]) -> None:
        """Refuse a pool that has too few policies for the prompts.

        Raises:
            InputError: there are prompts that no policy takes, or only one where two are drawn.
        """
        for wrapper in sorted(wrappers):
            kind = "base" if wrapper == "pretrain" else "chat"
            needed, found = 2 if self.design == "paper" else 1, len(self.pool.of_kind(wrapper))
            if found < needed:
                raise InputError(
                    f"the pool has {found} {kind} policies, but there are prompts for them (wrapper {wrapper}) and the "
                    f"{self.design} design needs {needed}; add policies, or leave these prompts out"
                )

    def samples_per_prompt(self, wrapper: Wrapper) -> int:
        """How many samples a prompt gets."""
        return 3 if self.design == "paper" else self.samples * len(self.pool.of_kind(wrapper))

    def shard(self, number: int, prompts: Sequence[Prompt]) -> list[Batch]:
        """The batches of one block of prompts, in the order of the pool."""
        by_policy: dict[str, list[Item]] = {policy.name: [] for policy in self.pool.policies}
        row = 0
        for prompt in prompts:
            for policy, count in self._draw(prompt):
                for sample in range(count):
                    seed = sample_seed(self.seed, prompt, policy.name, sample)
                    by_policy[policy.name].append(Item(row, prompt, sample, seed))
                    row += 1
        batches: list[Batch] = []
        for policy in self.pool.policies:
            items, size = by_policy[policy.name], policy.engine.batch_size
            for start in range(0, len(items), size):
                batches.append(Batch(number, len(batches), policy, tuple(items[start : start + size])))
        return batches

    def _draw(self, prompt: Prompt) -> list[tuple[Policy, int]]:
        policies = self.pool.of_kind(prompt.wrapper)
        if self.design == "grid":
            return [(policy, self.samples) for policy in policies]
        first, second = draw(policies, 2, Random(f"{self.seed} {prompt.wrapper} {prompt.id}"))
        return [(first, 2), (second, 1)]


@dataclass(frozen=True, slots=True)
class Item:
    """One sample to draw."""

    row: int
    """Its place in the shard."""
    prompt: Prompt
    sample: int
    """Which sample of this policy for this prompt."""
    seed: int

    def request(self, policy: Policy) -> Request:
        """Return the request for the engine."""
        text = self.prompt.text
        if policy.kind == "base":
            assert isinstance(text, str)
            return Request(text, self.seed)
        messages = (Message("user", text),) if isinstance(text, str) else text
        system = () if policy.system is None else (Message("system", policy.system),)
        return Request((*system, *messages), self.seed)


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one policy that are drawn and saved together."""

    shard: int
    number: int
    """Within the shard."""
    policy: Policy
    items: tuple[Item, ...]


def sample_seed(seed: int, prompt: Prompt, policy: str, sample: int) -> int:
    """The seed of one sample, from 0 to 2^31 - 1 (what every engine takes)."""
    name = f"{seed}\0{prompt.wrapper}\0{prompt.id}\0{policy}\0{sample}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


def read_prompts(
    prompts: Rows | Sequence[str | Path], *, on_bad_row: OnBadRow = "error", report: ReadReport | None = None
) -> Iterator[Prompt]:
    """Yield prompts, one per row: {"prompt": a string or messages [, "wrapper": "sft" or "pretrain"]}.

    Args:
        prompts: A path or several, or rows in memory.
        on_bad_row: Raise at the first bad row, or skip and count it.
        report: Filled while reading.

    Raises:
        InputError: for a bad row or file.
    """
    report = ReadReport() if report is None else report
    for source in several(prompts):
        yield from convert_rows(source, _prompt, on_bad_row=on_bad_row, report=report)


def several(sources: Rows | Sequence[str | Path]) -> list[Rows]:
    """Return the sources of a list of paths, or the one source of rows that it is."""
    if isinstance(sources, Sequence) and not isinstance(sources, str) and all(map(_is_path, sources)):
        return [*cast(Sequence[str | Path], sources)]
    return [cast("Rows", sources)]


def _is_path(source: object) -> bool:
    return isinstance(source, str | Path)


def _prompt(row: Row) -> Prompt:
    text, wrapper = text_at(row, "prompt"), wrapper_of(row)
    if wrapper == "pretrain" and not isinstance(text, str):
        raise row.error("prompt", "a string, since the wrapper is pretrain and base policies continue text", "messages")
    return Prompt(prompt_id(text), text, wrapper)


def prefixes(documents: Iterable[str], tokenizer: Tokenizer, *, max_tokens: int = 1024, seed: int = 0) -> Iterator[str]:
    """One prefix per document, its length drawn uniformly from 1 to `max_tokens` tokens (paper D.1.1).

    A document that is not longer than `max_tokens` gives a prefix of 1 to all but one of its tokens, so that something
    is left to continue; one of fewer than two tokens gives none. The cut is at the end of a token and never inside a
    character. The draw depends on the seed and the document alone.

    Args:
        documents: Texts.
        tokenizer: Counts the tokens; any will do, policies have their own.
        max_tokens: Longest prefix.
        seed: Another seed is another draw.
    """
    for document in documents:
        random = Random(f"{seed} {prompt_id(document)}")
        # Only the beginning is needed; a token is rarely longer than 16 characters, and a shorter cut does no harm.
        ends = [end for _, end in tokenizer.encode(document[: 16 * max_tokens], add_special_tokens=False).offsets]
        if len(ends) > 1:
            yield document[: ends[random.randint(1, min(max_tokens, len(ends) - 1)) - 1]]


def load_tokenizer(name: str | None) -> Tokenizer:
    """A fast tokenizer from its file, a checkpoint directory or the hub; the bundled model's by default.

    Raises:
        InputError: there is none.
    """
    from tokenizers import Tokenizer

    path = BUNDLED_TOKENIZER if name is None else Path(name)
    try:
        if path.is_dir():
            path = path / "tokenizer.json"
        return Tokenizer.from_file(str(path)) if path.is_file() else Tokenizer.from_pretrained(str(name))
    except Exception as error:  # the tokenizers library raises nothing more precise
        message = " ".join(str(error).split())
        raise InputError(
            f"{name}: expected a tokenizer.json, a directory with one, or a hub name: {message}"
        ) from error
