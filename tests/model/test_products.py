from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import linear

from polar.model.products import _OneDnnLinear, fast_products


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_the_same_in_float32(bias: bool) -> None:
    layer = torch.nn.Linear(96, 33, bias=bias)
    values = torch.randn(2, 50, 96)
    with torch.inference_mode():
        expected = layer(values)
        with _OneDnnLinear():
            assert torch.allclose(layer(values), expected, atol=1e-5)
            double = linear(values.double(), layer.weight.double())
    assert double.dtype is torch.float64


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32), ("mps", torch.float32)]
)
def test_other_types_and_devices_are_left_alone(device: str, dtype: torch.dtype) -> None:
    assert isinstance(fast_products(torch.device(device), dtype), nullcontext)
