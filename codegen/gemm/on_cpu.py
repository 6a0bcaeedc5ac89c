"""The scaled matmul on a CPU: bit-equal to `numerics.scaled_linear`, with cached dequantized weights.

INT8 codes with one scale for all of K are multiplied directly, by `qcompiler.numerics.integer_matmul`. torch has no FP8
GEMM for CPUs, so other weights are dequantized to FP32. That takes ten times as long as the GEMM itself at 16 rows, and
gives the same result in every call. Results are cached, up to `QCOMPILER_CPU_CACHE` megabytes per process. Entries are
never evicted: a model reads its weights cyclically, which defeats every replacement policy.
"""

import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from qcompiler import knobs, numerics
from qcompiler.numerics.codes import PLAIN


class _Kept(NamedTuple):
    made_from: tuple[object, ...]
    scale: "weakref.ref[Tensor]"  # by identity: the address of a freed scale may be reused
    numbers: Tensor


_weights = WeakTensorKeyDictionary()
_lock = threading.Lock()


def scaled_linear_on_cpu(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`numerics.scaled_linear`, with the same arguments and errors."""
    numerics.check_linear(x_q, w_q)
    x_format, w_format = numerics.format_of(x_block, x_q.dtype), numerics.format_of(w_block, w_q.dtype)
    if numerics.sums_integers(x_q, x_format, w_format):
        return numerics.scaled_linear(
            x_q, x_s, w_q, w_s, bias, x_format=x_format, w_format=w_format, out_dtype=out_dtype
        )  # fmt: skip
    x, w = numerics.dequantize(x_q, x_s, format=x_format), _dequantized(w_q, w_s, w_format)
    return functional.linear(x, w, None if bias is None else bias.to(torch.float32)).to(out_dtype)


def _dequantized(weight: Tensor, scale: Tensor, format: numerics.Format) -> Tensor:
    """The dequantized weight, from an earlier call if neither the weight nor its scale has changed since."""
    if type(weight) not in PLAIN or weight.is_inference() or scale.is_inference():
        return numerics.dequantize(weight, scale, format=format)
    made_from = (format, weight._version, scale._version)
    with _lock:
        found: _Kept | None = _weights.get(weight)
    if found is not None and found.made_from == made_from and found.scale() is scale:
        return found.numbers
    numbers = numerics.dequantize(weight, scale, format=format)
    with _lock:
        others = sum(kept.numbers.nbytes for tensor, kept in _weights.items() if tensor is not weight)
        if others + numbers.nbytes <= knobs.current().cpu_cache * 1_000_000:
            _weights[weight] = _Kept(made_from, weakref.ref(scale), numbers)
    return numbers
