"""Rewards without a model: baselines that a reward model has to beat before its accuracy means anything."""

from __future__ import annotations

import math
import re
from collections import Counter

from polar.core.records import Group, text_of

# Scripts that are written without spaces: Chinese characters (with the iteration mark and zero), kana, and their
# supplementary planes. Each such character counts as a word.
_UNSPACED = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-cased words, punctuation marks, and single Chinese and Japanese characters."""
    return _WORD.findall(text.lower())


def chance(group: Group) -> list[float]:
    """The same reward for every candidate: all are tied, so the accuracy is 0.5 by definition."""
    return [0.0] * len(group.candidates)


def length(group: Group) -> list[float]:
    """Closeness in length: minus the absolute log ratio of the characters of candidate and reference, each plus one."""
    reference = len(text_of(group.reference))
    return [-abs(math.log((len(text_of(candidate)) + 1) / (reference + 1))) for candidate in group.candidates]


def unigram_f1(group: Group) -> list[float]:
    """F1 of the candidate's bag of words with that of the reference, 0 to 1; two texts without words have 1."""
    reference = Counter(words(text_of(group.reference)))
    return [_f1(Counter(words(text_of(candidate))), reference) for candidate in group.candidates]


def first_word(group: Group) -> list[float]:
    """1 for a candidate that begins with the same word as the reference, else 0; two texts without words agree."""
    reference = _first_word(text_of(group.reference))
    return [float(_first_word(text_of(candidate)) == reference) for candidate in group.candidates]


def rouge_l(group: Group) -> list[float]:
    """F1 of the longest common subsequence of words with the reference, 0 to 1 (Lin 2004); needs rapidfuzz.

    The same number as rouge-score's rougeL with our `words`, which also splits Chinese; rapidfuzz finds the
    subsequence about a hundred times as fast.
    """
    from rapidfuzz.distance import LCSseq

    reference = words(text_of(group.reference))
    rewards = []
    for candidate in group.candidates:
        found = words(text_of(candidate))
        total = len(reference) + len(found)
        rewards.append(2 * LCSseq.similarity(reference, found) / total if total else 1.0)
    return rewards


def chrf(group: Group) -> list[float]:
    """Sacrebleu's chrF2 with the reference, 0 to 100 (Popović 2015); needs sacrebleu."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    reference = [text_of(group.reference)]
    return [float(metric.sentence_score(text_of(candidate), reference).score) for candidate in group.candidates]


def _first_word(text: str) -> str | None:
    found = _WORD.search(text)
    return found and found[0].lower()


def _f1(candidate: Counter[str], reference: Counter[str]) -> float:
    total = candidate.total() + reference.total()
    return 2 * (candidate & reference).total() / total if total else 1.0


BASELINES = {"unigram F1": unigram_f1, "length": length, "chance": chance}
"""Those that need no library, by the name that tables show."""
