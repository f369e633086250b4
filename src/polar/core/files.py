"""Files and directories that appear complete or not at all.

They are written under a hidden name beside the target, which readers of directories skip, and renamed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from polar.core.errors import InputError


@contextlib.contextmanager
def on_disk(path: str | Path) -> Iterator[None]:
    """Report errors of the operating system (a full disk, a missing directory) as errors of the given path.

    Raises:
        InputError: In place of an `OSError`, or of what a library raises that writes files by itself.
    """
    try:
        yield
    except (BrokenPipeError, InputError):  # the reader of stdout went away, which is no mistake
        raise
    except Exception as error:
        if (refused := refusal(error)) is None:
            raise
        raise InputError(f"{path}: cannot be written: {refused}") from error


def refusal(error: Exception) -> str | None:
    """Return what the operating system refused, or None if that is not what an error is about.

    Libraries in Rust (safetensors, tokenizers) and C++ (torch) have types and texts of their own for it.
    """
    if isinstance(error, OSError):
        return " ".join((error.strerror or str(error)).split())
    text = str(error)
    if in_rust := re.search(r"([^:\n]+) \(os error \d+\)", text):
        return in_rust[1].strip()
    if "PytorchStreamWriter" in text or "unexpected pos" in text:
        return "a file cannot be written whole, as on a full disk"
    return None


@contextlib.contextmanager
def new_file(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """Open a file for bytes, which replaces the one at `path` when the block ends without an error.

    Args:
        path: The file.
        sync: Wait until it is on the disk before it gets its name, so that a power failure leaves the old file or the
            whole new one. Without it a power failure may leave half a file; a process that is killed never does.

    Raises:
        InputError: the disk refuses to begin or to end it; errors of the block are raised as they are.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with on_disk(path):
        file = temporary.open("wb")
    try:
        yield file
        with on_disk(path):
            file.flush()
            if sync:
                os.fsync(file.fileno())
            file.close()
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # closed already, or on a full disk, which refuses once more
            file.close()
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, completely or not at all.

    Raises:
        InputError: the disk refuses it.
    """
    with new_file(path) as file, on_disk(path):
        file.write(text.encode())


def write_json(path: Path, content: object) -> None:
    """Write JSON, indented, for people and programs, completely or not at all.

    Raises:
        InputError: the disk refuses it.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Make a directory to be filled, which appears at `target` when the block ends without an error.

    Raises:
        InputError: the target is in use, or the disk refuses it; errors of the block are raised as they are.
    """
    require_new(target)
    with staging_directory(target) as written:
        yield written
        with on_disk(target):
            if target.exists():
                target.rmdir()
            written.rename(target)


@contextlib.contextmanager
def staging_directory(target: Path, *, inside: bool = False) -> Iterator[Path]:
    """Make a hidden directory to fill before its content moves to `target`; the rest is removed when the block ends.

    Args:
        target: The directory to be written.
        inside: Make it in `target`, which may be a file system of its own, and not beside it.

    Raises:
        InputError: the disk refuses it; errors of the block are raised as they are.
    """
    with contextlib.ExitStack() as stack:
        with on_disk(target):
            place = target if inside else target.parent
            place.mkdir(parents=True, exist_ok=True)
            hidden = stack.enter_context(TemporaryDirectory(dir=place, prefix=f".{target.name}."))
            written = Path(hidden) / "new"
            written.mkdir()
        yield written


def require_new(target: Path) -> None:
    """Check that a directory to be written does not exist yet, or is empty.

    Raises:
        InputError: it holds something, or is a file.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists already; choose a new directory")
