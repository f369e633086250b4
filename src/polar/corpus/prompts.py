"""What policies are asked: text prefixes for base policies, instructions for chat policies (paper D.1.1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from polar.core.errors import InputError
from polar.core.records import Text, Wrapper, prompt_id
from polar.data.fields import Row, text_at
from polar.data.formats import wrapper_of
from polar.data.readers import OnBadRow, ReadReport, convert_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUNDLED_TOKENIZER = Path(__file__).parents[1] / "checkpoints" / "polar-nano" / "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a sampling job."""

    id: str
    """`polar.core.records.prompt_id` of the text."""
    text: Text
    wrapper: Wrapper
    """"pretrain" for a prefix that base policies continue, "sft" for an instruction that chat policies answer."""


def read_prompts(
    paths: Sequence[str], *, on_bad_row: OnBadRow = "error", report: ReadReport | None = None
) -> Iterator[Prompt]:
    """Prompts, one per row: {"prompt": a string or messages [, "wrapper": "sft" or "pretrain"]}.

    Args:
        paths: What `polar.data.readers.rows` reads.
        on_bad_row: Raise at the first bad row, or skip and count it.
        report: Filled while reading.

    Raises:
        InputError: for a bad row or file.
    """
    report = ReadReport() if report is None else report
    for path in paths:
        yield from convert_rows(path, _prompt, on_bad_row=on_bad_row, report=report)


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
