"""What makes scoring on CPUs faster than torch's defaults, at the same precision.

- Products of linear layers. For float32 torch calls MKL, which leaves the AVX-512 units of other makers' CPUs idle;
  oneDNN, also part of torch, uses them. On an AMD EPYC (Turin) its products take less than half the time. Other types
  go through oneDNN anyway.
- Attention, for the same reason (`polar.model.blocks`).
- Lengths. oneDNN takes a millisecond for a new shape and keeps what it made for the last thousand of them, which is
  more than a gigabyte; so rows have few lengths (`few_lengths`).
- Memory. glibc gives large freed tensors back to the kernel, which has to clear the pages of the next ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


def onednn_helps(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model there is scored faster by oneDNN's products than by what torch takes itself."""
    return (
        device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # what torch.compile calls, but not a documented interface
        # With AMX torch's own attention multiplies bfloat16 well.
        and (
            dtype is torch.float32 or (dtype is torch.bfloat16 and not _torch_says(torch.cpu, "_is_amx_tile_supported"))
        )
    )


def multiplies_bfloat16() -> bool:
    """Whether this CPU has native bfloat16 arithmetic and torch uses it."""
    return _torch_says(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")


def _torch_says(namespace: Any, question: str) -> bool:
    """The answer of a function that torch does not document and not every build has."""
    return bool(getattr(namespace, question, lambda: False)())


def fast_products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """A context in which the linear layers of a model there use oneDNN where that helps.

    Only for inference: the operation has no gradient. The context belongs to the thread that enters it; what it tells
    glibc holds for the process.
    """
    if device.type == "cpu":
        _keep_freed_memory()
    return _OneDnn() if dtype is torch.float32 and onednn_helps(device, dtype) else nullcontext()


def few_lengths(tokens: int) -> int:
    """The length that a row of so many tokens is padded to: at most a sixteenth more, or a multiple of 32."""
    step = max(32, 1 << max(0, tokens.bit_length() - 5))
    return -(-tokens // step) * step


@cache
def _keep_freed_memory() -> None:
    """Up to 1 GiB of freed tensors stays with the process. Tensors of more than 32 MiB still come from the kernel."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(ctypes.c_int(-3), ctypes.c_int(32 * 2**20))  # M_MMAP_THRESHOLD, the largest that glibc takes
    mallopt(ctypes.c_int(-1), ctypes.c_int(2**30))  # M_TRIM_THRESHOLD


class _OneDnn(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is linear and not kwargs:
            values, weight, bias = (*args, None)[:3]
            if values.dtype is weight.dtype is torch.float32:  # quantized layers pass by
                return product(values, weight, bias)
        return function(*args, **kwargs)


def product(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `linear` computes. For a weight with gaps in memory oneDNN would take a loop a thousand times as slow."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(values, weight.contiguous(), bias, "none", [], "")
    return result
