"""Policies in this process, through vLLM (read against 0.32)."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Sequence
from typing import Any

from polar.corpus.engines import Completion, Failure, Request, Result
from polar.corpus.engines.tokens import Row, load_tokenizer, loading, require_vllm, to_row
from polar.corpus.pool import Policy, VllmEngine


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
