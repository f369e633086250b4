"""A checkpoint as a directory of files: where it is, how a new one replaces an older one, and its `polar.json`.

Nothing here needs torch: clients and servers in front of other engines read the same file as the model does.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from polar.core.errors import InputError, first_mistake, reason
from polar.core.files import write_json
from polar.core.records import Group

CHECKPOINT_FILE = "polar.json"
"""Our own file in a checkpoint directory: template, calibration, probes, provenance."""

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
"""Files of a checkpoint. Other files in its directory are not ours."""

BUNDLED = {name: Path(__file__).parents[1] / "checkpoints" / name for name in ("polar-mini", "polar-nano")}
"""The directories of the reward models that come with the package, by name."""
BUNDLED_NAME = "polar-mini"
"""The one that is taken where none is named."""
BUNDLED_MODEL = BUNDLED[BUNDLED_NAME]

Scale = Literal["raw", "zscore", "probability"]
"""raw: the reward. zscore: (reward - mean) / std. probability: that the answer would be preferred to the reference."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(allow_inf_nan=False, gt=0)]


def checkpoint_directory(path_or_hub_id: str | Path) -> Path:
    """Return the local directory of a checkpoint; a hub name is downloaded (safetensors and JSON only).

    Errors as in `local_directory`.
    """
    if str(path_or_hub_id) in BUNDLED:
        return BUNDLED[str(path_or_hub_id)]
    return local_directory(path_or_hub_id, ["*.safetensors", "*.json"])


