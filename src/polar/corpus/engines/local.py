"""Policies in this process, through Hugging Face transformers or vLLM (read against 0.32).

In transformers a sample depends on its own prompt and seed, not on the batch it is drawn in (except for rounding:
another batch may tip the balance between two nearly equal tokens, above all in bfloat16). `generate` alone cannot
promise that, since all rows share one random state; so it runs greedily here, on scores to which each row's own Gumbel
noise is added. The highest of them is an exact draw from the softmax (Gumbel-max trick; Maddison et al. 2014, arXiv
1411.0030).
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from polar.core.errors import InputError
from polar.corpus.engines import Completion, Failure, Request, Result
from polar.corpus.pool import Decoding, HttpEngine, Policy, TransformersEngine, VllmEngine

if TYPE_CHECKING:  # torch and transformers are imported where they are used: the other engines do without
    from torch import Tensor
    from transformers import LogitsProcessorList, PreTrainedTokenizerBase

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
    """Report errors while a model is loaded (files, hub, device) as `InputError`."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"policy {policy.name!r}: {policy.engine.model} cannot be loaded: {reason}") from error


class TransformersSampler:
    """An `Engine` that generates in this process, one padded batch at a time.

    The pool's decoding decides alone; of the checkpoint's generation_config.json only the end tokens are kept, beside
    the tokenizer's own. A prompt that leaves no room in the model's context is a `Failure`, and an output ends there.

    Args:
        policy: The policy.
        settings: Its model.

    Raises:
        InputError: the model cannot be loaded completely, or a chat policy has no chat template.
    """

    in_flight = 1

    def __init__(self, policy: Policy, settings: TransformersEngine) -> None:
        self.decoding = policy.decoding
        self.tokenizer = load_tokenizer(policy)
        self.model = _load_model(policy, settings)
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._ends = end_tokens(self.model.generation_config, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        self._pad: int = pad if pad is not None else next(iter(self._ends), 0)
        from transformers import GenerationConfig

        self.model.generation_config = GenerationConfig(eos_token_id=self._ends or None, pad_token_id=self._pad)
        self._cancelled = False

    async def sample(self, requests: Sequence[Request]) -> list[Result]:
        """One result per request, in their order."""
        try:
            return await asyncio.to_thread(self._sample, requests)
        except asyncio.CancelledError:
            self._cancelled = True  # otherwise the thread, and the end of the process, would wait for the last token
            raise

    async def close(self) -> None:
        """Free the memory of the model."""
        self.model = None
        _free_memory()

    def _sample(self, requests: Sequence[Request]) -> list[Result]:
        import torch

        rows = [to_row(self.tokenizer, request, self.decoding, self.context) for request in requests]
        sound = [row for row in rows if isinstance(row, Row)]
        try:
            self._generate(sound)
            full = False
        except torch.OutOfMemoryError:
            full = True
        if full:  # after the except block, because its traceback holds tensors
            _free_memory()
            failure = Failure(f"out of memory with {len(sound)} samples at once; lower batch_size")
            return [failure if isinstance(row, Row) else row for row in rows]
        return [self._completion(row) if isinstance(row, Row) else row for row in rows]

    def _completion(self, row: Row) -> Completion:
        output = continuation(self.tokenizer, row.prompt, row.output)
        finish_reason = "stop" if row.output[-1] in self._ends else "length"
        return Completion(output, finish_reason, len(row.prompt), len(row.output))

    def _generate(self, active: list[Row]) -> None:
        """Let all rows grow together; when the first ones reach their limits, start again with the others."""
        while active and not self._cancelled:
            count = min(row.limit - len(row.output) for row in active)
            for row, new in zip(active, self._grow(active, count), strict=True):
                row.output += new
            active = [row for row in active if row.output[-1] not in self._ends and len(row.output) < row.limit]

    def _grow(self, rows: list[Row], count: int) -> list[list[int]]:
        """Up to `count` further tokens for each row, the end token included."""
        import torch
        from transformers import StoppingCriteriaList

        texts = [row.prompt + row.output for row in rows]
        width = max(map(len, texts))
        ids = torch.tensor([[self._pad] * (width - len(text)) + text for text in texts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts], device=self.model.device)
        grown = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=count,
            logits_processor=self._sampling(rows, width),
            stopping_criteria=StoppingCriteriaList([self._stops]),
        )
        return [_until_end(row, self._ends) for row in grown[:, width:].tolist()]

    def _sampling(self, rows: list[Row], width: int) -> LogitsProcessorList:
        import torch
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        decoding, processors = self.decoding, LogitsProcessorList()
        if decoding.temperature == 0:
            return processors
        processors.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_k is not None:
            processors.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            processors.append(TopPLogitsWarper(decoding.top_p))
        start = len(rows[0].output) - width
        seeds = [row.seed for row in rows]

        def add_noise(ids: Tensor, scores: Tensor) -> Tensor:
            return scores + torch.stack([gumbel(seed, start + ids.shape[1], scores[0]) for seed in seeds])

        processors.append(add_noise)
        return processors

    def _stops(self, ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        import torch

        return torch.full((len(ids),), self._cancelled, device=ids.device)


def gumbel(seed: int, position: int, like: Tensor) -> Tensor:
    """Standard Gumbel noise for the token at one position of the sample with this seed."""
    import torch

    state = np.random.SeedSequence((seed, position)).generate_state(1, np.uint32)
    generator = torch.Generator(like.device).manual_seed(int(state[0]))
    exponential = torch.empty_like(like).exponential_(generator=generator)
    return -exponential.clamp_min_(torch.finfo(like.dtype).tiny).log_()


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: list[int], output: list[int]) -> str:
    """The text of an output, such that prompt and output are the whole text.

    Decoded alone, an output would lose its first space with SentencePiece tokenizers. If an output that begins within a
    character changes the end of the prompt, it is decoded alone after all.
    """

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    before, whole = decode(prompt), decode(prompt + output)
    return whole[len(before) :] if whole.startswith(before) else decode(output)


