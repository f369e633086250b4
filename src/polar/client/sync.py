"""`RewardModelClient`: the client for ordinary code, with the interface of the original POLAR client."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from tenacity import RetryCallState, retry_if_exception_type, stop_after_delay

from polar.client.client import AsyncRewardModelClient
from polar.client.engines import ServerType
from polar.client.transport import QUESTION_SECONDS, Limits, open_servers
from polar.core import aio
from polar.core.checkpoint import BUNDLED_NAME, CHECKPOINT_FILE
from polar.core.errors import EngineError, InputError
from polar.core.http import NO_SUCH_PATH, BrokenError, Endpoint, RefusedError, UnavailableError, parse_json, retrying
from polar.core.records import Comparison, Group
from polar.core.template import Compat, EncodedGroup, seed_text
from polar.data.record_rows import Item, comparisons

log = logging.getLogger(__name__)

CHECKPOINT_PATH = "/v1/checkpoint"
Result = TypeVar("Result")


class RewardModelClient:
    """`AsyncRewardModelClient` without `await`, from any thread; it also works inside a running event loop (Jupyter).

    It takes the place of the class of the same name in the original POLAR code: the same arguments, `encode`, calls
    and request methods. What differs: a failure is a `RewardError` (never None), inputs go out as token ids, requests
    are split and tried again with care, and a server that answers other rewards is refused.

    Its requests run on a thread of its own. Close it, or use it as a context manager; otherwise it is closed with the
    process.

    Example:
        >>> with RewardModelClient("polar-mini", server_address="127.0.0.1:30000") as client:
        ...     rewards = client([{"prompt": "2+2?", "reference": "It is 4.", "output": "4"}])

    Args:
        path: See `AsyncRewardModelClient`, also for the arguments not named here.
        max_length: Longest input in tokens (default: the checkpoint's).
        max_response_length: Longest reference and output in tokens (default: the checkpoint's).
        response_cut_side: "left" makes `encode` and calls keep the end of what is too long, as the original can; it
            includes compat="seed" for them. Training and all other methods cut on the right.
        server_type: What serves there; "auto" finds out.
        server_address: host:port or a URL, several of them in a list or separated by commas.
        compat: "seed" builds the inputs exactly as the original does.
        limits: How much is sent at a time, and for how long.
        probe: Refuse servers that do not give the rewards of the checkpoint's probes.

    Raises:
        InputError: the checkpoint, an address or the key is unusable.
    """

    def __init__(
        self,
        path: str | Path = BUNDLED_NAME,
        max_length: int | None = None,
        max_response_length: int | None = None,
        response_cut_side: Literal["right", "left"] = "right",
        server_type: ServerType = "auto",
        server_address: str | Sequence[str] = "127.0.0.1:30000",
        *,
        compat: Compat | None = None,
        limits: Limits | None = None,
        probe: bool = True,
    ) -> None:
        if response_cut_side not in ("right", "left"):
            raise InputError(f'response_cut_side must be "right" or "left", found {response_cut_side!r}')

        def connect_to(kind: ServerType) -> AsyncRewardModelClient:
            return AsyncRewardModelClient(
                path,
                server_address=server_address,
                server_type=kind,
                compat=compat,
                max_length=max_length,
                max_response_length=max_response_length,
                limits=limits,
                probe=probe,
            )

        self._connect_to = connect_to
        self._server_type = server_type
        self._cut_side = response_cut_side
        self._as_seed = compat == "seed" or response_cut_side == "left"
        self._client = connect_to(server_type)
        self._clients = {server_type: self._client}
        """One per way to ask that was used; the request methods name theirs."""
        self.template = self._client.template
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="polar-client", daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._clients, self._loop, self._thread)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close connections and thread; may be called again."""
        self._finalizer()

    def connect(self) -> None:
        """See `AsyncRewardModelClient.connect`."""
        self._run(self._client.connect())

    def score(
        self,
        comparisons: Comparison | Item | Iterable[Comparison | Item],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> list[float]:
        """See `AsyncRewardModelClient.score`; `progress` is called from another thread."""
        return self._run(self._client.score(comparisons, progress=progress))

    def score_groups(
        self, groups: Iterable[Group], *, progress: Callable[[int], object] | None = None
    ) -> list[list[float]]:
        """See `AsyncRewardModelClient.score_groups`; `progress` is called from another thread."""
        return self._run(self._client.score_groups(groups, progress=progress))

    def score_encoded(
        self, groups: Sequence[EncodedGroup], *, progress: Callable[[int], object] | None = None
    ) -> list[list[float]]:
        """See `AsyncRewardModelClient.score_encoded`; `progress` is called from another thread."""
        return self._run(self._client.score_encoded(groups, progress=progress))

    def score_ids(
        self, sequences: Iterable[list[int]], *, progress: Callable[[int], object] | None = None
    ) -> list[float]:
        """See `AsyncRewardModelClient.score_ids`; `progress` is called from another thread."""
        return self._run(self._client.score_ids(sequences, progress=progress))

    def start_one(self, comparison: Comparison) -> Future[float]:
        """See `AsyncRewardModelClient.score_one`; the future can be waited for in any thread or event loop."""
        return self._start(self._client.score_one(comparison))

    def __call__(self, data: Item | Sequence[Item]) -> list[float]:
        """Rewards of items, in their order; of a single item a list of one.

        Args:
            data: {"prompt", "reference", "output" [, "wrapper"]}, or a list of such. Texts are strings or lists of
                messages. wrapper is "sft" (default) or "pretrain".

        Raises:
            InputError: an item is not of that form.
            RewardError: some failed; it says which and why, and keeps the others.
            EngineError: the server does not give this checkpoint's rewards.
        """
        if self._as_seed:
            return self.score_ids(map(self._ids, map(self._seed_text, comparisons(data))))
        return self.score(data)

    def encode(self, data: Item | Sequence[Item]) -> str | list[str]:
        """The texts that the original client would send for these items, as one string for a single item.

        They end with the score token and can be given to the request methods.
        """
        texts = [self._seed_text(comparison) for comparison in comparisons(data)]
        return texts[0] if isinstance(data, Mapping) else texts

    def sglang_request_reward(self, data: str | Sequence[str]) -> list[float]:
        """Rewards of texts made by `encode`, asked in the format of SGLang."""
        return self._request(data, "sglang")

    def vllm_request_reward(self, data: str | Sequence[str]) -> list[float]:
        """Rewards of texts made by `encode`, asked in the format of vLLM."""
        return self._request(data, "vllm")

    def lmdeploy_request_reward(self, data: str | Sequence[str]) -> list[float]:
        """Rewards of texts made by `encode`, asked in the format of LMDeploy."""
        return self._request(data, "lmdeploy")

    def _request(self, data: str | Sequence[str], server_type: ServerType) -> list[float]:
        if self._server_type.startswith(server_type):  # vllm-pooling is also vllm
            server_type = self._server_type
        if server_type not in self._clients:
            self._clients[server_type] = self._connect_to(server_type)
        texts = [data] if isinstance(data, str) else data
        return self._run(self._clients[server_type].score_ids(map(self._ids, texts)))

    def _seed_text(self, comparison: Comparison) -> str:
        template = self.template
        text, _ = seed_text(
            template.tokenizer,
            template.settings,
            comparison.prompt,
            comparison.reference,
            comparison.output,
            wrapper=comparison.wrapper,
            response_cut_side=self._cut_side,
        )
        return text

    def _ids(self, text: str) -> list[int]:
        """Return the ids of a text as a server's tokenizer makes them: special tokens that it spells become tokens."""
        bos = self.template.settings.bos_token_id
        return [*([] if bos is None else [bos]), *self.template.tokenizer.encode(text, add_special_tokens=False).ids]

    def _start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        if not self._thread.is_alive():
            work.close()
            raise RuntimeError("the client is closed, or belongs to the process that this one was forked from")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = self._start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # after Ctrl-C nothing goes on behind the caller's back
            raise


def _stop(
    clients: Mapping[ServerType, AsyncRewardModelClient], loop: asyncio.AbstractEventLoop, thread: threading.Thread
) -> None:
    if not thread.is_alive():  # a forked process has the client, but not its thread
        return
    for client in clients.values():
        asyncio.run_coroutine_threadsafe(client.aclose(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def fetch_checkpoint(server_address: str, directory: Path, deadline: float) -> None:
    """Write the tokenizer.json and the polar.json of the checkpoint that servers have into a directory.

    The first server that answers is believed; the probes of its checkpoint prove the others. Servers that cannot be
    reached are asked again, so this blocks until the deadline.

    Args:
        server_address: As for `AsyncRewardModelClient`.
        directory: Where the files go.
        deadline: Seconds after which it is given up.

    Raises:
        InputError: an address or the key is unusable.
        EngineError: none can be reached, or a server is no `polar serve`, or refuses us.
    """
    endpoints = [server.endpoint for server in open_servers(server_address, "auto", Limits())]
    address, content = aio.run(_first_checkpoint(endpoints, deadline))
    match content:
        case {"checkpoint": dict(facts), "tokenizer": str(tokenizer)}:
            (directory / CHECKPOINT_FILE).write_text(json.dumps(facts), "utf-8")
            (directory / "tokenizer.json").write_text(tokenizer, "utf-8")
        case _:
            raise EngineError(f"{address}: no `polar serve`, which would tell its checkpoint at {CHECKPOINT_PATH}")


async def _first_checkpoint(endpoints: Sequence[Endpoint], deadline: float) -> tuple[str, Any]:
    """The address of the first server that answers, and what it says about its checkpoint."""

    async def ask_each() -> tuple[str, Any]:
        reasons = []
        for endpoint in endpoints:
            try:
                reply = await endpoint.fetch("GET", CHECKPOINT_PATH, min(QUESTION_SECONDS, deadline))
                return endpoint.address, parse_json(reply.content)
            except (UnavailableError, BrokenError) as error:
                reasons.append(f"{endpoint.address}: {error}")
            except RefusedError as error:
                if error.status in NO_SUCH_PATH:
                    return endpoint.address, None
                raise EngineError(f"{endpoint.address}: {error}") from None
        raise UnavailableError("; ".join(reasons))

    def report(state: RetryCallState) -> None:
        level = logging.WARNING if state.attempt_number == 1 else logging.DEBUG
        log.log(level, "%s; asked again later", state.outcome and state.outcome.exception())

    unavailable = retry_if_exception_type(UnavailableError)
    try:
        tries = retrying(unavailable, stop_after_delay(deadline), deadline=deadline, before_sleep=report)
        found: tuple[str, Any] = await tries(ask_each)
        return found
    except UnavailableError as error:
        raise EngineError(f"no server answers: {error}") from None
    finally:
        for endpoint in endpoints:
            await endpoint.close()
