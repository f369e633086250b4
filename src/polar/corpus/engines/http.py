"""Policies behind an OpenAI-compatible server.

A base policy is asked at `/completions`, a chat policy at `/chat/completions`. One request draws one sample with its
own seed, so that a request that is sent again gives the same sample. What a seed promises is the server's matter: vLLM
and SGLang use it for the sample alone (rounding still depends on what else they compute at that moment); `transformers
serve` seeds the whole process with it, so its samples repeat with a concurrency of 1 only.

The pool's decoding is sent in full, but a server fills what it leaves out from the checkpoint's generation_config.json
(a repetition penalty, for instance); vLLM is told not to with `--generation-config vllm`. Fields of `extra_body`
replace those of the same name, and a field that is null is not sent. `transformers serve` refuses top_k and does not
sample by itself: give it `top_k: null` and `extra_body: {generation_config: '{"do_sample": true, "top_k": 50}'}`.

The output is the answer as the server gives it. Thinking that a server splits off from the answer (a reasoning parser)
is not part of it; a server without such a parser leaves it in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_random_exponential

from polar.core.errors import InputError
from polar.core.http import (
    api_key,
    error_message,
    is_local,
    one_line,
    parse_json,
    read_content,
    retry_after,
    valid_unicode,
)
from polar.corpus.engines import Completion, Failure, Request, Result
from polar.corpus.pool import HttpEngine, Policy

log = logging.getLogger(__name__)

TRANSIENT = (408, 409, 425, 429)
"""Refusals that may pass, beside 5xx."""
GENERAL = (401, 402, 404)
"""Refusals that every further request would meet too: key, balance, model or address; and 403, unless a request has
succeeded before, because moderation uses it for single prompts."""
MOST_BYTES = 1 << 26
"""Of one reply."""
BACKOFF = wait_random_exponential(multiplier=0.5, max=30)
CONNECT = 30.0
"""Seconds in which a server must take a connection; one that drops packets would keep silent until the timeout."""
REMINDER = 60.0
"""Seconds between two warnings about an endpoint that gives no answers."""


class _TryAgainError(Exception):
    """No sample this time; the server may have said after how many seconds to ask again."""

    def __init__(self, reason: str, retry_after: float = 0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class _RefusedError(Exception):
    """No sample, and asking again would not help."""


class HttpSampler:
    """An `Engine` that asks a server.

    Connection errors, timeouts, the statuses 408, 409, 425, 429 and 5xx, and replies that make no sense are tried
    again with growing random pauses, or after the time that the server asks for. No try begins later than `deadline`
    seconds after a request's first one, and none takes longer than `timeout`.

    The endpoint is set aside, so that all further requests fail at once, when it refuses the key, the model or the
    address, and when two requests have used up their deadlines and nothing has succeeded meanwhile (one alone may be
    the fault of its prompt). A new process asks it again. While nothing succeeds, a warning says so at the first
    failure and once a minute.

    Proxies and certificates are taken from the environment as usual, but never for this machine's own addresses.

    Args:
        policy: The policy.
        settings: Its endpoint.

    Raises:
        InputError: there is no usable key in the environment, or the address is none.
    """

    def __init__(self, policy: Policy, settings: HttpEngine) -> None:
        self.policy, self.settings = policy, settings
        self.in_flight = math.ceil(settings.concurrency / settings.batch_size) + 1
        self._key = None if settings.api_key_env is None else api_key(settings.api_key_env)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._set_aside = asyncio.Event()
        self._why = ""
        self._last_success = self._last_warning = -math.inf
        self._in_vain = 0
        """Requests that used up their deadlines while nothing succeeded."""
        path = "completions" if policy.kind == "base" else "chat/completions"
        try:
            self._url = httpx2.URL(f"{settings.base_url}/{path}")
        except httpx2.InvalidURL as error:
            raise InputError(f"policy {policy.name!r}: {settings.base_url}: not an address ({error})") from error
        self._address = one_line(str(self._url), self._key)
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(None, connect=CONNECT),  # the limit of the whole request is in _try
            limits=httpx2.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency),
            follow_redirects=False,  # the prompt and the key stay with the address that was given
            trust_env=not is_local(self._url.host),
        )

    async def sample(self, requests: Sequence[Request]) -> list[Result]:
        """One result per request, in their order."""
        return list(await asyncio.gather(*(self._sample(request) for request in requests)))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _sample(self, request: Request) -> Result:
        async with self._slots:
            started = time.monotonic()
            retrying = AsyncRetrying(
                retry=retry_if_exception_type(_TryAgainError),
                stop=stop_after_delay(self.settings.deadline),
                wait=self._pause,
                before_sleep=self._warn_of_silence,
                sleep=self._sleep,
                reraise=True,
            )
            try:
                completion: Completion = await retrying(self._try, request)
            except _RefusedError as error:
                return Failure(f"{self._address}: {error}")
            except _TryAgainError as error:
                self._note_deadline(started, str(error))
                return Failure(f"{self._address}: given up after {self.settings.deadline:g} s of trying: {error}")
            self._last_success, self._in_vain = time.monotonic(), 0
            return completion

    def _note_deadline(self, started: float, reason: str) -> None:
        if self._last_success < started:
            self._in_vain += 1
        if self._in_vain == 2:
            self._close_endpoint(f"nothing succeeded for {self.settings.deadline:g} s; last: {reason}")

    def _close_endpoint(self, reason: str) -> None:
        if not self._set_aside.is_set():
            log.warning("policy %s: the endpoint %s is set aside: %s", self.policy.name, self._address, reason)
            self._why = f"endpoint set aside: {reason}"
            self._set_aside.set()

    def _pause(self, state: RetryCallState) -> float:
        error = state.outcome and state.outcome.exception()
        asked = error.retry_after if isinstance(error, _TryAgainError) else 0
        left = self.settings.deadline - (state.seconds_since_start or 0)
        return max(0, min(left, max(asked, BACKOFF(state))))

    def _warn_of_silence(self, state: RetryCallState) -> None:
        now = time.monotonic()
        if max(self._last_success, self._last_warning) < now - REMINDER:
            self._last_warning = now
            log.warning(
                "policy %s: %s gives no answers: %s; every request is tried again for up to %g s",
                self.policy.name,
                self._address,
                state.outcome and state.outcome.exception(),
                self.settings.deadline,
            )

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but wake up when the endpoint is set aside."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._set_aside.wait(), seconds)

    async def _try(self, request: Request) -> Completion:
        if self._set_aside.is_set():
            raise _RefusedError(self._why)
        try:
            async with (
                asyncio.timeout(self.settings.timeout),
                self._client.stream("POST", self._url, json=self._body(request)) as response,
            ):
                content = await read_content(response, MOST_BYTES)
        except TimeoutError:
            raise _TryAgainError(f"no complete reply within {self.settings.timeout:g} s") from None
        except httpx2.HTTPError as error:
            raise _TryAgainError(self._line(f"{type(error).__name__}: {error}")) from None
        status = response.status_code
        if response.is_success:
            return self._completion(content)
        reason = self._line(f"HTTP {status}: {error_message(content) or response.reason_phrase}")
        if status in TRANSIENT or response.is_server_error:
            raise _TryAgainError(reason, retry_after(response))
        if response.is_redirect:
            reason = self._line(f"HTTP {status}: redirected to {response.headers['location']}; give the final address")
        if status in GENERAL or response.is_redirect or (status == 403 and self._last_success < 0):
            self._close_endpoint(reason)
        raise _RefusedError(reason)

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
            _TryAgainError: it is not what the interface promises.
        """
        reply = parse_json(content)
        try:
            choice = reply["choices"][0]
            finish_reason = choice["finish_reason"]
            output = choice["text"] if self.policy.kind == "base" else _answer(choice["message"], finish_reason)
            usage = reply.get("usage") or {}
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _TryAgainError(self._line(f"not a completion: {error_message(content)}")) from None
        if not isinstance(output, str) or not isinstance(finish_reason, str):
            raise _TryAgainError(self._line(f"a completion without text or finish_reason: {error_message(content)}"))
        if finish_reason in ("abort", "error"):
            raise _TryAgainError(f"the server broke off (finish_reason {finish_reason})")
        prompt_tokens, output_tokens = (count if isinstance(count, int) else None for count in counts)
        return Completion(valid_unicode(output), valid_unicode(finish_reason), prompt_tokens, output_tokens)

    def _line(self, text: str) -> str:
        return one_line(text, self._key)


def _answer(message: dict[str, Any], finish_reason: object) -> Any:
    """The content; empty where none was reached, because thinking took all the tokens or a filter stopped it."""
    content = message["content"]
    thought = message.get("reasoning_content") or message.get("reasoning")
    return "" if content is None and (thought or finish_reason in ("length", "content_filter")) else content
