"""Prompts that are nearly the same, and trajectories that evaluation sets contain.

Words are those of `polar.core.baselines.words` without punctuation: lower case, and each Chinese or Japanese character
is a word. Libraries such as datatrove and text-dedup decontaminate too, but as pipelines over document files of their
own; what is needed here is one yes or no per trajectory, which is a few lines of NumPy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from polar.core.baselines import words
from polar.core.errors import InputError
from polar.core.records import Text, prompt_id, text_of
from polar.data.fields import json_list
from polar.data.readers import rows

QUESTIONS = ("prompt", "question")
"""Fields of an evaluation set that a prompt of the corpus may repeat as a whole."""
ANSWERS = ("reference", "chosen", "rejected", "output", "answer", "text", "ranked", "candidates")
"""Its other fields with texts."""

SHINGLE = 5
"""Words per shingle of a prompt."""
SHORT = 20
"""Prompts of fewer words are never near duplicates: "arrange the letters of GAMMAS" and "... of TEPEE" share most of
their shingles and are two tasks."""
PERMUTATIONS = 128

BOILERPLATE = 3
"""An n-gram under this many different prompts of the evaluation sets is a phrase of the language or of a template."""

Hashes = NDArray[np.uint64]
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_FIRST_BITS = np.uint64(64 - 24)


class NearDuplicates:
    """Prompts seen so far, to find those that nearly repeat one of them.

    Two prompts are near duplicates when the Jaccard similarity of their sets of five-word shingles reaches the
    threshold and they hold the same numbers: templates that differ in a number are different tasks. MinHash LSH (the
    datasketch library) proposes candidates, the similarity itself is exact: of pairs at 0.8, the default, 87 % are
    found, and 99.9 % of those at 0.9. Memory: about 9 kB per prompt.

    Args:
        threshold: Least similarity, above 0 and at most 1.
    """

    def __init__(self, threshold: float = 0.8) -> None:
        if not 0 < threshold <= 1:
            raise InputError(f"near-duplicate threshold: expected a number above 0 and at most 1, found {threshold}")
        from datasketch import MinHash, MinHashLSH  # with scipy, a second at import
        from datasketch.hashfunc import sha1_hash32

        self.threshold = threshold
        # Missed candidates are lost, wrong ones are refused below.
        self._index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
        self._hash = sha1_hash32
        self._empty = MinHash(PERMUTATIONS, hashfunc=int)
        self._kept: list[tuple[frozenset[int], Counter[str]]] = []

    def seen(self, prompt: Text) -> bool:
        """Return whether an earlier prompt is nearly the same; a new prompt is remembered."""
        found = _plain_words(text_of(prompt))
        if len(found) < SHORT:
            return False
        numbers = Counter(word for word in found if word.isdecimal())
        shingles = [" ".join(found[i : i + SHINGLE]).encode() for i in range(len(found) - SHINGLE + 1)]
        hashes = frozenset(map(self._hash, shingles))
        sketch = self._empty.copy()  # with its permutations, which are slow to draw
        sketch.update_batch(hashes)
        for key in self._index.query(sketch):
            kept, kept_numbers = self._kept[key]
            if numbers == kept_numbers and len(hashes & kept) >= self.threshold * len(hashes | kept):
                return True
        self._index.insert(len(self._kept), sketch)
        self._kept.append((hashes, numbers))
        return False


class Decontaminator:
    """The texts of evaluation sets, to keep them out of a corpus, as in GPT-3 (Brown et al. 2020, appendix C).

    A text is contaminated when it shares an n-gram of words with a text of an evaluation set. An n-gram that is mostly
    Chinese or Japanese characters has twice as many of them: thirteen are often just the name of a law. N-grams under
    three or more different prompts of the evaluation sets do not count, since they are templates and phrases ("I hope
    this helps! Let me know if you have any other questions"); GPT-3 leaves out those that are frequent in the corpus,
    which a single pass over it cannot know. A question too short for an n-gram is compared with prompts as a whole.
    Memory: 16 MB, 8 bytes per n-gram (about 100 while reading) and 100 bytes per different word.

    Args:
        files: Whatever `polar.data.readers.rows` reads; the texts are those in `QUESTIONS` and `ANSWERS`.
        ngram: Words per n-gram.

    Raises:
        InputError: a file cannot be read or has no text in these fields, or `ngram` is below 2.
    """

    def __init__(self, files: Sequence[str], ngram: int = 13) -> None:
        if ngram < 2:
            raise InputError(f"ngram: expected 2 words or more, found {ngram}")
        self.ngram = ngram
        self.ngrams: dict[str, int] = {}
        """Different n-grams that each file gave, templates and phrases included."""
        self._codes: dict[str, int] = {}
        self._short: set[tuple[str, ...]] = set()
        prompts: dict[str, int] = {}
        found = [np.concatenate(list(self._read(file, prompts)), axis=1) for file in files]
        hashes, owners = np.concatenate(found, axis=1)
        order = np.lexsort((owners, hashes))
        hashes, owners = hashes[order], owners[order]
        first = np.ones(len(hashes), bool)  # of its n-gram and prompt
        first[1:] = (np.diff(hashes) != 0) | (np.diff(owners) != 0)
        different, prompts_per_ngram = np.unique(hashes[first], return_counts=True)
        self.boilerplate = int(np.sum(prompts_per_ngram >= BOILERPLATE))
        """Different n-grams that do not count."""
        self.short_questions = len(self._short)
        """Different questions that are compared as a whole."""
        self._hashes: Hashes = different[prompts_per_ngram < BOILERPLATE]
        # Most n-grams of a corpus are in no evaluation set, and a look at their first bits shows it.
        self._beginnings = np.zeros(1 << 24, bool)
        self._beginnings[self._hashes >> _FIRST_BITS] = True

    def shared(self, text: str, *, prompt: bool = False) -> str | None:
        """The first n-gram that a text shares with an evaluation set, as words; None if there is none.

        Args:
            text: A text of the corpus.
            prompt: It is a prompt, so it may also repeat a short question as a whole.
        """
        found = _plain_words(text)
        if prompt and tuple(found[: 2 * self.ngram]) in self._short:
            return " ".join(found)
        hashes = self._ngram_hashes(found)
        maybe = np.flatnonzero(self._beginnings[hashes >> _FIRST_BITS])
        nearest = self._hashes.take(np.searchsorted(self._hashes, hashes[maybe]), mode="clip")
        hits = maybe[nearest == hashes[maybe]]
        return " ".join(found[hits[0] : hits[0] + self.ngram]) if len(hits) else None

    def _read(self, file: str, prompts: dict[str, int]) -> Iterator[NDArray[np.uint64]]:
        """Hashes and the number of their prompt, two rows, for each text of a file."""
        total = []
        for row in rows(file):
            # The messages of a prompt are one text, as in the corpus.
            questions = ["\n".join(_texts(row.fields.get(field))) for field in QUESTIONS]
            answers = [text for field in ANSWERS for text in _texts(row.fields.get(field))]
            owner = prompts.setdefault(prompt_id("\n".join(questions).strip() or row.place), len(prompts))
            for text in (*questions, *answers):
                found = _plain_words(text)
                self._codes.update({word: _code(word) for word in found if word not in self._codes})
                hashes = np.unique(self._ngram_hashes(found))
                hashes = hashes[hashes != 0]
                total.append(hashes)
                yield np.stack([hashes, np.full_like(hashes, owner)])
                if found and not len(hashes) and text in questions:
                    self._short.add(tuple(found))
        if not (self._short or any(map(len, total))):
            fields = ", ".join(QUESTIONS + ANSWERS)
            raise InputError(f"{file}: expected texts of an evaluation set in one of the fields {fields}; found none")
        self.ngrams[file] = len(np.unique(np.concatenate(total)))

    def _ngram_hashes(self, found: list[str]) -> Hashes:
        """The hash of the n-gram at each word; 0 where there is none. Words of no evaluation set count as 0."""
        codes = np.fromiter(map(self._codes.get, found, repeat(0)), np.uint64, len(found))
        hashes = _rolling(codes, self.ngram)
        unspaced = codes & np.uint64(1)
        if unspaced.any():
            mostly = _rolling(unspaced, self.ngram, np.uint64(1)) > self.ngram // 2
            longer = np.zeros_like(hashes)
            doubled = _rolling(codes, 2 * self.ngram)
            longer[: len(doubled)] = doubled
            hashes[mostly] = longer[mostly]
        return hashes


def _rolling(codes: Hashes, n: int, multiplier: np.uint64 = _MULTIPLIER) -> Hashes:
    """The polynomial hash (modulo 2^64) of every n consecutive codes."""
    count = max(len(codes) - n + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for i in range(n):
        hashes = hashes * multiplier + codes[i : i + count]
    return hashes


def _code(word: str) -> int:
    """A number for a word, the same in every process; it is odd for characters of scripts without spaces."""
    number = int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    unspaced = len(word) == 1 and word > "\u3000"
    return number | 1 if unspaced else (number & ~1) or 2


def _plain_words(text: str) -> list[str]:
    return [word for word in words(text) if len(word) > 1 or word.isalnum()]


def _texts(value: object) -> Iterator[str]:
    """All strings in a field: the text itself, the contents of messages, or either of these in a list."""
    if isinstance(value, str):
        yield from list(_texts(json_list(value))) or [value]
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item.get("content", item.get("text")) if isinstance(item, dict) else item)
