"""One row of a data file and the reading of its fields: every wrong value becomes an error that says where it is.

A text is a string, a list of {role, content} messages, or such a list as a JSON string (common in Parquet files): a
string is read as messages only if it is JSON for a non-empty list of objects that all have role and content. The
content of a message may be a list of parts of type "text", which are joined. A field that is null counts as absent.
A list of messages as Python prints it, as in a CSV file of such a column, is an error.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from typing import cast

from polar.core.errors import InputError
from polar.core.records import Message, Text

TEXT = "a string or a list of messages"
PRINTED = re.compile(r"\s*\[\s*\{\s*'(role|content)'\s*:.*\}\s*\]\s*", re.DOTALL)
"""Messages as Python prints them."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file, before it becomes a record."""

    file: str
    number: int
    """1-based; the line number in JSONL."""
    fields: dict[str, object]

    @property
    def place(self) -> str:
        """File and number, the beginning of error messages."""
        return f"{self.file}:{self.number}"

    def has(self, field: str) -> bool:
        """Return whether the field is there and not null."""
        return self.fields.get(field) is not None

    def error(self, field: str, expected: str, found: str) -> InputError:
        """Return the error about a field, or about a place inside it (`prompt[0].content`)."""
        return InputError(f'{self.place}: field "{field}": expected {expected}, found {found}')

    def wrong(self, field: str, expected: str) -> InputError:
        """Return the error about a field that is absent or holds another kind of value."""
        if field in self.fields:
            return self.error(field, expected, describe(self.fields[field]))
        return self.error(field, expected, f"no such field; this row has {json.dumps(sorted(self.fields))}")


def describe(value: object) -> str:
    """Name a wrong value on one line, for error messages."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f"the string {json.dumps(value if len(value) <= 40 else value[:40] + '...')}"
        case int() | float():
            return f"the number {repr(value)[:40]}"
        case list():
            return "a list" if value else "an empty list"
        case dict():
            return "an object"
        case _:
            return f"a value of type {type(value).__name__}"


def text_at(row: Row, field: str) -> Text:
    """Return the text in a required field, as a string or as messages."""
    if not row.has(field):
        raise row.wrong(field, TEXT)
    return as_text(row, field, row.fields[field])


def texts_at(row: Row, field: str, at_least: int) -> tuple[Text, ...]:
    """Return the texts in a required field that holds a list of them."""
    items = list_at(row, field, "a list of texts", at_least)
    return tuple(as_text(row, f"{field}[{i}]", item) for i, item in enumerate(items))


def list_at(row: Row, field: str, expected: str, at_least: int) -> list[object]:
    """Return the list in a required field."""
    value = row.fields.get(field)
    if not isinstance(value, list):
        raise row.wrong(field, expected)
    if len(value) < at_least:
        raise row.error(field, f"{expected}, {at_least} or more", f"{len(value)}")
    return value


def string_at(row: Row, field: str) -> str:
    """Return the string in a required field that is not a text of the model (a name)."""
    if not row.has(field):
        raise row.wrong(field, "a string")
    return as_string(row, field, row.fields[field])


def optional_string(row: Row, field: str) -> str | None:
    """Return the string in a field, or None when the field is absent."""
    return string_at(row, field) if row.has(field) else None


def as_text(row: Row, where: str, value: object) -> Text:
    """Return a value as text; `where` names its place in the row."""
    if isinstance(value, str):
        messages = messages_in(value)
        if messages is None and PRINTED.fullmatch(value):
            raise row.error(where, f"{TEXT} (in a string: as JSON)", "messages as Python prints them; use json.dumps")
        if messages is None:
            return as_string(row, where, value)
        value = messages
    if isinstance(value, tuple) and value and all(isinstance(item, Message) for item in value):
        return value
    if not isinstance(value, list) or not value:
        raise row.error(where, TEXT, describe(value))
    return tuple(_message(row, f"{where}[{i}]", item) for i, item in enumerate(value))


def as_string(row: Row, where: str, value: object) -> str:
    """Return a value as a string that UTF-8 can express."""
    if not isinstance(value, str):
        raise row.error(where, "a string", describe(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise row.error(where, "valid Unicode", f"a lone surrogate at character {error.start + 1}") from None
    return value


def as_content(row: Row, where: str, value: object) -> str:
    """Return the content of a message: a string, or a list of parts of type "text", which are joined."""
    if isinstance(value, list):
        return "".join(_part(row, f"{where}[{i}]", part) for i, part in enumerate(value))
    return as_string(row, where, value)


def as_number(row: Row, where: str, value: object) -> float:
    """Return a value as a finite number."""
    # Written so that NaN fails too, and an integer too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise row.error(where, "a finite number", describe(value))
    return float(value)


def messages_in(string: str) -> list[dict[str, object]] | None:
    """Return the list of messages that a string spells in JSON, or None if it is just text."""
    items = json_list(string)
    if items and all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in items):
        return cast(list[dict[str, object]], items)
    return None


def json_list(string: str) -> list[object] | None:
    """Return the list that a string spells in JSON, or None if it spells none."""
    if not string.lstrip().startswith("["):
        return None
    value = _json_value(string)
    return value if isinstance(value, list) else None


def json_object(value: object) -> dict[str, object] | None:
    """Return an object, or the one that a string spells in JSON, or None."""
    if isinstance(value, str):
        value = _json_value(value)
    return value if isinstance(value, dict) else None


def _json_value(string: str) -> object:
    try:
        return json.loads(string)
    except (ValueError, RecursionError):
        return None


def _message(row: Row, where: str, item: object) -> Message:
    if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
        raise row.error(where, "a message with role and content", describe(item))
    if item.get("tool_calls"):
        raise row.error(f"{where}.tool_calls", "the whole text of the message in its content", "tool calls")
    content = as_content(row, f"{where}.content", item["content"])
    return Message(as_string(row, f"{where}.role", item["role"]), content)


def _part(row: Row, where: str, part: object) -> str:
    if not isinstance(part, dict):
        raise row.error(where, 'a part of type "text"', describe(part))
    if part.get("type") != "text":
        raise row.error(f"{where}.type", '"text" (only text can be scored)', describe(part.get("type")))
    return as_string(row, f"{where}.text", part.get("text"))
