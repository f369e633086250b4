"""Prompt and answers of a row, separated by the same rules for training, scoring, evaluation and rft-data.

Some data sets repeat the prompt in every answer, others leave it out:

| prompt of the row | answers of the row | prompt | answers |
|---|---|---|---|
| q | a, or [assistant: a] | q | as they are |
| q | [user: q, assistant: a] | [user: q] | [assistant: a] |
| q | [system: s, user: q, assistant: a] | [system: s, user: q] | [assistant: a] |
| none | [user: q, assistant: a], [user: q, assistant: b] | [user: q] | [assistant: a], [assistant: b] |

The prompt is all that the conversations of a row have in common; of a single one it goes to the prompt of the row, or
to the last turn of the user. White space makes no difference between the two prompts. Where they are not the same, or
an answer ends with a turn of the user, the row is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from polar.core.errors import InputError
from polar.core.records import Message, Text, text_of
from polar.data.fields import Row, describe, string_at

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
ASKING, SYSTEM = ("user", "human"), ("system", "developer")

Dialogue = tuple[Message, ...]


class TurnsError(InputError):
    """The turns of a dialogue are out of order."""


def split(row: Row, prompt: Text | None, answers: Mapping[str, Text]) -> tuple[Text, tuple[Text, ...]]:
    """Return the prompt of a row and its answers without the prompt, by the table above.

    Args:
        row: Its place, for errors.
        prompt: None where the row has none; then every answer repeats it.
        answers: Answers and references by their places in the row.

    Raises:
        InputError: the conversations do not begin with this prompt, or with the same; an answer ends with a question.
    """
    for where, answer in answers.items():
        if not isinstance(answer, str) and answer[-1].role in ASKING + SYSTEM:
            raise row.error(where, "a last turn of the assistant", f"one of role {answer[-1].role}")
    system, asked = ((), ()) if prompt is None else _apart(prompt)
    dialogues = {where: _apart(answer) for where, answer in answers.items() if _holds_prompt(answer, prompt is None)}
    if not dialogues:
        assert prompt is not None
        return prompt, tuple(answers.values())

    beginning = _beginning(asked, [turns for _, turns in dialogues.values()])
    if not beginning:
        raise InputError(
            f"{row.place}: expected conversations that begin with the same prompt, found nothing in common"
        )
    systems = dict.fromkeys(filter(None, (system, *(own for own, _ in dialogues.values()))))
    if len(systems) > 1:
        raise InputError(f"{row.place}: expected one system message, found another one in {' or '.join(dialogues)}")
    system = next(iter(systems), ())
    if asked and not _same(asked, system, beginning):
        found = describe(text_of(beginning))
        raise row.error(next(iter(dialogues)), "an answer, or a conversation that begins with the prompt", found)
    for where, (_, turns) in dialogues.items():
        if turns[len(beginning)].role in ASKING:
            raise row.error(where, "another answer to the same turns of the user", "another turn of the user")
    rests = {where: turns[len(beginning) :] for where, (_, turns) in dialogues.items()}
    return system + beginning, tuple(rests.get(where, answer) for where, answer in answers.items())


def transcript(row: Row, field: str) -> Dialogue:
    """Return the turns of an HH-RLHF transcript; empty turns are kept.

    Raises:
        TurnsError: turns do not alternate from Human to Assistant.
    """
    before, *pieces = HH_TURN.split(string_at(row, field))
    speakers, contents = pieces[::2], pieces[1::2]
    if before or not speakers or speakers != ["Human", "Assistant"] * (len(speakers) // 2):
        found = describe(before) if before else ", ".join(speakers[-4:])
        raise TurnsError(str(row.error(field, "turns of Human and Assistant in alternation, Assistant last", found)))
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(speakers, contents, strict=True)
    return tuple(Message(roles[speaker], content.removeprefix(" ")) for speaker, content in turns)


def has_question(text: Text) -> bool:
    """Return whether a text is a conversation with a turn of the user."""
    return not isinstance(text, str) and any(message.role in ASKING for message in text)


def _holds_prompt(answer: Text, anywhere: bool) -> bool:
    """Return whether an answer repeats the prompt; beside a prompt, later questions belong to the answer."""
    if not has_question(answer):
        return False
    _, turns = _apart(answer)
    return anywhere or turns[0].role in ASKING


def _apart(text: Text) -> tuple[Dialogue, Dialogue]:
    """Return the system messages at the beginning, and the turns behind them."""
    if isinstance(text, str):
        return (), ((Message("user", text),) if text.strip() else ())
    first = next((number for number, message in enumerate(text) if message.role not in SYSTEM), len(text))
    return text[:first], text[first:]


def _beginning(asked: Dialogue, dialogues: Sequence[Dialogue]) -> Dialogue:
    """Return the prompt in some conversations; the last message of each is always an answer."""
    first, *others = dialogues
    if others:
        most = min(map(len, dialogues)) - 1
        differing = (n for n in range(most) if any(other[n] != first[n] for other in others))
        return first[: next(differing, most)]
    if asked and len(first) > len(asked) and _words(first[: len(asked)]) == _words(asked):
        return first[: len(asked)]
    return first[: max(number for number, message in enumerate(first) if message.role in ASKING) + 1]


def _same(asked: Dialogue, system: Dialogue, beginning: Dialogue) -> bool:
    """Return whether a prompt is the beginning of the conversations, or one question of it (in some data)."""
    questions = (message.content for message in beginning if message.role in ASKING)
    return _words(asked) in (_words(beginning), _words(system + beginning), *map(_words, questions))


def _words(text: Text) -> str:
    return " ".join(text_of(text).split())
