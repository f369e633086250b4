"""Reading the items of a data set: rows get their references and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from polar.core.errors import InputError
from polar.core.records import Group, Text, prompt_id
from polar.data import formats, record_rows
from polar.data.dialogues import split
from polar.data.fields import Row, json_object, list_at, optional_string, string_at, text_at, texts_at
from polar.data.formats import Content, is_graded_output, require_order, require_several
from polar.data.readers import OnBadRow, ReadReport, rows
from polar.evaluation.records import Item
from polar.evaluation.suites import Dataset, ReferenceSource

References = Callable[[Row, Content], tuple[Text, ...]]


@dataclass(frozen=True, slots=True)
class Seen:
    """Prompts and policies of the training data."""

    prompts: frozenset[str]
    policies: frozenset[str]


def read_items(dataset: Dataset, on_bad_row: OnBadRow, report: ReadReport) -> Iterator[Item]:
    """Yield the items of a data set.

    Args:
        dataset: From a suite.
        on_bad_row: What to do with a row that cannot be used, unless the data set says; ties are always skipped.
        report: Filled while reading.

    Raises:
        InputError: for a bad row or file, and when no row could be used.
    """
    on_bad_row = dataset.on_bad_row or on_bad_row
    seen = _read_seen(dataset.seen) if dataset.seen else None
    families = _read_families(dataset.families) if dataset.families else {}
    references = _references(dataset.reference)
    for several in _row_groups(dataset, on_bad_row, report):
        try:
            items = list(_items(dataset, several, references))
        except InputError as error:
            if on_bad_row != "skip" and not isinstance(error, formats.TieError):
                raise
            report.skip(error)
            continue
        report.read += len(several)
        if not dataset.reference.absent:
            report.look_for_empty(
                several[0],
                [reference for item in items for reference in (item.group.reference, *item.further_references)],
                [answer for item in items for answer in _preferred(item)],
            )
        for item in items:
            yield _with_slices(_with_families(item, families), seen)
    report.tell_doubts(dataset.path)
    if not report.read:
        first = report.first_reasons[0] if report.first_reasons else "no row has the values that `where` asks for"
        raise InputError(f"{dataset.path}: expected rows to use, found none; the first reason: {first}")


def _preferred(item: Item) -> list[Text]:
    """Return the answers that are better than another one."""
    worst = min(item.quality)
    return [answer for answer, own in zip(item.group.candidates, item.quality, strict=True) if own > worst]


def _row_groups(dataset: Dataset, on_bad_row: OnBadRow, report: ReadReport) -> Iterator[list[Row]]:
    """Yield the rows of one item: one row, or consecutive ones with an output each for the same prompt."""
    waiting: list[Row] = []
    for row in rows(dataset.path, on_bad_row=on_bad_row, report=report):
        if not all(_matches(_value_at(row, place), wanted) for place, wanted in dataset.where.items()):
            continue
        row = _with_columns(row, dataset.columns)
        if waiting and not (is_graded_output(row) and row.fields.get("prompt") == waiting[0].fields.get("prompt")):
            yield waiting
            waiting = []
        waiting.append(row)
        if not is_graded_output(row):
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _matches(value: object, wanted: object) -> bool:
    return value in wanted if isinstance(wanted, list) else value == wanted


def _items(dataset: Dataset, several: list[Row], references: References) -> Iterator[Item]:
    row = several[0]
    slices = tuple(str(value) for place in dataset.slices if (value := _value_at(row, place)) is not None)
    if dataset.task == "policy discrimination":
        yield replace(_discrimination(row), slices=(*_strategy(row), *slices))
        return
    found = _joined(several)
    require_several(row, found)
    if dataset.task != "best of N":
        require_order(row, found)
    prompt, texts = split(row, found.prompt, found.answers)
    found = replace(found, prompt=prompt, answers=dict(zip(found.answers, texts, strict=True)))
    answers = found.answers
    prompt, texts = split(row, prompt, answers | formats.named("reference", references(row, found)))
    candidates, (reference, *further) = texts[: len(answers)], texts[len(answers) :]
    yield Item(
        task=dataset.task,
        group=Group(prompt, reference, candidates, found.id, formats.wrapper_of(row)),
        further_references=tuple(further),
        quality=found.quality,
        reference_source=str(dataset.reference),
        policies=found.policies or (None,) * len(answers),
        families=(None,) * len(answers),
        reference_policy=optional_string(row, "reference_policy"),
        reference_quality=formats.optional_number(row, "reference_quality"),
        domain=found.domain,
        slices=slices,
    )


def _joined(rows: list[Row]) -> Content:
    """Return the content of one row, or of several that have an output each."""
    outputs = [formats.recognise(row) for row in rows]
    if len(outputs) == 1:
        return outputs[0]
    return replace(
        outputs[0],
        answers=formats.named("output", [each.candidates[0] for each in outputs]),
        quality=tuple(each.quality[0] for each in outputs),
        policies=tuple(each.policies[0] if each.policies else None for each in outputs),
    )


def _discrimination(row: Row) -> Item:
    several = formats.named("references", texts_at(row, "references", at_least=1)) if row.has("references") else {}
    if several:
        row = replace(row, fields={**row.fields, "reference": list_at(row, "references", "a list of texts", 1)[0]})
    triple = record_rows.triple(row)[1][0]
    _, references = split(row, triple.prompt, several)
    return Item(
        task="policy discrimination",
        group=Group(
            triple.prompt, triple.reference, (triple.positive, triple.negative), _id(row), wrapper=triple.wrapper
        ),
        further_references=references[1:],
        quality=(1.0, 0.0),
        reference_source='column "reference", another sample of the policy of the better candidate',
        policies=(triple.policy, triple.negative_policy),
        families=(None, None),
        reference_policy=triple.policy,
        domain=optional_string(row, "domain"),
    )


def _id(row: Row) -> str | None:
    return str(row.fields["id"]) if row.has("id") else None


def _strategy(row: Row) -> tuple[str, ...]:
    strategy = optional_string(row, "strategy")
    return (f"negative: {strategy}",) if strategy else ()


def _references(source: ReferenceSource) -> References:
    """Return the function that finds the references of an item."""
    if source.absent:
        return lambda row, item: ("",)
    if source.chosen_as_reference:
        return lambda row, item: (item.candidates[max(range(len(item.quality)), key=item.quality.__getitem__)],)
    if source.file is None:
        if formats.is_answer(column := source.column):
            raise InputError(
                f'column "{column}" holds answers that are scored, which gives the answer away: name a column with '
                "independent references, or ask for chosen_as_reference by its name"
            )
        return lambda row, item: _at_column(row, column)
    file, by_id = source.file, source.by == "id"
    known: dict[str, tuple[Text, ...]] = {}
    for row in rows(file):
        key = str(row.fields.get("id")) if by_id else prompt_id(text_at(row, "prompt"))
        known[key] = _at_column(row, None)

    def look_up(row: Row, item: Content) -> tuple[Text, ...]:
        key = str(item.id) if by_id else prompt_id(item.prompt or "")
        if key not in known:
            raise InputError(f"{row.place}: expected a reference for its {source.by} in {file}, found none")
        return known[key]

    return look_up


def _at_column(row: Row, column: str | None) -> tuple[Text, ...]:
    """Return one reference, or several if the column holds a list of texts and not of messages."""
    if column is None:
        column = "references" if row.has("references") else "reference"
    if not row.has(column):
        raise InputError(
            f'{row.place}: expected a reference in column "{column}", found none: POLAR scores against a reference; '
            "name another column, or a file of references"
        )
    return formats.references_at(row, column)


def _value_at(row: Row, path: str) -> object:
    """Return the value at a place such as "meta.models.0" (of objects, of lists, also in JSON text), or None."""
    value: object = row.fields
    if path in row.fields:
        return row.fields[path]
    for part in path.split("."):
        value = json_object(value) or value
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _with_columns(row: Row, columns: dict[str, str | list[str]]) -> Row:
    """Return the row with further fields, or others, taken from other places of it."""
    taken: dict[str, object] = {
        field: _value_at(row, place) if isinstance(place, str) else [_value_at(row, each) for each in place]
        for field, place in columns.items()
    }
    return replace(row, fields={**row.fields, **taken})


def _read_seen(paths: tuple[str, ...]) -> Seen:
    prompts: set[str] = set()
    policies: set[str] = set()
    for path in paths:
        for row in rows(path):
            if row.has("prompt_id"):
                prompts.add(string_at(row, "prompt_id"))
            elif row.has("prompt"):
                prompts.add(prompt_id(text_at(row, "prompt")))
            policies.update(str(row.fields[name]) for name in ("policy", "negative_policy") if row.has(name))
    return Seen(frozenset(prompts), frozenset(policies))


def _read_families(path: str) -> dict[str, str]:
    return {string_at(row, "policy"): string_at(row, "family") for row in rows(path) if row.has("family")}


def _with_families(item: Item, families: dict[str, str]) -> Item:
    if not families:
        return item
    own = families.get(item.reference_policy or "")
    of_candidates = tuple(families.get(policy or "") for policy in item.policies)
    slices = item.slices
    if item.task == "policy discrimination" and None not in of_candidates:
        slices += ("same family",) if len(set(of_candidates)) == 1 else ("other family",)
    if item.task == "policy discrimination" and own is not None:
        slices += (f"family {own}",)
    return replace(item, families=of_candidates, reference_family=own, slices=slices)


def _with_slices(item: Item, seen: Seen | None) -> Item:
    if seen is None:
        return item
    slices = ["seen prompts" if item.prompt_id in seen.prompts else "unseen prompts"]
    policies = {policy for policy in (item.reference_policy, *item.policies) if policy is not None}
    if policies and seen.policies:
        known = len(policies & seen.policies)
        slices.append("unseen policies" if not known else "seen policies" if known == len(policies) else "some unseen")
    return replace(item, slices=(*item.slices, *slices))
