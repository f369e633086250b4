"""From one row of a data file to its prompt and answers: the one table of formats for all commands.

A row of our own has the fields of the record (`polar.core.records`). Other rows are recognised one by one, by their
fields, in this order; training, evaluation and `polar rft-data` read them the same way:

| fields | format | answers and their quality, higher is better |
|---|---|---|
| conversation_input with bon_best, loser_list, or with chosen, reject | RMB | 1 and 0 |
| response_A, response_B, label, question | JudgeBench | 1 and 0 |
| prompt, response_1, response_2, ... with scores or winner | PPE | the scores; 1 and 0 |
| prompt, candidates, quality | graded candidates (this project) | as given |
| prompt, output, quality | graded output (this project) | as given; consecutive rows of a prompt are one item |
| prompt, ranked | ranked list (this project) | by rank, best first |
| chosen and rejected without prompt | HH-RLHF transcripts, TRL implicit prompt | 1 and 0 |
| prompt, chosen, rejected, both lists of strings | RewardBench 2, RM-Bench | 1 and 0 |
| prompt, chosen, rejected | POLAR pairs, RewardBench, TRL explicit prompt | 1 and 0 |
| prompt, response_a, response_b, winner_* | arena pairs (lmarena-ai) | 1 and 0 |
| prompt or context, completions with quality, score, is_correct or rank | UltraFeedback, Nectar, NeMo-RL | as given |
| conversations, of from and value [, info] | AM-DeepSeek-R1-Distilled, ShareGPT | one answer |
| messages without prompt | AM-DeepSeek-R1-Distilled, chat data | one answer |
| problem, solution [, answer] | MATH, OpenR1-Math | one answer |
| question, answer | GSM8K, questions and answers | one answer |
| prompt | a prompt | none |

A quality is a number, or true and false. All may have id, margin, domain (or subset), policies and wrapper beside. Only
`polar rft-data` takes rows with fewer than two answers. POLAR scores against a reference: data without one need the
name of the column that holds it, and no answer of a row is ever taken for its reference. Where answers repeat the
prompt, it is taken out of them (`polar.data.dialogues`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from polar.core.errors import InputError
from polar.core.records import Message, Preference, Text, Wrapper
from polar.data.dialogues import HH_TURN, Dialogue, has_question, split, transcript
from polar.data.fields import (
    TEXT,
    Row,
    as_number,
    as_string,
    as_text,
    describe,
    json_list,
    json_object,
    list_at,
    optional_string,
    string_at,
    text_at,
    texts_at,
)

WINNERS = ("winner_model_a", "winner_model_b", "winner_tie")
GRADES = ("quality", "score", "is_correct", "rank")
COMPLETION_TEXTS = ("text", "response", "completion", "output")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ANSWER = re.compile(
    "output|candidates|chosen|rejected|reject|ranked|completions|bon_best|loser_list|positive|negative|response_([abAB]|\\d+)"
)
"""Columns of answers."""

HH_RLHF, CONVERSATIONS, MESSAGES = "HH-RLHF transcripts", "conversations", "messages"
PROBLEM, QUESTION, SCORED = "problem and solution", "question and answer", "scored answers"


class TieError(InputError):
    """The row is sound but prefers no answer (a tie): it is always skipped and counted."""


@dataclass(frozen=True, slots=True)
class Content:
    """Prompt and answers of a row, before they have a reference."""

    format: str
    prompt: Text | None
    """None where every answer repeats it."""
    answers: dict[str, Text]
    """By their places in the row."""
    quality: tuple[float, ...]
    """Of every answer."""
    domain: str | None = None
    id: str | None = None
    policies: tuple[str | None, ...] | None = None

    @property
    def candidates(self) -> tuple[Text, ...]:
        """The answers without their places."""
        return tuple(self.answers.values())


def recognise(row: Row) -> Content:
    """Return prompt and answers of a row in any of the formats above.

    Raises:
        InputError: the row has none of the formats, or a field of it is wrong.
    """
    if row.has("conversation_input"):
        found = _rmb(row)
    elif row.has("response_A"):
        found = _judgebench(row)
    elif row.has("response_1"):
        found = _ppe(row)
    elif row.has("candidates") and row.has("quality"):
        answers = named("candidates", texts_at(row, "candidates", at_least=1))
        quality = _numbers(row, "quality", len(answers))
        found = Content("graded candidates", text_at(row, "prompt"), answers, quality)
    elif is_graded_output(row):
        quality = (_number(row, "quality", row.fields["quality"]),)
        answers, policies = {"output": text_at(row, "output")}, (optional_string(row, "policy"),)
        found = Content("graded output", text_at(row, "prompt"), answers, quality, policies=policies)
    elif row.has("ranked"):
        answers = named("ranked", texts_at(row, "ranked", at_least=2))
        quality = tuple(map(float, reversed(range(len(answers)))))
        found = Content("ranked list", text_at(row, "prompt"), answers, quality)
    elif row.has("chosen") or row.has("rejected"):
        found = _pair(row)
    elif row.has("response_a") or row.has("response_b"):
        found = _arena(row)
    elif row.has("completions"):
        found = _completions(row)
    elif row.has("conversations"):
        found = Content(CONVERSATIONS, None, {"conversations": _conversation(row)}, (1.0,))
    elif row.has("messages") and not row.has("prompt"):
        found = Content(MESSAGES, None, {"messages": _messages(row, "messages", "a list of messages")}, (1.0,))
    elif row.has("problem"):
        found = _worked(row, PROBLEM, "problem", "solution")
    elif row.has("question"):
        found = _worked(row, QUESTION, "question", "answer")
    elif row.has("prompt"):
        found = Content("prompt", text_at(row, "prompt"), {}, ())
    else:
        raise InputError(
            f'{row.place}: expected a field "prompt", or a preference (chosen and rejected, ranked, response_a and '
            f"response_b, or completions), found the fields {json.dumps(sorted(row.fields))}"
        )
    return _labelled(row, found)


def preference(row: Row, reference_column: str | None) -> tuple[str, list[Preference]]:
    """Return the format of a row and its preferences: a ranked list, or all pairs of answers of different quality.

    Raises:
        InputError: the row has no two answers, no reference, or a wrong field.
        TieError: no answer is better than another.
    """
    found = recognise(row)
    require_several(row, found)
    require_order(row, found)
    rankings, margin = _rankings(found), optional_number(row, "margin")
    if margin is not None and margin < 0:
        raise row.error("margin", "0 or more (chosen is the better answer)", f"{margin:g}")
    reference = reference_at(row, reference_column)
    prompt, (reference, *answers) = split(row, found.prompt, {"reference": reference, **found.answers})
    repeated = found.prompt is not None and prompt is not found.prompt
    preferences = [
        Preference(
            prompt,
            reference,
            tuple(answers[place] for place in places),
            gap if found.format == SCORED else margin,
            found.domain,
            wrapper_of(row),
        )
        for places, gap in rankings
    ]
    return f"{found.format}, repeated in the answers" if repeated else found.format, preferences


def _rankings(found: Content) -> list[tuple[tuple[int, ...], float]]:
    """Return numbers of answers, best first, and how far the quality of the first two is apart."""
    quality, scored = found.quality, found.format == SCORED
    order = sorted(range(len(quality)), key=quality.__getitem__, reverse=not scored)
    if found.format in ("ranked list", "NeMo-RL") and len(set(quality)) == len(quality):
        return [(tuple(order), quality[order[0]] - quality[order[1]])]
    pairs = [(second, first) if scored else (first, second) for first, second in combinations(order, 2)]
    return [((better, worse), gap) for better, worse in pairs if (gap := quality[better] - quality[worse]) > 0]


def require_order(row: Row, found: Content) -> None:
    """Raise a `TieError` when no answer is better than another, so that no reward can be right or wrong."""
    if len(set(found.quality)) < 2:
        raise TieError(f"{row.place}: a tie: all answers have the same quality")


def require_several(row: Row, found: Content) -> None:
    """Raise an error when there is nothing to choose from."""
    if len(found.answers) < 2:
        raise InputError(
            f"{row.place}: expected two answers or more (chosen and rejected, ranked, candidates with quality, ...), "
            f"found {len(found.answers)} ({found.format})"
        )


def is_graded_output(row: Row) -> bool:
    """Return whether a row has one output with its quality; other rows of the same prompt have more."""
    return row.has("output") and "quality" in row.fields and not row.has("candidates")


def is_answer(column: str | None) -> bool:
    """Return whether a column holds answers that are scored, and so no reference."""
    return column is not None and ANSWER.fullmatch(column) is not None


# Fields that several formats share


def reference_at(row: Row, reference_column: str | None) -> Text:
    """Return the reference of a row.

    Raises:
        InputError: the row has none, or the column holds answers.
    """
    if reference_column is not None and is_answer(reference_column):
        raise row.error(reference_column, "reference_column to name an independent reference", "an answer to be scored")
    if reference_column is None and not row.has("reference"):
        option = "POLAR scores against a reference: name the column that holds it with reference_column"
        raise InputError(f"{row.wrong('reference', TEXT)}; {option}")
    return text_at(row, reference_column or "reference")


def references_at(row: Row, field: str) -> tuple[Text, ...]:
    """Return the references in a required field: a text, or a list that is not one of messages and holds several."""
    value = row.fields.get(field)
    several = isinstance(value, list) and not all(isinstance(item, dict) for item in value)
    return texts_at(row, field, at_least=1) if several else (text_at(row, field),)


def named(field: str, texts: Sequence[Text]) -> dict[str, Text]:
    """Return the texts of a list by their places in the row."""
    return {f"{field}[{number}]": text for number, text in enumerate(texts)}


def wrapper_of(row: Row) -> Wrapper:
    """Return how prompt and response of a row are joined; "sft" when it does not say."""
    wrapper = row.fields["wrapper"] if row.has("wrapper") else "sft"
    if wrapper not in ("sft", "pretrain"):
        raise row.wrong("wrapper", '"sft" or "pretrain"')
    return wrapper


def optional_number(row: Row, field: str) -> float | None:
    """Return the number in a field, or None when the field is absent."""
    return as_number(row, field, row.fields[field]) if row.has(field) else None


def _labelled(row: Row, found: Content) -> Content:
    domain = found.domain or optional_string(row, "domain" if row.has("domain") else "subset")
    policies = found.policies
    if row.has("policies"):
        policies = tuple(None if one is None else str(one) for one in list_at(row, "policies", "a list of names", 1))
        if len(policies) != len(found.answers):
            raise row.error("policies", f"one name for each of {len(found.answers)} answers", f"{len(policies)}")
    return replace(found, domain=domain, id=found.id or _name(row, "id"), policies=policies)


def _name(row: Row, *fields: str) -> str | None:
    return next((str(row.fields[field]) for field in fields if row.has(field)), None)


def _numbers(row: Row, field: str, count: int) -> tuple[float, ...]:
    values = list_at(row, field, "a list of numbers", 1)
    if len(values) != count:
        raise row.error(field, f"one number for each of {count} candidates", f"{len(values)}")
    return tuple(_number(row, f"{field}[{i}]", value) for i, value in enumerate(values))


def _number(row: Row, where: str, value: object) -> float:
    return float(value) if isinstance(value, bool) else as_number(row, where, value)


def _messages(row: Row, field: str, expected: str) -> Dialogue:
    found = text_at(row, field)
    if isinstance(found, str):
        raise row.wrong(field, expected)
    return found


# Benchmarks: RMB, JudgeBench, PPE


def _rmb(row: Row) -> Content:
    best, losers = ("bon_best", "loser_list") if row.has("bon_best") else ("chosen", "reject")
    worse = row.fields.get(losers)
    values = {best: row.fields.get(best)}
    values |= {f"{losers}[{i}]": one for i, one in enumerate(worse)} if isinstance(worse, list) else {losers: worse}
    answers, policies = {}, []
    for place, value in values.items():
        if not isinstance(value, dict):
            raise row.error(place, "an object with answer and llm_name", describe(value))
        answers[f"{place}.answer"] = as_text(row, f"{place}.answer", value.get("answer"))
        policies.append(str(value.get("llm_name")))
    quality = (1.0, *(0.0 for _ in range(len(answers) - 1)))
    domain, name = optional_string(row, "category_path"), _name(row, "bon_uid", "pair_uid")
    return Content("RMB", text_at(row, "conversation_input"), answers, quality, domain, name, tuple(policies))


def _judgebench(row: Row) -> Content:
    label = string_at(row, "label")
    if label not in ("A>B", "B>A"):
        raise row.error("label", '"A>B" or "B>A"', describe(label))
    answers = {field: text_at(row, field) for field in ("response_A", "response_B")}
    quality = (1.0, 0.0) if label == "A>B" else (0.0, 1.0)
    domain = optional_string(row, "source")
    return Content("JudgeBench", text_at(row, "question"), answers, quality, domain, _name(row, "pair_id"))


def _ppe(row: Row) -> Content:
    count = 1
    while row.has(f"response_{count + 1}"):
        count += 1
    answers = {field: text_at(row, field) for field in (f"response_{number}" for number in range(1, count + 1))}
    prompt, name = text_at(row, "prompt"), _name(row, "question_id")
    if row.has("scores"):
        return Content("PPE", prompt, answers, _numbers(row, "scores", count), id=name)
    winner, tie = string_at(row, "winner"), (0.0, 0.0)
    if (winner not in ("model_a", "model_b") and not winner.startswith("tie")) or count != 2:
        raise row.error("winner", '"model_a", "model_b" or "tie" beside two responses', describe(winner))
    quality = {"model_a": (1.0, 0.0), "model_b": (0.0, 1.0)}.get(winner, tie)
    policies = optional_string(row, "model_a"), optional_string(row, "model_b")
    return Content("PPE", prompt, answers, quality, id=name, policies=policies)


# Pairs: POLAR, TRL, RewardBench, HH-RLHF


def _pair(row: Row) -> Content:
    chosen, rejected = row.fields.get("chosen"), row.fields.get("rejected")
    prompt = text_at(row, "prompt") if row.has("prompt") else None
    fields, quality = ("chosen", "rejected"), (1.0, 0.0)
    if isinstance(chosen, str) and HH_TURN.match(chosen) and (prompt is None or HH_TURN.match(str(rejected))):
        present = fields[: 1 + row.has("rejected")]
        return Content(HH_RLHF, prompt, {field: transcript(row, field) for field in present}, quality[: len(present)])
    if prompt is None:
        return Content("TRL implicit prompt", None, {field: _with_question(row, field) for field in fields}, quality)
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], str):
        good, bad = (named(field, texts_at(row, field, at_least=1)) for field in fields)
        return Content("RewardBench 2", prompt, good | bad, (1.0,) * len(good) + (0.0,) * len(bad))
    name = "POLAR pairs" if row.has("reference") else "RewardBench" if row.has("subset") else "TRL explicit prompt"
    return Content(name, prompt, {field: text_at(row, field) for field in fields}, quality)


def _with_question(row: Row, field: str) -> Text:
    expected = "a list of messages that begins with the prompt (or a field prompt beside it)"
    messages = _messages(row, field, expected)
    if not has_question(messages):
        raise row.wrong(field, expected)
    return messages


# Arena pairs


def _arena(row: Row) -> Content:
    won = [name for name in WINNERS if row.fields.get(name) == 1]
    if len(won) != 1:
        raise row.error("winner_*", f"1 in one of {', '.join(WINNERS)}", f"it in {len(won)}")
    prompts = _turns(row, "prompt")
    fields = ("response_b", "response_a") if won == ["winner_model_b"] else ("response_a", "response_b")
    answers: dict[str, Text] = {field: _dialogue(row, prompts, field) for field in fields}
    return Content("arena pairs", None, answers, (0.0, 0.0) if won == ["winner_tie"] else (1.0, 0.0))


def _dialogue(row: Row, prompts: Sequence[str], field: str) -> Dialogue:
    responses = _turns(row, field)
    if len(responses) != len(prompts):
        raise row.error(field, f"as many turns as the prompt has ({len(prompts)})", str(len(responses)))
    turns = zip(prompts, responses, strict=True)
    return tuple(message for ask, answer in turns for message in (Message("user", ask), Message("assistant", answer)))


def _turns(row: Row, field: str) -> list[str]:
    """Return the turns in a field: a string, or JSON for a list of strings (a null among them is a missing answer)."""
    turns = row.fields.get(field)
    if isinstance(turns, str):
        listed = json_list(turns)
        turns = listed if listed and all(item is None or isinstance(item, str) for item in listed) else [turns]
    if not isinstance(turns, list) or not turns:
        raise row.wrong(field, "a string or a list of strings, one per turn")
    return [as_string(row, f"{field}[{i}]", turn) for i, turn in enumerate(turns)]


# Several graded answers: NeMo-RL, UltraFeedback, Nectar


def _completions(row: Row) -> Content:
    answers: dict[str, Text] = {}
    quality: list[float] = []
    grade = ""
    for i, value in enumerate(list_at(row, "completions", "a list of completions", at_least=2)):
        where, completion = f"completions[{i}]", json_object(value)
        if completion is None:
            raise row.error(where, "an object", describe(value))
        text = next((name for name in COMPLETION_TEXTS if completion.get(name) is not None), "text")
        grade = grade or next((name for name in GRADES if completion.get(name) is not None), "score")
        answers[f"{where}.{text}"] = as_text(row, f"{where}.{text}", completion.get(text))
        number = _number(row, f"{where}.{grade}", completion.get(grade))
        quality.append(-number if grade == "rank" else number)
    name = {"rank": "NeMo-RL", "score": SCORED}.get(grade, "graded completions")
    return Content(name, text_at(row, "prompt" if row.has("prompt") else "context"), answers, tuple(quality))


# One answer: dialogues, mathematics, questions


def _conversation(row: Row) -> Dialogue:
    """Return turns of {"from", "value" [, "info"]}; info may hold the answer apart from the thinking."""
    messages = []
    for number, value in enumerate(list_at(row, "conversations", "a list of turns", at_least=1)):
        turn = json_object(value) or {}
        info = json_object(turn.get("info")) or {}
        said = info.get("answer_content") or turn.get("value", turn.get("content"))
        role = turn.get("from", turn.get("role"))
        if role not in ROLES:
            raise row.error(f"conversations[{number}].from", f"one of {', '.join(ROLES)}", str(role))
        messages.append({"role": ROLES[str(role)], "content": said})
    dialogue = as_text(row, "conversations", messages)
    assert not isinstance(dialogue, str)
    return dialogue


def _worked(row: Row, name: str, question: str, answer: str) -> Content:
    answers: dict[str, Text] = {answer: string_at(row, answer)} if row.has(answer) else {}
    return Content(name, string_at(row, question), answers, (1.0,) * len(answers))
