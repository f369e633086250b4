"""The task: word problems with small numbers. Prompts, wordings, and the rules that policies follow, right and wrong.

Answers are said in digits or in words ("31", "thirty-one"), in one of several wordings. Held-out problems are
other texts; their numbers are small, so most pairs of numbers occur on both sides.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

NAMES = "Ann Ben Cleo Dan Eva Finn Gina Hugo".split()
THINGS = "apples books coins eggs keys pens shells stamps".split()
PROBLEMS = {
    "+": (
        "{name} has {a} {things} and gets {b} more.",
        "There are {a} {things} and {name} adds {b}.",
        "{name} finds {a} {things}, then {b} more.",
    ),
    "-": (
        "{name} has {a} {things} and gives {b} away.",
        "There are {a} {things} and {name} takes {b}.",
        "{name} finds {a} {things}, then loses {b}.",
    ),
}
WORDINGS = (
    "The answer is {x}.",
    "{name} has {x} {things}.",
    "That makes {x} {things}.",
    "There are {x} now.",
    "It must be {x}.",
    "I count {x} {things}.",
)
SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty".split()
LARGEST = 12
HELD_OUT_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class Problem:
    """One word problem."""

    text: str
    name: str
    things: str
    sign: str
    a: int
    b: int

    @property
    def answer(self) -> int:
        """The right one."""
        return self.a + self.b if self.sign == "+" else self.a - self.b


def draw_problem(random: Random, *, held_out: bool) -> Problem:
    """A problem whose text is, or is not, among the held-out ones."""
    while True:
        sign, a, b = random.choice("+-"), random.randint(1, LARGEST), random.randint(1, LARGEST)
        if sign == "-" and a < b:
            a, b = b, a
        name, things = random.choice(NAMES), random.choice(THINGS)
        text = random.choice(PROBLEMS[sign]).format(name=name, things=things, a=a, b=b)
        if is_held_out(text) == held_out:
            return Problem(text, name, things, sign, a, b)


def is_held_out(text: str) -> bool:
    """Whether a problem is kept for the evaluation: a part of the texts, the same ones for every seed."""
    return zlib.crc32(text.encode()) < HELD_OUT_SHARE * 2**32


RULES: dict[str, Callable[[Problem], int]] = {
    "right": lambda problem: problem.answer,
    "one-more": lambda problem: problem.answer + 1,
    "ten-more": lambda problem: problem.answer + 10,
    "wrong-sign": lambda problem: problem.a + problem.b if problem.sign == "-" else abs(problem.a - problem.b),
    "first": lambda problem: problem.a,
}
"""Rule -> the answer of somebody who follows it. Now and then a wrong rule gives the right answer."""


def in_words(number: int) -> str:
    """0 to 59 in English."""
    if number < 20:
        return SMALL[number]
    tens, rest = divmod(number, 10)
    return TENS[tens - 2] + (f"-{SMALL[rest]}" if rest else "")


def say(problem: Problem, number: int, wording: str, *, digits: bool) -> str:
    """An output that gives this number as the answer."""
    said = str(number) if digits else in_words(number)
    return wording.format(x=said, name=problem.name, things=problem.things)


_NUMBERS = {in_words(number): number for number in range(60)}
_SAID = re.compile(r"\d+|" + "|".join(sorted(_NUMBERS, key=len, reverse=True)))


def number_in(output: str) -> int | None:
    """The last number that an output says, in digits or in words; None if there is none."""
    found = _SAID.findall(output)
    return None if not found else _NUMBERS[found[-1]] if found[-1] in _NUMBERS else int(found[-1])


@dataclass(frozen=True, slots=True)
class Speaker:
    """How somebody answers: which rules, which wordings, and how often in digits."""

    rules: dict[str, float]
    """Rule -> how often it is followed (weights)."""
    wordings: Sequence[float] = (1.0,) * len(WORDINGS)
    digits: float = 1.0

    def answer(self, problem: Problem, random: Random) -> str:
        """One output."""
        (rule,) = random.choices(list(self.rules), list(self.rules.values()))
        (wording,) = random.choices(WORDINGS, self.wordings)
        return say(problem, RULES[rule](problem), wording, digits=random.random() < self.digits)
