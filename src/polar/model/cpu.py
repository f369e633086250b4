"""Matrix products for scoring on CPUs: torch's own, or oneDNN's where these are faster, at the same precision.

For float32 torch calls MKL, which leaves the AVX-512 units of other makers' CPUs idle; oneDNN, also part of torch, uses
them. On an AMD EPYC (Turin) it is twice as fast, on an Intel Xeon a fifth slower. So both are timed on the shapes of a
model when it is first used (`choose_kernel`). The environment variable `POLAR_CPU_KERNEL` chooses instead.

oneDNN takes a millisecond for a new shape and keeps what it made for the last thousand of them, which is more than a
gigabyte. So rows, their pieces and the numbers of rewards have few lengths (`few_lengths`).

Shape legend: T tokens of the row, H heads, G heads of keys and values, D dimensions of a head, Q queries and K keys of
a piece.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from polar.core.errors import InputError

log = logging.getLogger(__name__)

Kernel = Literal["torch", "onednn"]

QUERIES = 128
"""Most queries of a piece: its scores stay in the cache."""
STEP = 32
"""Queries and keys of a piece are padded to a multiple of it."""
TRIAL = 256
"""Tokens of the trial; the second half of them is a branch."""
MAX_TRIAL_WIDTH = 1024
"""Most rows and columns of the weight in the trial, which so takes less than a tenth of a second on one thread."""
MIN_SPEEDUP = 1.2
"""Least speed of oneDNN as a multiple of torch's for oneDNN to be chosen, so that noise does not decide."""
_TRIAL = threading.Lock()


def choose_kernel(model: Any) -> Kernel:
    """Return the faster kernel for a model on this CPU with this number of threads.

    It is tried once per process for models of the same shapes, so they all get the same bits.

    Raises:
        InputError: `POLAR_CPU_KERNEL` names another kernel, or oneDNN where torch has none.
    """
    if model.device.type != "cpu" or not model.takes_rows:
        return "torch"
    possible = (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # what torch.compile calls, but not a documented interface
    )
    if asked := os.environ.get("POLAR_CPU_KERNEL"):
        if asked not in get_args(Kernel) or (asked == "onednn" and not possible):
            kernels = get_args(Kernel) if possible else ("torch",)
            raise InputError(f"POLAR_CPU_KERNEL={asked}: expected {' or '.join(kernels)} on this machine")
        return "onednn" if asked == "onednn" else "torch"
    if not possible or not (model.dtype is torch.float32 or (model.dtype is torch.bfloat16 and multiplies_bfloat16())):
        return "torch"
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    depth = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    largest = max(layers, key=lambda layer: layer.in_features * layer.out_features)
    rows, columns = min(largest.out_features, MAX_TRIAL_WIDTH), min(largest.in_features, MAX_TRIAL_WIDTH)
    with _TRIAL:
        return _faster_kernel(model.dtype, torch.get_num_threads(), (rows, columns), (heads, key_heads, depth))


@cache
def _faster_kernel(
    dtype: torch.dtype, threads: int, weight_shape: tuple[int, int], heads: tuple[int, int, int]
) -> Kernel:
    """Time the largest product of a layer and the attention of a branch by both kernels in turn."""
    count, key_heads, depth = heads
    weight_OI, values_TI = torch.ones(weight_shape, dtype=dtype), torch.ones(TRIAL, weight_shape[1], dtype=dtype)
    query, key = torch.ones(1, count, TRIAL, depth, dtype=dtype), torch.ones(1, key_heads, TRIAL, depth, dtype=dtype)
    own = TRIAL // 2
    mask_QK = torch.full((own, TRIAL), float("-inf"), dtype=dtype).triu_(1 + own)

    def by_torch() -> None:
        scaled_dot_product_attention(query[:, :, own:], key, key, attn_mask=mask_QK, enable_gqa=True)

    def by_onednn() -> None:
        onednn_attention(query, key, key, [[0, own, own, TRIAL]], depth**-0.5)

    attention: dict[Kernel, Callable[[], None]] = {"torch": by_torch, "onednn": by_onednn}
    seconds: dict[Kernel, float] = {}
    with torch.inference_mode():
        for _ in range(4):  # the shortest time counts, so the first one may warm up
            for kernel, attend in attention.items():
                start = time.thread_time()  # this thread takes part in all of it, and other processes do not count
                with use_kernel(kernel, dtype):
                    linear(values_TI, weight_OI)
                attend()
                seconds[kernel] = min(time.thread_time() - start, seconds.get(kernel, float("inf")))
    speedup = seconds["torch"] / seconds["onednn"]
    chosen: Kernel = "onednn" if speedup > MIN_SPEEDUP else "torch"
    log.debug("CPU kernel for %s on %d threads: %s (oneDNN %.2f times as fast)", dtype, threads, chosen, speedup)
    return chosen


