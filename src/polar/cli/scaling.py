"""`polar scaling`: models of several sizes are trained, and power laws fitted to their held-out losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from polar.core.errors import InputError
from polar.training.config import PretrainConfig
from polar.training.init_model import ScratchConfig
from polar.training.scaling import plot, run_sweep, summary


def scaling(recipe: str, /, *, output: str) -> None:
    """Train models of several sizes on the same triples, and fit L(N) and L(C) to their held-out losses.

    The recipe is a YAML file: `base` holds what polar pretrain takes (data, eval_data, max_steps, ...), `sizes` a name
    and the scratch settings of each model, and its learning_rate where that of base does not suit it. Its losses during
    training are the points of L(C), so eval_steps sets how many there are. A sweep that was stopped goes on with the
    model it was at.

    Examples:
      polar scaling sizes.yaml --output scaling

    Args:
        recipe: YAML file.
        output: Directory for the models, scaling.json and scaling.svg.
    """
    directory = Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    points = run_sweep(read_sweep(recipe), directory)
    found = summary(points)
    (directory / "scaling.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    plot(points, directory / "scaling.svg")
    Console(stderr=True).print(_table(found))
    sys.stderr.write(f"wrote scaling.json and scaling.svg to {output}\n")


def read_sweep(path: str) -> dict[str, PretrainConfig]:
    """Read the settings of every model from a recipe; their output is still empty.

    Raises:
        InputError: it is missing, not YAML, or names something that is no setting.
    """
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or set(content) != {"base", "sizes"}:
        raise InputError(f"{path}: expected base (settings of polar pretrain) and sizes (name: scratch settings)")
    shared = {"output": "", **content["base"]}
    _settings(PretrainConfig, shared, f"{path}: base")
    return {name: _model(shared, dict(size), f"{path}: sizes.{name}") for name, size in content["sizes"].items()}


def _model(shared: dict[str, Any], size: dict[str, Any], place: str) -> PretrainConfig:
    own = {"learning_rate": size.pop("learning_rate")} if "learning_rate" in size else {}
    shape = _settings(ScratchConfig, size, place)
    model: PretrainConfig = _settings(PretrainConfig, {**shared, **own, "scratch": shape}, place)
    return model


def _settings(kind: Any, values: dict[str, Any], place: str) -> Any:
    if unknown := values.keys() - kind.__dataclass_fields__.keys():
        raise InputError(
            f"{place}: {sorted(unknown)[0]} is no setting; expected {', '.join(kind.__dataclass_fields__)}"
        )
    try:
        return kind(**values)
    except TypeError as error:
        raise InputError(f"{place}: {error}") from error


def _table(found: dict[str, Any]) -> Table:
    table = Table("law", "exponent", "95 %", "R²", "points", box=None, pad_edge=False)
    for name, symbol in (("parameters", "N"), ("compute", "C")):
        law = found[name]["law"]
        low, high = law["exponent_interval"]
        text = f"L = {law['coefficient']:.3g} {symbol}^-{law['exponent']:.4f}"
        table.add_row(
            text, f"{law['exponent']:.4f}", f"{low:.4f} to {high:.4f}", f"{law['r_squared']:.4f}", str(law["points"])
        )
    return table