def local_directory(source: str | Path, patterns: Sequence[str]) -> Path:
    """Return the directory of a checkpoint; of a hub name, the files that match `patterns` are downloaded.

    Raises:
        InputError: there is no such directory, and the hub does not give the files.
    """
    path = Path(str(source)).expanduser()
    if path.is_dir():
        return path
    if path.exists() or str(source).count("/") != 1 or str(source).startswith((".", "~", "/")):
        raise InputError(f"{source}: no such checkpoint directory; expected a directory or a hub name like owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except Exception as error:  # of the hub, of HTTP or of the disk: in each case the files cannot be had
        raise InputError(f"{source}: neither a directory nor a model that the hub gives ({reason(error)})") from error


def served_directory(path: str | Path) -> Path:
    """Return the directory of a checkpoint that a server has too; nothing is downloaded.

    Raises:
        InputError: there is none.
    """
    directory = BUNDLED.get(str(path)) or Path(str(path)).expanduser()
    if not directory.is_dir():
        raise InputError(
            f"{path}: no such directory; expected the checkpoint that is served (`polar convert` makes one of an "
            f"official POLAR model), or {' or '.join(BUNDLED)}"
        )
    return directory


def read_checkpoint_file(directory: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint's `polar.json`.

    Raises:
        InputError: the file is missing or is not a JSON object.
    """
    return read_json(
        Path(directory) / CHECKPOINT_FILE,
        missing=f"{directory}: no {CHECKPOINT_FILE}, so the input format is unknown; convert an official POLAR "
        "checkpoint with `polar convert`, or train one with `polar pretrain` or `polar finetune`",
    )


def read_json(path: Path, *, missing: str | None = None) -> dict[str, Any]:
    """Return the content of a JSON file of a checkpoint.

    Args:
        path: The file.
        missing: Message of the error if there is none.

    Raises:
        InputError: The file is missing, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        expected = f"{path.parent}: no {path.name}; expected a Hugging Face checkpoint directory"
        raise InputError(missing or expected) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def find_shards(directory: Path) -> list[Path]:
    """Return the weight files of a checkpoint directory, safetensors first; one shard unless there is an index."""
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


def own_files(directory: Path) -> list[Path]:
    """Return the files of a directory that have names of `OWN_FILES`; none if there is no directory."""
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


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rewards of one checkpoint on reference data. Only mean and std are needed, so that one can be written by hand."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    mean: Finite
    std: Positive
    count: int | None = None
    """Rewards that were measured."""
    quantiles: dict[str, Finite] = field(default_factory=dict)
    """Reward by level, from "0.01" to "0.99"."""
    temperature: Positive | None = None
    """None: no pairs were given, or none can be fitted (`fit_temperature`); probabilities then take 1."""
    pairs: int = 0
    """Pairs of a better and a worse answer behind the temperature."""
    accuracy: Finite | None = None
    """Share of the pairs whose better answer has the higher reward, ties counted one half."""
    data: list[str] = field(default_factory=list)
    """Names of the files."""


def read_calibration(directory: Path) -> Calibration | None:
    """Return the calibration in the `polar.json` of a checkpoint, or None.

    Raises:
        InputError: The entry is not a calibration.
    """
    values = read_checkpoint_file(directory).get("calibration")
    if values is None:
        return None
    try:
        return TypeAdapter(Calibration).validate_json(json.dumps(values))
    except ValidationError as error:
        raise InputError(
            f'{directory / CHECKPOINT_FILE}: calibration: expected {{"mean": a number, "std": a positive number, ...}} '
            f"as `polar calibrate` writes it; {first_mistake(error)}"
        ) from error


def scaling(scale: Scale, calibration: Calibration | None) -> Callable[[Sequence[float]], list[float]]:
    """Return the function from the raw rewards of a group to another scale.

    For "probability" the last candidate is the reference itself (`with_reference`), and it is left out of the result.

    Raises:
        InputError: z-scores of a checkpoint without calibration.
    """
    if scale == "raw":
        return list
    if scale == "zscore":
        if calibration is None:
            raise InputError(
                "z-scores need the mean and the standard deviation of the checkpoint's rewards, which its "
                f'{CHECKPOINT_FILE} does not have ("calibration"); run `polar calibrate MODEL --data FILE` first'
            )
        mean, std = calibration.mean, calibration.std
        return lambda rewards: [(reward - mean) / std for reward in rewards]
    temperature = 1.0 if calibration is None or calibration.temperature is None else calibration.temperature
    return lambda rewards: [_sigmoid((reward - rewards[-1]) / temperature) for reward in rewards[:-1]]


def with_reference(group: Group) -> Group:
    """Return the group with its reference as one more candidate, so that it shares the truncation of the others."""
    return replace(group, candidates=(*group.candidates, group.reference))


def save_calibration(directory: Path, calibration: Calibration) -> None:
    """Put a calibration into a checkpoint's `polar.json`, which is replaced in one step; nothing else is touched.

    Raises:
        InputError: there is no checkpoint, or it cannot be written.
    """
    content = {**read_checkpoint_file(directory), "calibration": asdict(calibration)}
    write_json(directory / CHECKPOINT_FILE, content)


def _sigmoid(value: float) -> float:
    """Without overflow on either side."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


@dataclass(frozen=True, slots=True)
class Probe:
    """One input with its known reward (made by `polar.model.probes`, compared by `polar.client.probe`)."""

    ids: list[int]
    text: str
    """The same as text, for people: an engine's tokenizer turns it into `ids`, with BOS if there is one."""
    reward: float
    """In float32."""
    without_score_token: float
    """Reward of the same ids without the last token."""
    with_bos: float | None
    """Reward with a BOS in front (once more); None when the model has none."""


def read_probes(directory: Path) -> list[Probe]:
    """Return the probes of a checkpoint; an empty list if it was made without.

    Raises:
        InputError: The entry is damaged.
    """
    entries = read_checkpoint_file(directory).get("probes", [])
    try:
        probes = [Probe(**entry) for entry in entries]
        sound = all(
            probe.ids and math.isfinite(probe.reward) and math.isfinite(probe.without_score_token) for probe in probes
        )
    except TypeError:
        sound = False
    if not sound:
        raise InputError(
            f'{directory / CHECKPOINT_FILE}: "probes" is damaged; load the model with RewardModel and save it again'
        )
    return probes
