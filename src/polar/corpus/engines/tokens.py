"""What the engines in this process share: whether a policy can be opened, its tokenizer, prompts as token ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from polar.core.errors import InputError
from polar.corpus.engines import Failure, Request
from polar.corpus.pool import Decoding, HttpEngine, Policy, TransformersEngine, VllmEngine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ONLY_SAFETENSORS = "transformers policies are loaded from safetensors alone; convert it, or serve it over http"


@dataclass(slots=True)
class Row:
    """A sample while it grows; token ids."""

    prompt: list[int]
    seed: int
    limit: int
    """Most tokens of the output: max_tokens, or the rest of the context."""
    output: list[int] = field(default_factory=list)


def check(policy: Policy) -> None:
    """Find out before a long run, without loading weights, whether a policy can be opened in this process.

    Raises:
        InputError: there is no such model, its kind is unknown, or a chat policy has no chat template; or vLLM is
            missing. Policies behind a server are not asked.
    """
    engine = policy.engine
    if isinstance(engine, HttpEngine):
        return
    if isinstance(engine, VllmEngine):
        require_vllm(policy)
    from transformers import AutoConfig

    with loading(policy):
        AutoConfig.from_pretrained(engine.model, trust_remote_code=False)
    load_tokenizer(policy)
    directory = Path(engine.model)
    if isinstance(engine, TransformersEngine) and directory.is_dir() and not any(directory.glob("*.safetensors")):
        raise InputError(f"policy {policy.name!r}: {directory}: no *.safetensors; {ONLY_SAFETENSORS}")


def require_vllm(policy: Policy) -> None:
    """Raise an InputError if vLLM is not installed."""
    if find_spec("vllm") is None:
        raise InputError(f"policy {policy.name!r}: vLLM is not installed; pip install vllm, or take type: transformers")


def load_tokenizer(policy: Policy) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy in this process.

    Raises:
        InputError: it cannot be loaded, or a chat policy has no chat template.
    """
    from transformers import AutoTokenizer

    with loading(policy):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(policy.engine.model, trust_remote_code=False)
    if policy.kind == "chat" and not tokenizer.chat_template:
        raise InputError(
            f"policy {policy.name!r}: {policy.engine.model} has no chat template; take an instruct model or kind: base"
        )
    return tokenizer


def to_row(
    tokenizer: PreTrainedTokenizerBase, request: Request, decoding: Decoding, context: int | None
) -> Row | Failure:
    """Encode a prompt: a text as the tokenizer does by itself, messages through the chat template."""
    ids: Any
    if isinstance(request.prompt, str):
        ids = tokenizer(request.prompt)["input_ids"]
    else:
        turns: Any = [asdict(message) for message in request.prompt]
        try:
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        except jinja2.TemplateError as error:
            return Failure(f"the chat template refuses the messages: {' '.join(str(error).split())}")
    if not ids:
        return Failure("the prompt is empty: no token to continue")
    room = decoding.max_tokens if context is None else context - len(ids)
    if room < 1:
        return Failure(
            f"the prompt of {len(ids)} tokens leaves no room for an output in the context of {context} tokens"
        )
    return Row(ids, request.seed, min(decoding.max_tokens, room))


def end_tokens(config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end tokens of a checkpoint's generation_config.json (one, several or none) and the tokenizer's."""
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return sorted({*ends, tokenizer.eos_token_id} - {None})


@lru_cache
def end_tokens_of(model: str) -> list[int]:
    """The same by the name of a model, without its weights."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(model)
    except OSError:  # no such file
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model, trust_remote_code=False))
    return end_tokens(config, AutoTokenizer.from_pretrained(model, trust_remote_code=False))


@contextmanager
def loading(policy: Policy) -> Iterator[None]:
    """What goes wrong while a model is loaded (in the files, on the hub, on the device) is the matter of the user."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"policy {policy.name!r}: {policy.engine.model} cannot be loaded: {reason}") from error
