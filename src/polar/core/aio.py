"""Asynchronous work for callers that are not asynchronous: scripts, threads, notebooks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end and return its result; Ctrl-C cancels it.

    Inside a running event loop, as in a notebook, it gets a loop and a thread of its own, and the caller waits.
    """
    if not _in_a_loop():
        return asyncio.run(work)
    loop = asyncio.new_event_loop()

    def run_in_own_loop() -> Result:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(work)

    with ThreadPoolExecutor(1, "polar") as thread:
        future = thread.submit(run_in_own_loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
            raise


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
