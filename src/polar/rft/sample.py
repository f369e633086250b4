"""What a framework hands to its reward function becomes a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from polar.core.errors import InputError
from polar.core.records import Text, text_of
from polar.core.text import strip_thinking
from polar.data.dialogues import split
from polar.data.fields import Row, as_string, text_at
from polar.data.formats import named, references_at

Thinking = Literal["strip", "opened", "keep"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One output of the policy."""

    prompt: Text
    references: tuple[Text, ...]
    """One or more."""
    output: str
    place: str
    """Names it in messages."""
    opened: bool = False
    """The prompt, as the policy saw it, ends with an open block of thinking."""


def read_sample(
    fields: Mapping[str, Any],
    output: object,
    *,
    prompt: str,
    references: tuple[str, ...],
    source: str,
    number: int = 0,
    opened: bool = False,
) -> Sample:
    """The sample in some fields; arrays of NumPy, which Parquet readers make of lists, count as lists.

    Args:
        fields: Values by their names.
        output: What the policy wrote.
        prompt: The name of the prompt.
        references: Names that may hold the reference, first come, first served; a list that is not one of messages
            holds several references.
        source: Where the sample is from, for messages.
        number: Which one of that source.
        opened: See `Sample`.

    Raises:
        InputError: there is no prompt, no reference, or a value is no text.
    """
    row = Row(source, number, {name: _plain(value) for name, value in fields.items()})
    name = next((name for name in references if row.has(name)), None)
    if name is None:
        raise InputError(
            f"{row.place}: expected a reference in one of {', '.join(references)}, found none: POLAR scores against one"
        )
    asked, several = split(row, text_at(row, prompt), named(name, references_at(row, name)))
    return Sample(asked, several, as_string(row, "output", output), row.place, opened)


def as_scored(sample: Sample, thinking: Thinking = "strip") -> Sample:
    """The sample as it is scored: with the answers of its output and references alone, unless thinking is kept.

    Raises:
        InputError: a reference has no answer, and nothing can be close to that.
    """
    if thinking != "keep":
        opened = sample.opened or thinking == "opened"
        output = str(strip_thinking(sample.output, opened=opened))
        sample = replace(sample, output=output, references=tuple(map(strip_thinking, sample.references)))
    if not all(text_of(reference).strip() for reference in sample.references):
        raise InputError(f"{sample.place}: expected a reference with an answer, found only thinking or white space")
    return sample


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value
