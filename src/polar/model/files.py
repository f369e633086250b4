"""The files of a Hugging Face checkpoint: JSON, weights, and how a new checkpoint replaces an older one."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from polar.core.checkpoint import CHECKPOINT_FILE
from polar.core.errors import InputError, reason

if TYPE_CHECKING:
    from torch import Tensor

OWN_FILES = (
    CHECKPOINT_FILE,
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates",
)
"""What a checkpoint may consist of. Whatever else stands in its directory is not ours."""


def find_shards(directory: Path) -> list[Path]:
    """The weight files of a checkpoint directory, safetensors first; one shard unless there is an index."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (directory / single).is_file():
            return [directory / single]
        index = directory / f"{single}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
            if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
                raise InputError(f'{index}: expected a "weight_map" from tensors to files of this directory')
            return [directory / name for name in sorted(names)]
    raise InputError(
        f"{directory}: no weights; expected model.safetensors or pytorch_model.bin, or shards of one with their index"
    )


def read_shard(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one weight file, one after the other; nothing in the file can run code.

    Raises:
        InputError: the file is missing or damaged, or it holds something else than tensors.
    """
    import torch

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield name, file.get_tensor(name)
            return
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file, but the index names it; download the checkpoint again") from error
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: not a plain file of tensors; refused, because loading it could run code") from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(
            f"{path}: not readable as weights ({reason(error)}); download it again or store it as safetensors"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise InputError(f"{path}: expected a dictionary of tensors")
    yield from tensors.items()


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        InputError: the file is missing, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent}: no {path.name}; expected a Hugging Face checkpoint directory") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def own_files(directory: Path) -> list[Path]:
    """What in a directory has the name of a checkpoint's file (`OWN_FILES`); nothing if there is no directory."""
    return sorted({path for pattern in OWN_FILES for path in directory.glob(pattern)})


def put_in_place(written: Path, target: Path) -> None:
    """Move a whole checkpoint into a directory, in place of an older one; other files there stay.

    Nothing is a checkpoint without its `polar.json`, so that goes first and comes last: a process that is killed in
    between leaves no checkpoint there, and never a mixture of two.

    Raises:
        OSError: the directory cannot be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    (target / CHECKPOINT_FILE).unlink(missing_ok=True)
    for path in own_files(target):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in sorted(written.iterdir(), key=lambda path: (path.name == CHECKPOINT_FILE, path.name)):
        path.replace(target / path.name)
