import ctypes
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

from polar.model.products import _keep_freed_memory, _OneDnn, fast_products, few_lengths

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


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    _keep_freed_memory.__wrapped__()