def use_kernel(kernel: Kernel, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return a context in which this thread's linear layers use the kernel. The products have no gradient."""
    return _OneDnn() if kernel == "onednn" and dtype is torch.float32 else nullcontext()  # others use oneDNN anyway


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
    """Return what `linear` computes. For a weight with gaps in memory oneDNN would be a thousand times as slow."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(values, weight.contiguous(), bias, "none", [], "")
    return result


def few_lengths(tokens: int) -> int:
    """Return the length that a row of so many tokens is padded to: at most a sixteenth more, or a multiple of 32."""
    step = max(32, 1 << max(0, tokens.bit_length() - 5))
    return -(-tokens // step) * step


def onednn_attention(
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    table: list[list[int]],
    scale: float,
    read: Collection[int] | None = None,
) -> Tensor:
    """Return what `scaled_dot_product_attention` gives for every segment, shape (1, T, H, D of the values).

    Pieces of queries and the keys that they see are one product, a softmax in float32 and another product. No gradient.

    Args:
        query_1HTD: Queries of all tokens.
        key_1GTD: Keys; heads of queries share them.
        value_1GTD: Values.
        table: The segments (`polar.model.attention`); tokens behind the last one are padding.
        scale: Factor of the products.
        read: Ends of segments, if the result is needed at these tokens alone.
    """
    heads, tokens, depth = query_1HTD.shape[1:]
    key_heads, width = key_1GTD.shape[1], value_1GTD.shape[-1]
    query_HTD, key_GTD, value_GDT = query_1HTD[0].float() * scale, key_1GTD[0].float(), value_1GTD[0].transpose(1, 2)
    output_TGRD = query_1HTD.new_zeros(tokens, key_heads, heads // key_heads, width)
    future_QK = torch.full((QUERIES, QUERIES + STEP), float("-inf")).triu_(1)
    for first, last, start, end in table:
        if read is not None and end - 1 not in read:
            continue
        prefix, seen = last - first, last - first + end - start
        more = _padded(seen) - seen
        key_GKD = pad(torch.cat([key_GTD[:, first:last], key_GTD[:, start:end]], dim=1), (0, 0, 0, more))
        value_GDK = pad(torch.cat([value_GDT[..., first:last], value_GDT[..., start:end]], dim=2), (0, more))
        for begin in range(start, end, QUERIES) if read is None else (end - 1,):
            stop, diagonal = min(begin + QUERIES, end), prefix + begin - start  # the first query's own key
            queries, keys = _padded(stop - begin), _padded(diagonal + stop - begin)
            query_HQD = pad(query_HTD[:, begin:stop], (0, 0, 0, queries - (stop - begin)))
            query_GND = query_HQD.reshape(key_heads, -1, depth)
            for group in range(key_heads):
                scores_NK = product(query_GND[group], key_GKD[group, :keys])
                scores_NK.view(-1, queries, keys)[..., diagonal:] += future_QK[:queries, : keys - diagonal]
                result_ND = product(scores_NK.softmax(-1).to(value_GDK.dtype), value_GDK[group, :, :keys])
                result_RQD = result_ND.view(-1, queries, width)[:, : stop - begin]
                output_TGRD[begin:stop, group] = result_RQD.transpose(0, 1)
    return output_TGRD.view(1, tokens, heads, width)


def _padded(length: int) -> int:
    return -(-length // STEP) * STEP


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has native bfloat16 arithmetic and torch uses it."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)  # not documented
    return bool(supported())
