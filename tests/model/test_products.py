import ctypes
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

from polar import Group, RewardModel
from polar.model.products import _keep_freed_memory, _OneDnn, fast_products, few_lengths, onednn_helps

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_the_same_in_float32(bias: bool) -> None:
    layer = torch.nn.Linear(96, 33, bias=bias)
    values = torch.randn(2, 50, 96)
    with torch.inference_mode():
        expected = layer(values)
        with _OneDnn():
            assert torch.allclose(layer(values), expected, atol=1e-5)
            double = linear(values.double(), layer.weight.double())
    assert double.dtype is torch.float64


@needs_onednn
def test_a_weight_with_gaps_in_memory_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the view itself, oneDNN takes a loop that is a thousand times as slow."""
    seen: list[torch.Tensor] = []

    def product(values: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
        seen.append(weight)
        return values @ weight.T

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", product)
    values, weight = torch.randn(5, 8), torch.randn(7, 2, 8)[:, 1]
    with torch.inference_mode(), _OneDnn():
        linear(values, weight)
    assert [one.is_contiguous() for one in seen] == [True]


@given(st.integers(1, 40_000))
def test_rows_have_few_lengths_and_little_padding(tokens: int) -> None:
    length = few_lengths(tokens)
    assert tokens <= length < tokens + max(32, tokens / 8)
    assert few_lengths(length) == length
    assert len({few_lengths(other) for other in range(tokens, 2 * tokens)}) <= 33


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float16), ("cuda", torch.bfloat16), ("cuda", torch.float32), ("mps", torch.float32)],
)
def test_other_types_and_devices_are_left_alone(device: str, dtype: torch.dtype) -> None:
    assert isinstance(fast_products(torch.device(device), dtype), nullcontext)


class Library:
    """A C library that notes what it is told, as far as it has `mallopt`."""

    def __init__(self, *, has_mallopt: bool) -> None:
        self.told: list[tuple[int, int]] = []
        if has_mallopt:
            self.mallopt = lambda name, value: self.told.append((name.value, value.value))


@pytest.mark.parametrize("has_mallopt", [True, False])
def test_only_a_c_library_that_knows_how_is_told_to_keep_memory(
    has_mallopt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(has_mallopt=has_mallopt)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    _keep_freed_memory.__wrapped__()
    assert library.told == ([(-3, 32 * 2**20), (-1, 2**30)] if has_mallopt else [])


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_without_a_c_library_scoring_goes_on(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def missing(name: object) -> None:
        asked.append(name)
        raise error

    monkeypatch.setattr(ctypes, "CDLL", missing)
    _keep_freed_memory.cache_clear()
    with fast_products(torch.device("cpu"), torch.float32):
        assert asked == [None]
    _keep_freed_memory.cache_clear()


def test_a_torch_without_onednn_scores_the_same(
    llama: RewardModel, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor with the functions that torch does not document, which another version may not have."""
    group = Group("What is the capital of China?", "It is Beijing.", ("Beijing", "Not Shanghai."))
    expected = llama.score_groups([group])[0]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert RewardModel.load(checkpoint).score_groups([group])[0] == pytest.approx(expected, abs=1e-4)
    half = RewardModel.load(checkpoint, dtype="bfloat16").score_groups([group])[0]
    assert half == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_torch_that_does_not_tell_of_amx_is_no_fault(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert onednn_helps(torch.device("cpu"), dtype) is torch.backends.mkldnn.is_available()
