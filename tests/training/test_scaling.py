"""The recipe for scaling laws: its statistics, and a sweep at a tiny size."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from polar.core.errors import InputError
from polar.training.config import ScratchConfig
from polar.training.init_model import from_scratch, train_tokenizer
from tests.conftest import SENTENCES

RECIPE = Path(__file__).parents[2] / "recipes" / "scaling" / "scaling.py"
specification = spec_from_file_location("scaling_recipe", RECIPE)
recipe = module_from_spec(specification)
sys.modules["scaling_recipe"] = recipe  # where dataclasses look for it
specification.loader.exec_module(recipe)
Point, fit, frontier, largest_budgets = recipe.Point, recipe.fit, recipe.frontier, recipe.largest_budgets

SIZES = [5e7, 1e8, 2.5e8, 5e8, 1e9]


@given(st.floats(0.1, 10), st.floats(0.01, 0.5))
def test_a_perfect_law_is_found_again(coefficient: float, exponent: float) -> None:
    law = fit(SIZES, [coefficient * (size / 1e9) ** -exponent for size in SIZES])
    assert law.exponent == pytest.approx(exponent, rel=1e-6)
    assert law.predict(1e9) == pytest.approx(coefficient, rel=1e-6)
    assert law.r_squared == pytest.approx(1)
    low, high = law.band(1e10)
    assert low == pytest.approx(high, rel=1e-5)


def test_the_interval_covers_the_exponent_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = banded = 0
    for _ in range(1000):
        losses = [0.9 * (size / 1e9) ** -0.0425 * np.exp(random.normal(0, 0.01)) for size in SIZES]
        law = fit(SIZES, losses)
        low, high = law.exponent_interval
        covered += low <= 0.0425 <= high
        low_band, high_band = law.band(1e10)
        banded += bool(low_band <= 0.9 * 10**-0.0425 <= high_band)
    assert 925 <= covered <= 972  # 950 expected, standard deviation 7
    assert 925 <= banded <= 972


def test_the_line_is_that_of_scipy() -> None:
    losses = [0.7, 0.66, 0.65, 0.61, 0.6]
    law, line = fit(SIZES, losses), stats.linregress(np.log(SIZES), np.log(losses))
    assert law.exponent == pytest.approx(-line.slope)
    assert law.r_squared == pytest.approx(line.rvalue**2)


def test_too_few_or_impossible_points_are_refused() -> None:
    with pytest.raises(InputError, match="at least 3 different"):
        fit([1, 2, 2], [0.5, 0.4, 0.4])
    with pytest.raises(InputError, match="finite values above 0"):
        fit([1, 2, 3], [0.5, 0.4, float("nan")])


def points() -> list:
    """Every size after 1, 2, 4 and 8 units of tokens; larger ones are better, and worse at first."""
    return [
        Point(f"n{size}", size, tokens, 0.6 * size**-0.05 * (1 + size / 100 / tokens))
        for size in (10, 20, 40, 80)
        for tokens in (1, 2, 4, 8)
    ]


def test_the_law_of_size_takes_the_last_points_and_that_of_compute_the_best() -> None:
    assert [(point.parameters, point.tokens) for point in largest_budgets(points())] == [
        (n, 8) for n in (10, 20, 40, 80)
    ]
    best = frontier(points())
    for point in points():
        assert any(other.compute <= point.compute and other.loss <= point.loss for other in best)
    assert all(a.compute < b.compute and a.loss > b.loss for a, b in pairwise(best))


def test_the_summary_and_the_plot(tmp_path: Path) -> None:
    found = recipe.summary(points())
    assert json.loads(json.dumps(found))["points"] == found["points"]
    assert found["parameters"]["law"]["points"] == 4
    recipe.plot(points(), tmp_path / "scaling.svg")
    recipe.plot(points(), tmp_path / "again.svg")
    drawn = (tmp_path / "scaling.svg").read_text()
    assert f"exponent {found['parameters']['law']['exponent']:.4f}" in drawn
    assert f"exponent {found['compute']['law']['exponent']:.4f}" in drawn
    assert drawn == (tmp_path / "again.svg").read_text()


def test_parameters_are_counted_as_torch_counts_them() -> None:
    shape = ScratchConfig(vocab_size=300, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=2)
    model = from_scratch(train_tokenizer(SENTENCES, 300), shape, max_length=256, max_response_length=64, seed=0).model
    own = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "score" not in name)  # type: ignore[attr-defined]
    assert recipe.parameters_of(shape) == own


def test_a_size_may_have_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "sizes.yaml").write_text(
        "base: {data: [x], learning_rate: 0.002, seed: 7}\n"
        "sizes: {narrow: {hidden_size: 24, learning_rate: 0.008}, wide: {hidden_size: 96}}"
    )
    sizes = recipe.read_sweep(tmp_path / "sizes.yaml")
    found = {name: (size.scratch.hidden_size, size.learning_rate, size.seed) for name, size in sizes.items()}
    assert found == {"narrow": (24, 0.008, 7), "wide": (96, 0.002, 7)}


def test_a_sweep_trains_every_size_once(tmp_path: Path) -> None:
    data = tmp_path / "triples.jsonl"
    rows = [
        {"prompt": f"{n}?", "reference": "fox dog", "positive": "dog fox", "negative": f"{n} {n}"} for n in range(24)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = "vocab_size: 300, num_heads: 2, num_layers: 1, max_positions: 256"
    sizes = [f"  s{size}: {{hidden_size: {size}, intermediate_size: {size}, {shape}}}" for size in (8, 16, 32)]
    (tmp_path / "sizes.yaml").write_text(
        f"base: {{data: [{data}], eval_data: [{data}], max_steps: 6, eval_steps: 2, max_length: 256, "
        "max_response_length: 64, learning_rate: 0.001}\nsizes:\n" + "\n".join(sizes)
    )
    points = recipe.run_sweep(recipe.read_sweep(tmp_path / "sizes.yaml"), tmp_path / "out")
    assert [point.name for point in points] == [*["s8"] * 3, *["s16"] * 3, *["s32"] * 3]
    tokens = [point.tokens for point in points[:3]]
    assert tokens == pytest.approx([tokens[0], 2 * tokens[0], 3 * tokens[0]])
    before = (tmp_path / "out" / "s8" / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "out" / "s32" / "points.json").unlink()  # killed between the model and its points
    command = [sys.executable, str(RECIPE), str(tmp_path / "sizes.yaml"), "--output", str(tmp_path / "out")]
    subprocess.run(command, check=True, timeout=200)
    assert json.loads((tmp_path / "out" / "scaling.json").read_text()) == json.loads(json.dumps(recipe.summary(points)))
    assert (tmp_path / "out" / "scaling.svg").exists()
    assert (tmp_path / "out" / "s8" / "model.safetensors").stat().st_mtime_ns == before
