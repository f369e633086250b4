r"""From a row of a public data set to a task: a prompt for the policy, and references for the reward.

Rows are recognised by `polar.data.formats`. The reference is the last answer of a dialogue (of the chosen one in
HH-RLHF), the worked solution of a problem or question, and in all other formats a column: references, reference, or one
that is named.

Thinking is taken out of references and of the answers in a prompt (`polar.core.text`), and an answer between
<answer> and </answer> counts alone. Rows that cannot be used are errors that name a reason of a few words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from polar.core.errors import InputError
from polar.core.records import Message, Text, text_of
from polar.core.text import THINK, opens_thinking, strip_thinking
from polar.data import formats
from polar.data.dialogues import TurnsError, split
from polar.data.fields import Row, optional_string
from polar.data.formats import Content

BOXED = "Let's think step by step and output the final answer within \\boxed{}."
"""End of mathematical problems, so that a policy answers as the worked solutions do."""
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FINAL = re.compile(r"\n?####\s*(.+?)\s*$")
CALCULATOR = re.compile(r"<<.*?>>")


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt of reinforcement fine-tuning."""

    source: str
    """The data set."""
    ability: str
    prompt: tuple[Message, ...]
    references: tuple[str, ...]
    """Empty where they are asked for later."""
    answer: str | None = None
    """The short answer that a verifier would check, where the data have one."""


class UnusableError(InputError):
    """The row is well-formed, but no task."""

    def __init__(self, row: Row, reason: str) -> None:
        super().__init__(f"{row.place}: {reason}")
        self.reason = reason
        """A few words, the same for all rows of the kind."""


def read_task(row: Row, *, reference_column: str | None = None, with_references: bool = True) -> Task:
    """Return the task in a row.

    Args:
        row: A row of a format of `polar.data.formats`.
        reference_column: The column with the reference, or a list of several, of rows that are neither dialogues nor
            worked problems.
        with_references: False leaves the references of the row out; they need not be there.

    Raises:
        UnusableError: the row has no question, no answer, or turns out of order.
        InputError: the row has none of these formats, or a field of another type.
    """
    try:
        found = formats.recognise(row)
    except TurnsError as error:
        raise UnusableError(row, "turns out of order") from error
    match found.format:
        case formats.HH_RLHF:
            task = _dialogue(row, "hh-rlhf", "alignment", found)
        case formats.CONVERSATIONS | formats.MESSAGES:
            task = _dialogue(row, found.format, "general", found)
        case formats.PROBLEM:
            task = _problem(row, found, _solution(row, found, "solution", with_references))
        case formats.QUESTION:
            task = _question(found, _solution(row, found, "answer", with_references))
        case _:
            task = _prompted(row, found, reference_column, with_references)
    if not text_of(task.prompt[-1:]).strip():
        raise UnusableError(row, "empty question")
    if with_references and not all(reference.strip() for reference in task.references):
        raise UnusableError(row, "a reference without an answer (empty, or nothing but thinking)")
    references = task.references if with_references else ()
    return Task(task.source, optional_string(row, "ability") or task.ability, task.prompt, references, task.answer)


def answer_in(text: Text) -> str:
    """Return the answer in a reference, without thinking and without <answer> around it; "" if there is none."""
    answer = text_of(strip_thinking(text))
    found = ANSWER.search(answer)
    return found[1].strip() if found else answer


def boxed(solution: str) -> str | None:
    r"""Return the content of the last \boxed{} of a solution (braces may nest), or None."""
    start = solution.rfind("\\boxed{")
    if start < 0:
        return None
    start, depth = start + len("\\boxed{"), 1
    for end in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if depth == 0:
            return solution[start:end].strip()
    return None


def _dialogue(row: Row, source: str, ability: str, found: Content) -> Task:
    """Return the last answer of a dialogue as the reference, and the turns before it as the prompt."""
    messages = found.candidates[0]
    assert not isinstance(messages, str)
    first = next((number for number, message in enumerate(messages) if message.role != "system"), len(messages))
    roles = [message.role for message in messages[first:]]
    if not roles or roles[-1] != "assistant":
        raise UnusableError(row, "no answer at the end")
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise UnusableError(row, "turns out of order")
    return Task(source, ability, _prompt(messages[:-1]), (answer_in(messages[-1].content),))


def _solution(row: Row, found: Content, field: str, needed: bool) -> str:
    """Return the worked solution of a row, or "" where it has none and needs none."""
    if needed and not found.answers:
        raise row.wrong(field, "a string")
    return str(found.answers.get(field, ""))


def _problem(row: Row, found: Content, solution: str) -> Task:
    prompt = (Message("user", f"{found.prompt} {BOXED}"),)
    return Task("math", "math", prompt, (answer_in(solution),), _short_answer(row) or boxed(solution))


def _question(found: Content, answer: str) -> Task:
    question = str(found.prompt)
    final = FINAL.search(answer)
    if final is None:
        return Task("questions", "general", (Message("user", question),), (answer_in(answer),))
    worked = CALCULATOR.sub("", answer[: final.start()])
    reference = f"{worked}\nThe final answer is \\boxed{{{final[1]}}}."
    return Task("gsm8k", "math", (Message("user", f"{question} {BOXED}"),), (reference,), final[1].replace(",", ""))


def _prompted(row: Row, found: Content, column: str | None, with_references: bool) -> Task:
    name = column or ("references" if row.has("references") else "reference")
    references = formats.named(name, formats.references_at(row, name) if with_references else ())
    answers = {place: text for place, text in found.answers.items() if place not in references}
    prompt, texts = split(row, found.prompt, references | answers)
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    source = optional_string(row, "data_source") or "prompts"
    own = tuple(map(answer_in, texts[: len(references)]))
    return Task(source, "general", _prompt(messages), own, _short_answer(row))


def _short_answer(row: Row) -> str | None:
    """Return the short answer beside a reference, often a number."""
    answer = row.fields.get("answer")
    return f"{answer}" if type(answer) in (int, float) else optional_string(row, "answer")


def _prompt(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the prompt as a chat template takes it: earlier answers without thinking, no open block at the end."""
    if messages and opens_thinking(messages[-1].content):
        rest = messages[-1].content.rstrip().removesuffix(THINK[0])
        kept = (Message(messages[-1].role, rest.rstrip()),) if rest.strip() else ()
        messages = (*messages[:-1], *kept)
    stripped = strip_thinking(messages)
    assert not isinstance(stripped, str)
    return stripped
