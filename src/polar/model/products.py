"""Matrix products on CPUs while scoring.

For float32 torch calls MKL, which leaves the AVX-512 units of other makers' CPUs idle; oneDNN, also part of torch, uses
them. On an AMD EPYC (Turin) its products take less than half the time, with the same float32 arithmetic. Other types
go through oneDNN anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


def fast_products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """A context in which the linear layers of a model there use oneDNN where that helps.

    Only for inference: the operation has no gradient. The context belongs to the thread that enters it.
    """
    helps = (
        (device.type, dtype) == ("cpu", torch.float32)
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # what torch.compile calls, but not a documented interface
    )
    return _OneDnnLinear() if helps else nullcontext()


class _OneDnnLinear(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is linear and not kwargs:
            values, weight, bias = (*args, None)[:3]
            if values.dtype is weight.dtype is torch.float32:  # quantized layers pass by
                return torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")
        return function(*args, **(kwargs or {}))
