"""Requests, checked field by field; the same declarations give the OpenAPI document.

Texts and lists are checked by functions of our own: the words and places of their errors are those of rows in files,
and they stop at the first mistake, where pydantic would collect one error for every element and alternative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from polar.core.records import Aggregate, Text, Wrapper
from polar.data.fields import Row, as_string, as_text, describe
from polar.data.record_rows import label_fields
from polar.serving.checkpoint import Inputs

MOST_INPUTS = 8192
"""Most rewards of one request."""


class FieldError(ValueError):
    """A field of a request is wrong; `param` is its place, such as `candidates[2]`."""

    def __init__(self, param: str, expected: str, found: str) -> None:
        super().__init__(f"{param}: expected {expected}, found {found}")
        self.param = param


class _Request(Row):
    """A row whose errors speak of a request."""

    def error(self, field: str, expected: str, found: str) -> NoReturn:
        raise FieldError(field, expected, found)


_REQUEST = _Request("request", 0, {})


@dataclass(frozen=True, slots=True)
class Flat:
    """Complete inputs."""

    inputs: Inputs
    single: bool
    """The request held one input that was not in a list."""


def _text(value: object, where: str) -> Text:
    # Unlike in files, a string is never read as JSON: here a list of messages can be sent as one.
    return as_string(_REQUEST, where, value) if isinstance(value, str) else as_text(_REQUEST, where, value)


def _text_field(value: object, info: ValidationInfo) -> Text:
    return _text(value, str(info.field_name))


def _texts_field(value: object, info: ValidationInfo) -> tuple[Text, ...]:
    where = str(info.field_name)
    return tuple(_text(one, f"{where}[{number}]") for number, one in enumerate(_items(value, where, "a list of texts")))


def _strings_field(value: object, info: ValidationInfo) -> list[str]:
    where = str(info.field_name)
    if value == []:
        return []
    return [
        as_string(_REQUEST, f"{where}[{number}]", one)
        for number, one in enumerate(_items(value, where, "a list of strings"))
    ]


def _flat_field(value: object, info: ValidationInfo) -> Flat:
    where = str(info.field_name)
    if isinstance(value, str):
        return Flat([as_string(_REQUEST, f"{where}[0]", value)], single=True)
    if isinstance(value, list) and value and type(value[0]) is int:
        return Flat([_ids(value, f"{where}[0]")], single=True)
    items = _items(value, where, "a text, a list of token ids, or a list of either")
    if isinstance(items[0], str):
        return Flat([as_string(_REQUEST, f"{where}[{number}]", one) for number, one in enumerate(items)], single=False)
    return Flat([_ids(one, f"{where}[{number}]") for number, one in enumerate(items)], single=False)


def _items(value: object, where: str, expected: str) -> Sequence[object]:
    if not isinstance(value, list) or not value:
        raise FieldError(where, expected, describe(value))
    if len(value) > MOST_INPUTS:
        raise FieldError(where, f"{MOST_INPUTS} or fewer in one request", f"{len(value)}")
    return value


def _ids(value: object, where: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise FieldError(where, "a list of token ids", describe(value))
    if set(map(type, value)) != {int}:
        wrong = next(item for item in value if type(item) is not int)
        raise FieldError(where, "token ids, which are integers", describe(wrong))
    return value


_STRING: dict[str, Any] = {"type": "string"}
_PART: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _STRING},
    "required": ["type", "text"],
}
_MESSAGES: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"role": _STRING, "content": {"anyOf": [_STRING, {"type": "array", "items": _PART}]}},
        "required": ["role", "content"],
    },
}
_TEXT: dict[str, Any] = {"anyOf": [_STRING, _MESSAGES]}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}


def _list(items: dict[str, Any], at_least: int = 1) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": at_least, "maxItems": MOST_INPUTS}


_FLAT: dict[str, Any] = {"anyOf": [_STRING, _list(_STRING), _IDS, _list(_IDS)]}

OneText = Annotated[Text, PlainValidator(_text_field), WithJsonSchema(_TEXT)]
Texts = Annotated[tuple[Text, ...], PlainValidator(_texts_field), WithJsonSchema(_list(_TEXT))]
Strings = Annotated[list[str], PlainValidator(_strings_field), WithJsonSchema(_list(_STRING, 0))]
FlatInputs = Annotated[Flat, PlainValidator(_flat_field), WithJsonSchema(_FLAT)]


class RewardsRequest(BaseModel):
    """Candidates for one prompt, scored against one reference or several."""

    model_config = ConfigDict(extra="forbid")

    prompt: OneText
    reference: OneText | None = None
    references: Texts | None = None
    candidates: Texts
    aggregate: Aggregate = Field(
        "max",
        description="What becomes of a candidate's rewards against several references. softmax: their mean weighted by "
        "exp(reward), between mean and max.",
    )
    output: Literal["raw", "probability", "zscore"] = Field(
        "raw",
        description="raw: the reward. probability: that the candidate would be preferred to the reference itself by "
        "the Bradley-Terry model, sigmoid((reward - reward of the reference as a candidate) / temperature), where the "
        "temperature is the calibration's, or 1. zscore: (reward - mean) / std of the checkpoint's calibration. "
        "Computed per reference, then aggregated.",
    )
    wrapper: Wrapper = Field("sft", description="pretrain: the candidate continues the prompt without a newline.")
    model: str | None = None
    id: str | None = Field(None, description="Comes back as the id of the answer.", max_length=256)

    @model_validator(mode="after")
    def _one_kind_of_reference(self) -> Self:
        if (self.reference is None) == (self.references is None):
            raise FieldError(
                "reference", "either reference or references", "neither" if self.reference is None else "both"
            )
        if len(self.candidates) * len(self.all_references) > MOST_INPUTS:
            raise FieldError("candidates", f"{MOST_INPUTS} or fewer rewards in one request", "more (times references)")
        return self

    @property
    def all_references(self) -> tuple[Text, ...]:
        """The references, one or several."""
        return (self.references or ()) if self.reference is None else (self.reference,)


class ClassifyRequest(BaseModel):
    """vLLM's `/classify`. Rewards are raw with or without `use_activation`, as with any regression model there."""

    input: FlatInputs
    model: str | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, description="Longer inputs are refused, never cut.")

    @property
    def limit(self) -> int | None:
        """Most tokens that the client wants to be read, if it says so."""
        return None if self.truncate_prompt_tokens in (None, -1) else self.truncate_prompt_tokens