def _load_model(policy: Policy, settings: TransformersEngine) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model: Any
    info: dict[str, Any]
    with loading(policy):
        model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc] # a pair with output_loading_info
            settings.model,
            dtype=settings.dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        model = model.to(settings.device or accelerator or "cpu").eval()
    problems = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
    if problems:
        raise InputError(
            f"policy {policy.name!r}: {settings.model}: not a whole language model, these weights would be random "
            f"numbers: {', '.join(problems[:5])}"
        )
    return model


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((number for number, token in enumerate(ids, 1) if token in ends), len(ids))]


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class VllmSampler:
    """An `Engine` that generates in this process with vLLM, every sample with its own seed.

    The pool's decoding decides alone; vLLM adds the end tokens of the checkpoint's generation_config.json. Usage
    statistics are not sent unless VLLM_NO_USAGE_STATS=0 asks for them.

    Args:
        policy: The policy.
        settings: Its model.

    Raises:
        InputError: vLLM is not installed, the model cannot be loaded, or a chat policy has no chat template.
    """

    in_flight = 1

    def __init__(self, policy: Policy, settings: VllmEngine) -> None:
        require_vllm(policy)
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        self.decoding = policy.decoding
        self.tokenizer = load_tokenizer(policy)
        with loading(policy):
            from vllm import LLM

            self._llm: Any = LLM(
                settings.model,
                dtype=settings.dtype,
                tensor_parallel_size=settings.tensor_parallel_size,
                max_model_len=settings.max_model_len,
                gpu_memory_utilization=settings.gpu_memory_utilization,
            )
        self.context: int = self._llm.model_config.max_model_len

    async def sample(self, requests: Sequence[Request]) -> list[Result]:
        """One result per request, in their order."""
        return await asyncio.to_thread(self._sample, requests)

    async def close(self) -> None:
        """End the processes of the engine and free their memory."""
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()

    def _sample(self, requests: Sequence[Request]) -> list[Result]:
        from vllm import SamplingParams, TokensPrompt

        decoding = self.decoding
        rows = [to_row(self.tokenizer, request, decoding, self.context) for request in requests]
        sound = [row for row in rows if isinstance(row, Row)]
        drawn = iter(
            self._llm.generate(
                [TokensPrompt(prompt_token_ids=row.prompt) for row in sound],
                [
                    SamplingParams(
                        temperature=decoding.temperature,
                        top_p=decoding.top_p,
                        top_k=decoding.top_k or 0,
                        seed=row.seed,
                        max_tokens=row.limit,
                    )
                    for row in sound
                ],
                use_tqdm=False,
            )
            if sound
            else ()
        )
        return [row if isinstance(row, Failure) else _completion(next(drawn)) for row in rows]


def _completion(drawn: Any) -> Completion:
    (output,) = drawn.outputs
    return Completion(output.text, output.finish_reason, len(drawn.prompt_token_ids), len(output.token_ids))
