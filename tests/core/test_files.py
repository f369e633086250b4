"""Files and directories that are complete or not there."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from polar.core.errors import InputError
from polar.core.files import new_directory, new_file, on_disk, require_new, write_json, write_text
from tests.killing import files_of_at_most


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_replaces_the_old_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with new_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
        assert all(name.startswith(".") for name in names(tmp_path) if name != "a.txt")
    assert (path.read_text(), names(tmp_path)) == ("new", ["a.txt"])


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write_half() -> None:
        with new_file(path) as file:
            file.write(b"new")
            raise OSError("of the block")

    with pytest.raises(OSError, match="of the block"):
        write_half()
    assert (path.read_text(), names(tmp_path)) == ("old", ["a.txt"])


@pytest.mark.parametrize(
    "write",
    [
        lambda path, tokenizer: path.write_bytes(bytes(9000)),
        lambda path, tokenizer: tokenizer.save(str(path)),
        lambda path, tokenizer: save_file({"weight": torch.zeros(9000)}, path),
        lambda path, tokenizer: torch.save({"weight": torch.zeros(9000)}, path),
    ],
    ids=["python", "tokenizers", "safetensors", "torch"],
)
def test_a_full_disk_is_one_line_whoever_writes(
    write: Callable[[Path, Tokenizer], None], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    refused = pytest.raises(InputError, match=r"^/.*/a: cannot be written: \w[^\n]+$")
    with files_of_at_most(4096), refused, on_disk(path):
        write(path, tokenizer)


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes differ"), InputError("a: 1 (os error 28)"), BrokenPipeError()):
        with pytest.raises(type(error)) as raised, on_disk(tmp_path):
            raise error
        assert raised.value is error


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": "ü"})
    assert path.read_bytes() == '{\n  "a": "ü"\n}\n'.encode()
    monkeypatch.setattr(*{"fsync": (os, "fsync", full), "replace": (Path, "replace", full)}[step])
    with pytest.raises(InputError, match=r"a\.json: cannot be written: No space left on device"):
        write_json(path, {"b": 1})
    assert path.read_bytes() == '{\n  "a": "ü"\n}\n'.encode()
    assert names(tmp_path) == ["a.json"]


def test_a_missing_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        write_text(tmp_path / "none" / "a", "")


def test_a_directory_appears_when_it_is_filled(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "new"
    with new_directory(target) as written:
        (written / "a").write_text("b")
        assert not target.exists()
    assert (names(target), names(target.parent)) == (["a"], ["new"])
    with pytest.raises(InputError, match="exists already; choose a new directory"), new_directory(target):
        pytest.fail("the block is not run")


def test_an_empty_directory_is_taken_and_stays_empty_after_an_error(tmp_path: Path) -> None:
    target = tmp_path / "new"
    target.mkdir()

    def write_half() -> None:
        with new_directory(target) as written:
            (written / "a").write_text("b")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert (names(target), names(tmp_path)) == ([], ["new"])
    with new_directory(target) as written:
        (written / "a").write_text("b")
    assert names(target) == ["a"]


def test_a_file_in_the_place_of_a_directory_is_one_line(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "")
    with pytest.raises(InputError, match="exists already"):
        require_new(tmp_path / "a")