class PoolingRequest(ClassifyRequest):
    """vLLM's and LMDeploy's `/pooling`."""

    task: Literal["classify"] | None = None
    encoding_format: Literal["float", "base64"] = "float"


class SglangRequest(BaseModel):
    """SGLang's `/classify` and `/encode`."""

    text: FlatInputs | None = None
    input_ids: FlatInputs | None = None

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> Self:
        if (self.text is None) == (self.input_ids is None):
            raise FieldError("text", "either text or input_ids", "neither" if self.text is None else "both")
        return self

    @property
    def flat(self) -> tuple[str, Flat]:
        """The field that is given, and its inputs."""
        if self.text is not None:
            return "text", self.text
        assert self.input_ids is not None
        return "input_ids", self.input_ids


def _whose(value: object) -> str:
    return "vllm" if isinstance(value, dict) and "input" in value else "sglang"


EitherClassifyRequest = Annotated[
    Annotated[ClassifyRequest, Tag("vllm")] | Annotated[SglangRequest, Tag("sglang")], Discriminator(_whose)
]
"""vLLM and SGLang share a path; vLLM's requests have `input`."""


LABEL_FOUND = "prompt and references in JSON, which only the function polar.rft.openrlhf reads: name that in remote_url"


class GetRewardRequest(BaseModel):
    """OpenRLHF's `/get_reward`: one text of prompt and response per sample; the label is the reference."""

    query: Strings
    prompts: Strings
    labels: Strings

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        for name, values in (("prompts", self.prompts), ("labels", self.labels)):
            if len(values) != len(self.query):
                raise FieldError(name, f"as many as in query ({len(self.query)})", f"{len(values)}")
        for number, label in enumerate(self.labels):
            if not label.strip():
                raise FieldError(f"labels[{number}]", "a reference", "only white space")
            if label_fields(label) is not None:
                raise FieldError(f"labels[{number}]", "a reference", LABEL_FOUND)
        return self


class ReloadRequest(BaseModel):
    """Another checkpoint, or the same place again."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, min_length=1, max_length=4096)
