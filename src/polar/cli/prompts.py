"""`polar corpus prompts`: a text data set becomes prefixes for base policies."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

from cyclopts import Parameter

from polar.cli.progress import progress_bar
from polar.core.errors import InputError
from polar.corpus.prompts import load_tokenizer, prefixes
from polar.data.fields import string_at
from polar.data.readers import rows
from polar.data.writers import open_writer


def prompts(
    inputs: Annotated[Sequence[str], Parameter(negative="", allow_leading_hyphen=True)],
    /,
    *,
    output: str,
    column: str = "text",
    tokenizer: str | None = None,
    max_tokens: int = 1024,
    seed: int = 0,
) -> None:
    """Cut text prefixes for base policies to continue: one per document, its length uniform in 1 to 1024 tokens.

    A shorter document gives a prefix of at most all but one of its tokens. The cut is never inside a character.

    Examples:
      polar corpus prompts books.jsonl --output prefixes.parquet
      polar corpus prompts hf:HuggingFaceFW/fineweb:sample-10BT:train --output prefixes.parquet --seed 1

    Args:
        inputs: Files with one document per row (JSONL, also .gz and .zst, or Parquet), directories, hf: data sets.
        output: File for the prompts (.jsonl, .jsonl.gz, .jsonl.zst or .parquet).
        column: Column that holds the text.
        tokenizer: Counts the tokens: a tokenizer.json, a directory or a hub name (default: that of polar-nano).
        max_tokens: Longest prefix.
        seed: Another seed is another draw.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, found {max_tokens}")
    read = written = 0

    def documents() -> Iterator[str]:
        nonlocal read
        for path in inputs:
            for row in rows(path):
                read += 1
                yield string_at(row, column)

    cuts = prefixes(documents(), load_tokenizer(tokenizer), max_tokens=max_tokens, seed=seed)
    with open_writer(output) as writer, progress_bar() as progress:
        for text in progress.track(cuts, description="cutting"):
            writer.write({"prompt": text, "wrapper": "pretrain"})
            written += 1
        if not written:
            raise InputError(f"{', '.join(inputs)}: no document has two tokens or more, so nothing was written")
    sys.stderr.write(f"wrote {written} prefixes to {output} ({read - written} documents were too short)\n")
