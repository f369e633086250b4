"""Policies behind an OpenAI-compatible server.

A base policy is asked at `/completions`, a chat policy at `/chat/completions`. One request draws one sample with its
own seed, so that a request that is sent again gives the same sample. What a seed promises depends on the server: vLLM
and SGLang use it for the sample alone (rounding still depends on what else they compute at that moment); `transformers
serve` seeds the whole process with it, so its samples repeat with a concurrency of 1 only.

The pool's decoding is sent in full, but a server fills what it leaves out from the checkpoint's generation_config.json
(a repetition penalty, for instance); vLLM does not with `--generation-config vllm`. Fields of `extra_body`
replace those of the same name, and a field that is null is not sent. `transformers serve` refuses top_k and does not
sample by itself: give it `top_k: null` and `extra_body: {generation_config: '{"do_sample": true, "top_k": 50}'}`.

The output is the answer as the server gives it. Thinking that a server splits off from the answer (a reasoning parser)
is not part of it; a server without such a parser leaves it in.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tenacity import RetryCallState, retry_if_exception, stop_after_delay

from polar.core.http import (
    BrokenError,
    Endpoint,
    HttpError,
    RefusedError,
    api_key,
    error_message,
    parse_json,
    retrying,
    valid_unicode,
)
from polar.corpus.engines import Completion, Failure, Request, Result
from polar.corpus.pool import HttpEngine, Policy

log = logging.getLogger(__name__)

PASSING = (408, 409, 425)
"""Refusals that may pass."""
GENERAL = (301, 302, 303, 307, 308, 401, 402, 404)
"""Refusals that every further request would meet too: address, key, balance or model; and 403, unless a request has
succeeded before, because moderation uses it for single prompts."""
REMINDER_SECONDS = 60.0
"""Between two warnings about an endpoint that gives no answers."""


class HttpSampler:
    """An `Engine` that asks a server.

    Connection errors, timeouts, the statuses 408, 409, 425, 429 and 5xx, and replies that make no sense are tried
    again with growing random pauses, or after the time that the server asks for. No try begins later than `deadline`
    seconds after a request's first one, and none takes longer than `timeout`.

    The endpoint is excluded, so that all further requests fail at once, when it refuses the key, the model or the
    address, and when two requests have used up their deadlines and nothing has succeeded meanwhile (one alone may be
    the fault of its prompt). A new process asks it again. While nothing succeeds, a warning says so at the first
    failure and once a minute.

    Args:
        policy: The policy.
        settings: Its endpoint.

    Raises:
        InputError: there is no usable key in the environment, or the address is none.
    """

    def __init__(self, policy: Policy, settings: HttpEngine) -> None:
        self.policy, self.settings = policy, settings
        self.in_flight = math.ceil(settings.concurrency / settings.batch_size) + 1
        key = None if settings.api_key_env is None else api_key(settings.api_key_env)
        self.endpoint = Endpoint(settings.base_url, key, settings.concurrency)
        self._path = "/completions" if policy.kind == "base" else "/chat/completions"
        self._address = f"{self.endpoint.address}{self._path}"
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._last_success = self._last_warning = -math.inf
        self._in_vain = 0
        """Requests that used up their deadlines while nothing succeeded."""
        self._tries = retrying(
            retry_if_exception(_may_pass),
            stop_after_delay(settings.deadline),
            deadline=settings.deadline,
            sleep=self.endpoint.sleep,
            before_sleep=self._warn_of_silence,
        )

    async def sample(self, requests: Sequence[Request]) -> list[Result]:
        """Return one result per request, in their order."""
        return list(await asyncio.gather(*(self._sample(request) for request in requests)))

    async def close(self) -> None:
        """Close the connections."""
        await self.endpoint.close()

    async def _sample(self, request: Request) -> Result:
        async with self._slots:
            started = time.monotonic()
            try:
                completion: Completion = await self._tries.copy()(self._try, request)
            except HttpError as error:
                if not _may_pass(error):
                    return Failure(f"{self._address}: {error}")
                self._note_deadline(started, error)
                return Failure(f"{self._address}: given up after {self.settings.deadline:g} s of trying: {error}")
            self._last_success, self._in_vain = time.monotonic(), 0
            return completion

    async def _try(self, request: Request) -> Completion:
        if self.endpoint.excluded:
            raise RefusedError(f"endpoint excluded: {self.endpoint.excluded}")
        try:
            reply = await self.endpoint.fetch("POST", self._path, self.settings.timeout, json=self._body(request))
        except RefusedError as error:
            if error.status in GENERAL or (error.status == 403 and self._last_success < 0):
                self.endpoint.exclude(str(error))
            raise
        return self._completion(reply.content)

    def _note_deadline(self, started: float, error: HttpError) -> None:
        if self._last_success < started:
            self._in_vain += 1
        if self._in_vain == 2:
            self.endpoint.exclude(f"nothing succeeded for {self.settings.deadline:g} s; last: {error}")

    def _warn_of_silence(self, state: RetryCallState) -> None:
        now = time.monotonic()
        if max(self._last_success, self._last_warning) < now - REMINDER_SECONDS:
            self._last_warning = now
            log.warning(
                "policy %s: %s gives no answers: %s; every request is tried again for up to %g s",
                self.policy.name,
                self._address,
                state.outcome and state.outcome.exception(),
                self.settings.deadline,
            )

    def _body(self, request: Request) -> dict[str, Any]:
        prompt = request.prompt
        body = {
            "model": self.settings.model,
            **(
                {"prompt": prompt} if isinstance(prompt, str) else {"messages": [asdict(message) for message in prompt]}
            ),
            **self.policy.decoding.model_dump(),
            "seed": request.seed,
            **self.settings.extra_body,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _completion(self, content: bytes) -> Completion:
        """Read a reply.

        Raises:
            BrokenError: it is not what the interface promises.
        """
        reply = parse_json(content)
        try:
            choice = reply["choices"][0]
            finish_reason = choice["finish_reason"]
            output = choice["text"] if self.policy.kind == "base" else _answer(choice["message"], finish_reason)
            usage = reply.get("usage") or {}
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (KeyError, IndexError, TypeError, AttributeError):
            raise BrokenError(self.endpoint.line(f"not a completion: {error_message(content)}")) from None
        if not isinstance(output, str) or not isinstance(finish_reason, str):
            raise BrokenError(
                self.endpoint.line(f"a completion without text or finish_reason: {error_message(content)}")
            )
        if finish_reason in ("abort", "error"):
            raise BrokenError(f"the server broke off (finish_reason {finish_reason})")
        prompt_tokens, output_tokens = (count if isinstance(count, int) else None for count in counts)
        return Completion(valid_unicode(output), valid_unicode(finish_reason), prompt_tokens, output_tokens)


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, HttpError) and (not isinstance(error, RefusedError) or error.status in PASSING)


def _answer(message: dict[str, Any], finish_reason: object) -> Any:
    """The content; empty where none was reached, because thinking took all the tokens or a filter stopped it."""
    content = message["content"]
    thought = message.get("reasoning_content") or message.get("reasoning")
    return "" if content is None and (thought or finish_reason in ("length", "content_filter")) else content
