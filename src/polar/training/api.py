"""`polar.pretrain` and `polar.finetune`: training from Python, on files or on data in memory.

Functions import torch when they are called, so that `from polar import pretrain` is quick.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from polar.core.errors import InputError, first_mistake
from polar.core.files import on_disk
from polar.core.records import Preference, Triple
from polar.data.readers import Rows, read_preferences, read_triples
from polar.data.writers import open_writer, record_to_dict
from polar.model.reward_model import RewardModel
from polar.training.config import FinetuneConfig, PretrainConfig, TrainConfig

Config = TypeVar("Config", bound=TrainConfig)
Data = Rows | Sequence[str | Path]
"""One file or several, or rows in memory: records, dictionaries as in the files, a data set of Hugging Face."""


def pretrain(
    model: str | Path, triples: Data, *, output: str | Path, eval_data: Data = (), **settings: Any
) -> RewardModel:
    """Train a policy discriminator on triples, save it to `output` and return it.

    The call goes on with a run in the same `output` that was stopped, also with data in memory: those are kept under
    `<output>/run/data`. It works in any thread; signals stop a run in the main thread only.

    Args:
        model: "scratch" for a small network made from the data, a causal language model, or a reward model (directory
            or hub name).
        triples: Training data; fields as in `polar.Triple`.
        output: Directory of the checkpoint.
        eval_data: Held-out data of the same kind.
        settings: Fields of `polar.training.config.PretrainConfig`, such as learning_rate; lora and scratch may be
            dictionaries.

    Raises:
        InputError: a setting, a file or a row is wrong, or a loss is not finite.
        TerminatedError, KeyboardInterrupt: a signal stopped the run, after a checkpoint.
    """
    from polar.training import run

    return run.pretrain(_config(PretrainConfig, read_triples, model, triples, output, eval_data, settings))


def finetune(
    model: str | Path, preferences: Data, *, output: str | Path, eval_data: Data = (), **settings: Any
) -> RewardModel:
    """Fine-tune a reward model on preferences in any format of `polar.data.formats`, save it to `output` and return it.

    Arguments and errors as in `pretrain`; settings are fields of `polar.training.config.FinetuneConfig`.
    """
    from polar.training import run

    return run.finetune(_config(FinetuneConfig, read_preferences, model, preferences, output, eval_data, settings))


def _config(
    kind: type[Config],
    read: Callable[..., Iterator[Triple | Preference]],
    model: str | Path,
    data: Data,
    output: str | Path,
    eval_data: Data,
    settings: Mapping[str, Any],
) -> Config:
    if not isinstance(model, str | Path):
        raise InputError(f"model: expected the name or directory of a checkpoint, found a {type(model).__name__}")
    values = {**settings, "model": str(model), "output": str(output), "data": ["-"], "eval_data": []}
    try:
        config = TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise InputError(f"settings: {first_mistake(error)}") from error
    config.data = _paths(data, "data", read, config)
    config.eval_data = _paths(eval_data, "eval_data", read, config)
    if not config.data:
        raise InputError("data: expected files or rows, found none")
    return config


def _paths(data: Data, name: str, read: Callable[..., Iterator[Triple | Preference]], config: TrainConfig) -> list[str]:
    """Return the files with the data; rows in memory are written to one first, so that a run can go on."""
    if isinstance(data, str | Path):
        return [str(data)]
    if isinstance(data, Mapping):
        keys = ", ".join(map(str, list(data)[:3]))
        raise InputError(f"{name}: expected files or rows, found one mapping of {keys}; choose a split, or give a list")
    if isinstance(data, list | tuple) and all(isinstance(one, str | Path) for one in data):
        return [str(one) for one in data]
    from polar.training.distributed import from_main, join_processes

    join_processes()
    return [from_main(lambda: _written(read(data, on_bad_row=config.on_bad_row), name, Path(config.output)))]


def _written(records: Iterable[Triple | Preference], name: str, output: Path) -> str:
    """Write records to a file that is named by its content, unless it is there from the same call before."""
    from polar.training.checkpoints import require_free

    with on_disk(output):
        require_free(output)
        directory = output / "run" / "data"
        directory.mkdir(parents=True, exist_ok=True)
    written = directory / f"{name}.jsonl"
    with open_writer(written) as writer:
        for record in records:
            writer.write(record_to_dict(record))
    with on_disk(directory):
        with written.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        kept = directory / f"{name}-{digest[:16]}.jsonl"
        if kept.exists():
            written.unlink()
        else:
            written.rename(kept)
    return str(kept)
