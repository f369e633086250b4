r"""From a row of a public data set to a task: a prompt for the policy, and references for the reward.

Rows are recognised one by one, by their fields, in this order:

| fields | format | reference |
|---|---|---|
| chosen, a transcript | HH-RLHF | the last answer of the chosen dialogue |
| conversations, of from and value [, info] | AM-DeepSeek-R1-Distilled, ShareGPT | the last answer |
| messages, the last one by the assistant | AM-DeepSeek-R1-Distilled, chat data | the last answer |
| problem, solution [, answer] | MATH, OpenR1-Math | the worked solution |
| question, answer | GSM8K, questions and answers | the worked solution |
| prompt, references or reference | our own rows | as they stand |

Thinking is taken out of references and of the answers in a prompt (`polar.core.text`), and an answer between
<answer> and </answer> stands alone. Rows that cannot be used are errors that name a reason of a few words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from polar.core.errors import InputError
from polar.core.records import Message, Text, text_of
from polar.core.text import THINK, opens_thinking, strip_thinking
from polar.data.dialogues import HH_TURN, split, transcript
from polar.data.fields import Row, as_text, json_object, list_at, optional_string, string_at, text_at
from polar.data.formats import named
from polar.rft.sample import references_at

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
BOXED = "Let's think step by step and output the final answer within \\boxed{}."
"""What mathematical problems end with, so that a policy answers as the worked solutions do."""
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
    """The task in a row.

    Args:
        row: A row of one of the formats above.
        reference_column: For rows with a prompt: the column that holds the reference, or a list of several.
        with_references: False: the references of the row are left out, and need not be there.

    Raises:
        UnusableError: the row has no question, no answer, or turns out of order.
        InputError: the row has none of these formats, or a field of another type.
    """
    if isinstance(row.fields.get("chosen"), str) and HH_TURN.match(string_at(row, "chosen")):
        task = _dialogue(row, "hh-rlhf", "alignment", _transcript(row))
    elif row.has("conversations"):
        task = _dialogue(row, "conversations", "general", _conversation(row))
    elif row.has("messages") and not row.has("prompt"):
        task = _dialogue(row, "messages", "general", _messages(row))
    elif row.has("problem"):
        task = _problem(row, with_references)
    elif row.has("question"):
        task = _question(row, with_references)
    else:
        task = _prompted(row, reference_column, with_references)
    if not text_of(task.prompt[-1:]).strip():
        raise UnusableError(row, "empty question")
    if with_references and not all(reference.strip() for reference in task.references):
        raise UnusableError(row, "a reference without an answer (empty, or nothing but thinking)")
    references = task.references if with_references else ()
    return Task(task.source, optional_string(row, "ability") or task.ability, task.prompt, references, task.answer)


def answer_in(text: Text) -> str:
    """The answer in a reference: without thinking, and without <answer> around it; "" if there is none."""
    answer = text_of(strip_thinking(text))
    found = ANSWER.search(answer)
    return found[1].strip() if found else answer


def boxed(solution: str) -> str | None:
    r"""What stands in the last \boxed{} of a solution (braces may nest), or None."""
    start = solution.rfind("\\boxed{")
    if start < 0:
        return None
    start, depth = start + len("\\boxed{"), 1
    for end in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if depth == 0:
            return solution[start:end].strip()
    return None


def _transcript(row: Row) -> Sequence[Message]:
    try:
        return transcript(row, "chosen")
    except InputError as error:
        raise UnusableError(row, "turns out of order") from error


def _conversation(row: Row) -> Sequence[Message]:
    """Turns of {"from", "value" [, "info"]}; info may hold the answer apart from the thinking."""
    messages = []
    for number, turn in enumerate(list_at(row, "conversations", "a list of turns", at_least=1)):
        turn = json_object(turn) or {}
        info = json_object(turn.get("info")) or {}
        content = info.get("answer_content") or turn.get("value", turn.get("content"))
        messages.append({"role": turn.get("from", turn.get("role")), "content": content})
        if messages[-1]["role"] not in ROLES:
            raise row.error(f"conversations[{number}].from", f"one of {', '.join(ROLES)}", str(messages[-1]["role"]))
    return _as_messages(row, "conversations", messages)


def _messages(row: Row) -> Sequence[Message]:
    found = text_at(row, "messages")
    if isinstance(found, str):
        raise row.wrong("messages", "a list of messages")
    return found


def _as_messages(row: Row, field: str, value: object) -> Sequence[Message]:
    messages = as_text(row, field, value)
    assert not isinstance(messages, str)
    return [Message(ROLES.get(message.role, message.role), message.content) for message in messages]


def _dialogue(row: Row, source: str, ability: str, messages: Sequence[Message]) -> Task:
    """The last answer of a dialogue is the reference, what stands before it the prompt."""
    first = next((number for number, message in enumerate(messages) if message.role != "system"), len(messages))
    roles = [message.role for message in messages[first:]]
    if not roles or roles[-1] != "assistant":
        raise UnusableError(row, "no answer at the end")
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise UnusableError(row, "turns out of order")
    return Task(source, ability, _prompt(tuple(messages[:-1])), (answer_in(messages[-1:][0].content),))


def _problem(row: Row, with_references: bool) -> Task:
    solution = string_at(row, "solution") if with_references or row.has("solution") else ""
    prompt = (Message("user", f"{string_at(row, 'problem')} {BOXED}"),)
    return Task("math", "math", prompt, (answer_in(solution),), _short_answer(row) or boxed(solution))


def _question(row: Row, with_references: bool) -> Task:
    question = string_at(row, "question")
    answer = string_at(row, "answer") if with_references or row.has("answer") else ""
    final = FINAL.search(answer)
    if final is None:
        return Task("questions", "general", (Message("user", question),), (answer_in(answer),))
    worked = CALCULATOR.sub("", answer[: final.start()])
    reference = f"{worked}\nThe final answer is \\boxed{{{final[1]}}}."
    return Task("gsm8k", "math", (Message("user", f"{question} {BOXED}"),), (reference,), final[1].replace(",", ""))


def _prompted(row: Row, column: str | None, with_references: bool) -> Task:
    prompt, name = text_at(row, "prompt"), column or ("references" if row.has("references") else "reference")
    prompt, references = split(row, prompt, named(name, references_at(row, name) if with_references else ()))
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    source = optional_string(row, "data_source") or "prompts"
    return Task(source, "general", _prompt(messages), tuple(map(answer_in, references)), _short_answer(row))


def _short_answer(row: Row) -> str | None:
    """The answer beside a reference; often a number."""
    answer = row.fields.get("answer")
    return f"{answer}" if type(answer) in (int, float) else optional_string(row, "answer")


def _prompt(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt as a chat template takes it: earlier answers without thinking, and no open block at the end."""
    if messages and opens_thinking(messages[-1].content):
        rest = messages[-1].content.rstrip().removesuffix(THINK[0])
        kept = (Message(messages[-1].role, rest.rstrip()),) if rest.strip() else ()
        messages = (*messages[:-1], *kept)
    stripped = strip_thinking(messages)
    assert not isinstance(stripped, str)
    return stripped
