"""The rows that frameworks read: the same tasks in the columns of each, every column of one type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pyarrow as pa

from polar.core.records import Message
from polar.data.formats import label_of
from polar.rft.prompts import Task

Framework = Literal["verl", "trl", "openrlhf", "swift"]
Layout = Callable[[Task, str, int], dict[str, Any]]
"""From a task, the name of its split and its number to its row."""

TEXT = pa.string()
TEXTS = pa.list_(TEXT)
MESSAGES = pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))


def _verl(task: Task, split: str, index: int) -> dict[str, Any]:
    prompt = _plain(task.prompt)
    return {
        "data_source": task.source,
        "prompt": prompt,
        "ability": task.ability,
        "reward_model": {"style": "polar", "ground_truth": task.references[0]},
        "extra_info": {
            "prompt": prompt,
            "reference": task.references[0],
            "references": list(task.references),
            "answer": task.answer,
            "ability": task.ability,
            "split": split,
            "index": index,
        },
    }


def _trl(task: Task, split: str, index: int) -> dict[str, Any]:
    return {
        "prompt": _plain(task.prompt),
        "reference": task.references[0],
        "references": list(task.references),
        "answer": task.answer,
    }


def _openrlhf(task: Task, split: str, index: int) -> dict[str, Any]:
    """To be read with --data.input_key prompt --data.label_key label --data.apply_chat_template."""
    prompt = _plain(task.prompt)
    return {"prompt": prompt, "label": label_of(prompt, task.references)}


def _swift(task: Task, split: str, index: int) -> dict[str, Any]:
    return {"messages": _plain(task.prompt), "references": list(task.references), "solution": task.answer}


LAYOUTS: dict[Framework, tuple[Layout, pa.Schema]] = {
    "verl": (
        _verl,
        pa.schema(
            [
                ("data_source", TEXT),
                ("prompt", MESSAGES),
                ("ability", TEXT),
                ("reward_model", pa.struct([("style", TEXT), ("ground_truth", TEXT)])),
                (
                    "extra_info",
                    pa.struct(
                        [
                            ("prompt", MESSAGES),
                            ("reference", TEXT),
                            ("references", TEXTS),
                            ("answer", TEXT),
                            ("ability", TEXT),
                            ("split", TEXT),
                            ("index", pa.int64()),
                        ]
                    ),
                ),
            ]
        ),
    ),
    "trl": (_trl, pa.schema([("prompt", MESSAGES), ("reference", TEXT), ("references", TEXTS), ("answer", TEXT)])),
    "openrlhf": (_openrlhf, pa.schema([("prompt", MESSAGES), ("label", TEXT)])),
    "swift": (_swift, pa.schema([("messages", MESSAGES), ("references", TEXTS), ("solution", TEXT)])),
}


def _plain(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
