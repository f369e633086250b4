"""A process that is killed between any two changes that it makes to files, and one whose disk is full."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}


def killed_before_change(number: int, work: Callable[[Callable[[], None]], object]) -> bool:
    """Do some work in a copy of this process, which SIGKILL ends before its change of that number.

    Args:
        number: Of the change, from 1: a file that is opened for writing, renamed or removed, or a directory likewise.
        work: Called with a function that begins to count.

    Returns:
        Whether it was killed; otherwise it came to its end before.
    """
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            work(lambda: _kill_before(number))
            os._exit(0)
        finally:  # an exception is printed by nobody, but the exit code tells
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def _kill_before(number: int) -> None:
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or written:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file of this process grow further, in bytes: to whoever writes, this is like a full disk."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
