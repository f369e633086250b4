"""Policies in this process, through Hugging Face transformers.

A sample depends on its own prompt and seed, not on the batch it is drawn in (except for rounding: another batch may tip
the balance between two nearly equal tokens, above all in bfloat16). `generate` alone cannot promise that, since all
rows share one random state; so it runs greedily here, on scores to which each row's own Gumbel noise is added. The
highest of them is an exact draw from the softmax (Gumbel-max trick; Maddison et al. 2014, arXiv 1411.0030).
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from polar.core.errors import InputError
from polar.corpus.engines import Completion, Failure, Request, Result
from polar.corpus.engines.tokens import Row, end_tokens, load_tokenizer, loading, to_row
from polar.corpus.pool import Policy, TransformersEngine

if TYPE_CHECKING:  # torch and transformers are imported where they are used: the other engines do without
    from torch import Tensor
    from transformers import LogitsProcessorList, PreTrainedTokenizerBase


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
