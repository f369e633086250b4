"""Scaling laws: how the held-out loss falls with parameters and with compute (paper 4.4).

    python recipes/scaling/scaling.py sizes.yaml --output scaling

trains models of several sizes on the same triples, and fits L(N) and L(C) to their held-out losses; OUTPUT gets the
models, scaling.json and scaling.svg. In the YAML file `base` holds what `polar pretrain` takes (data, eval_data,
max_steps, ...), and `sizes` a name and the scratch settings of each model, with its learning_rate where that of base
does not suit it. The losses during training are the points of L(C), so eval_steps sets how many there are. A sweep that
was stopped goes on with the model it was at.

A law is L = a x^-b, fitted as a straight line through the logarithms. The paper finds L = 0.9 N^-0.0425 (N in billions,
R^2 0.9886) and L = 2.4 C^-0.0342 (R^2 0.9912) for five models of 50M to 1B parameters.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy import stats

from polar import InputError, RewardModel
from polar.core.files import write_json
from polar.training.config import PretrainConfig, ScratchConfig
from polar.training.run import pretrain

Values = NDArray[np.float64]
CONFIDENCE = 0.95
FEWEST = 3
"""Points of a fit; with two every line is perfect."""


@dataclass(frozen=True, slots=True)
class Point:
    """The held-out loss of one model at one moment of its training."""

    name: str
    """Of the model."""
    parameters: int
    """Without embeddings, which do not take part in what a small model computes."""
    tokens: float
    """Seen in training so far."""
    loss: float

    @property
    def compute(self) -> float:
        """Operations, 6 per parameter and token (Kaplan et al. 2020, arXiv 2001.08361)."""
        return 6 * self.parameters * self.tokens


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """L = coefficient * x^-exponent, with what its uncertainty needs."""

    coefficient: float
    exponent: float
    exponent_interval: tuple[float, float]
    """95 % confidence."""
    r_squared: float
    """Of the line through the logarithms."""
    points: int
    log_center: float
    """Mean of ln x."""
    log_spread: float
    """Sum of (ln x - mean)^2."""
    residual: float
    """Standard deviation of ln L about the line."""

    def predict(self, x: float | Values) -> Values:
        """The loss at x."""
        return np.asarray(self.coefficient * np.asarray(x, np.float64) ** -self.exponent)

    def band(self, x: float | Values) -> tuple[Values, Values]:
        """Where the line itself lies at x, with 95 % confidence."""
        distance = (np.log(np.asarray(x, np.float64)) - self.log_center) ** 2 / self.log_spread
        student = stats.t.ppf((1 + CONFIDENCE) / 2, self.points - 2)
        width = np.exp(student * self.residual * np.sqrt(1 / self.points + distance))
        return self.predict(x) / width, self.predict(x) * width


def fit(x: Sequence[float], loss: Sequence[float]) -> PowerLaw:
    """Fit a power law by least squares on the logarithms.

    Raises:
        InputError: there are fewer than three different x, or a value is not above zero.
    """
    if len(set(x)) < FEWEST:
        raise InputError(f"a power law needs at least {FEWEST} different sizes or budgets, found {len(set(x))}")
    if not all(np.isfinite(value) and value > 0 for value in (*x, *loss)):
        raise InputError("a power law needs finite values above 0")
    log_x, log_loss = np.log(np.asarray(x, np.float64)), np.log(np.asarray(loss, np.float64))
    line = stats.linregress(log_x, log_loss)
    student = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 2)
    residuals = log_loss - (line.intercept + line.slope * log_x)
    return PowerLaw(
        coefficient=float(np.exp(line.intercept)),
        exponent=-float(line.slope),
        exponent_interval=(-float(line.slope + student * line.stderr), -float(line.slope - student * line.stderr)),
        r_squared=float(line.rvalue**2),
        points=len(x),
        log_center=float(log_x.mean()),
        log_spread=float(((log_x - log_x.mean()) ** 2).sum()),
        residual=float(np.sqrt((residuals**2).sum() / (len(x) - 2))),
    )


def largest_budgets(points: Iterable[Point]) -> list[Point]:
    """Of every model its last point, for L(N)."""
    last: dict[int, Point] = {}
    for point in sorted(points, key=lambda point: point.tokens):
        last[point.parameters] = point
    return [last[parameters] for parameters in sorted(last)]


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other one beats with as little compute, for L(C)."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.compute, point.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def read_sweep(path: Path) -> dict[str, PretrainConfig]:
    """Read the settings of every model; their output is still empty.

    Raises:
        TypeError, InputError: something is no setting, or has a wrong value.
    """
    content = yaml.safe_load(path.read_text("utf-8"))
    sizes = {}
    for name, shape in content["sizes"].items():
        own = {"learning_rate": shape.pop("learning_rate")} if "learning_rate" in shape else {}
        sizes[name] = PretrainConfig(**{"output": "", **content["base"], **own, "scratch": ScratchConfig(**shape)})
    return sizes


def run_sweep(sizes: Mapping[str, PretrainConfig], directory: Path) -> list[Point]:
    """Train every model that has no result yet, the smallest first, and collect all points.

    A result is written when its model is trained, so a sweep that was stopped goes on with the model it was at.

    Args:
        sizes: Name -> settings of the model; its output is set here.
        directory: Where the models go, each into a directory of its name.

    Raises:
        InputError: no held-out data, or a bad configuration.
    """
    if not all(config.eval_data for config in sizes.values()):
        raise InputError("scaling: name held-out triples with eval_data; the law is about their loss")
    points: list[Point] = []
    for name, config in sorted(sizes.items(), key=lambda item: parameters_of(item[1].scratch)):
        result = directory / name / "points.json"
        if not result.exists():
            print(f"training {name}, {parameters_of(config.scratch):,} parameters without embeddings", flush=True)
            write_json(result, [asdict(point) for point in _train(name, replace(config, output=str(directory / name)))])
        points += [Point(**point) for point in json.loads(result.read_text("utf-8"))]
    return points


def parameters_of(shape: ScratchConfig) -> int:
    """Of the layers of a model from scratch; every attention head has its own keys and values."""
    attention, feed_forward, norms = 4 * shape.hidden_size**2, 3 * shape.hidden_size * shape.intermediate_size, 2
    return shape.num_layers * (attention + feed_forward + norms * shape.hidden_size) + shape.hidden_size


def _train(name: str, config: PretrainConfig) -> list[Point]:
    finished = (Path(config.output) / "polar.json").exists()
    model = RewardModel.load(config.output) if finished else pretrain(config)
    training = model.provenance["training"]
    state = json.loads((Path(config.output) / "run" / "trainer_state.json").read_text("utf-8"))
    tokens_per_step = training["tokens"] / training["steps"]
    evaluations = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    parameters = parameters_of(config.scratch)
    return [Point(name, parameters, tokens_per_step * step, loss) for step, loss in sorted(evaluations.items())]


def summary(points: Sequence[Point]) -> dict[str, Any]:
    """Both laws with the points that they are fitted to, plain values for JSON."""
    by_size, by_compute = largest_budgets(points), frontier(points)
    return {
        "parameters": _law([point.parameters for point in by_size], by_size),
        "compute": _law([point.compute for point in by_compute], by_compute),
        "points": [asdict(point) | {"compute": point.compute} for point in points],
    }


def _law(x: Sequence[float], points: Sequence[Point]) -> dict[str, Any]:
    law = fit(x, [point.loss for point in points])
    return {"law": asdict(law), "fitted_to": [[value, point.loss] for value, point in zip(x, points, strict=True)]}


def plot(points: Sequence[Point], path: Path) -> None:
    """Draw both laws with their 95 % bands into an SVG file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    by_size, by_compute = largest_budgets(points), frontier(points)
    _draw(left, [point.parameters for point in by_size], by_size, "parameters without embeddings")
    for name in dict.fromkeys(point.name for point in points):
        own = sorted((point for point in points if point.name == name), key=lambda point: point.tokens)
        right.plot([point.compute for point in own], [point.loss for point in own], color="0.75", linewidth=1)
    _draw(right, [point.compute for point in by_compute], by_compute, "compute (floating point operations)")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "polar"}), path.open("wb") as stream:
        figure.savefig(stream, format="svg", metadata={"Date": None})


def _draw(axes: Any, x: Sequence[float], points: Sequence[Point], label: str) -> None:
    law = fit(x, [point.loss for point in points])
    line = np.geomspace(min(x), max(x), 100)
    low, high = law.band(line)
    axes.fill_between(line, low, high, alpha=0.2, linewidth=0)
    axes.plot(line, law.predict(line), label=f"exponent {law.exponent:.4f}, R² {law.r_squared:.3f}")
    axes.plot(x, [point.loss for point in points], "o", color="black", markersize=4)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="held-out loss")
    axes.legend(frameon=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    measured = run_sweep(read_sweep(options.recipe), options.output)
    write_json(options.output / "scaling.json", summary(measured))
    plot(measured, options.output / "scaling.svg")
    for symbol, name in (("N", "parameters"), ("C", "compute")):
        law = summary(measured)[name]["law"]
        low, high = law["exponent_interval"]
        print(f"L = {law['coefficient']:.3g} {symbol}^-{law['exponent']:.4f} (95 %: {low:.4f} to {high:.4f})")
