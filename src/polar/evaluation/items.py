"""What is scored: an item is one group of candidates with what is known about them."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from polar.core.records import Group, Text, prompt_id, text_of
from polar.evaluation.manifest import Task
from polar.evaluation.records import SHARD_ITEMS

SHOWN_DIGITS = 16
STRETCH_CHARACTERS = 1 << 25
"""Most characters of a stretch, about: candidates may be many and long."""


@dataclass(frozen=True, slots=True)
class Item:
    """One group with the labels of its candidates; see `Record` for the meaning of the fields."""

    task: Task
    group: Group
    """With the first reference."""
    quality: tuple[float, ...]
    reference_source: str
    policies: tuple[str | None, ...]
    families: tuple[str | None, ...]
    reference_policy: str | None = None
    reference_family: str | None = None
    reference_quality: float | None = None
    domain: str | None = None
    slices: tuple[str, ...] = ()
    further_references: tuple[Text, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """One for each reference."""
        return (self.group, *(replace(self.group, reference=reference) for reference in self.further_references))

    @property
    def prompt_id(self) -> str:
        """Items of one prompt are one cluster."""
        return prompt_id(self.group.prompt)

    @property
    def characters(self) -> int:
        """Of all its texts."""
        return sum(map(len, self.texts))

    @property
    def texts(self) -> list[str]:
        """Of prompt, references and candidates, in this order."""
        group = self.group
        return [text_of(text) for text in (group.prompt, group.reference, *self.further_references, *group.candidates)]

    def digest(self) -> bytes:
        """A hash of everything that the item says."""
        group = self.group
        labels = [self.policies, self.families, self.reference_policy, self.reference_family, self.reference_quality]
        texts = [self.texts, len(self.further_references)]
        content = [self.task, *texts, group.id, group.wrapper, self.quality, *labels, self.domain, self.slices]
        payload = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
        return hashlib.sha256(payload).digest()


def fingerprint(digests: Iterable[bytes]) -> str:
    """Sixteen hexadecimal digits for a sequence of digests."""
    return hashlib.sha256(b"".join(digests)).hexdigest()[:SHOWN_DIGITS]


def stretches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Cut a stream into what is scored and written together; the same items are always cut at the same places."""
    stretch: list[Item] = []
    characters = 0
    for item in items:
        stretch.append(item)
        characters += item.characters
        if len(stretch) == SHARD_ITEMS or characters >= STRETCH_CHARACTERS:
            yield stretch
            stretch, characters = [], 0
    if stretch:
        yield stretch


def sample(items: Iterable[Item], limit: int | None) -> Iterable[Item]:
    """At most `limit` items in their order, always the same ones, from the whole stream: files are often sorted.

    They are those with the smallest hashes, so two data sets that share items choose alike. Holds `limit` items.
    """
    if limit is None:
        return items
    drawn = heapq.nsmallest(limit, enumerate(items), key=lambda pair: (pair[1].digest(), pair[0]))
    return [item for _, item in sorted(drawn, key=lambda pair: pair[0])]
