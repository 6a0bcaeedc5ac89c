"""The scaled matmul on a CPU: bit-equal to `numerics.scaled_linear`, with cached dequantized weights.

INT8 codes with one scale for all of K are multiplied directly, by `qcompiler.numerics.integer_matmul`. torch has no FP8
GEMM for CPUs, so other weights are dequantized to FP32. That takes ten times as long as the GEMM itself at 16 rows, and
gives the same result in every call. Results are cached, up to `QCOMPILER_CPU_CACHE` megabytes per process. Entries are
never evicted: a model reads its weights cyclically, which defeats every replacement policy.
"""

import threading
import weakref
from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from codegen.cpu.quantize import dequantize_rows
from qcompiler import knobs, numerics
from qcompiler.numerics.codes import PLAIN


class _Kept(NamedTuple):
    weight: "weakref.ref[Tensor]"  # by identity: the address of a freed tensor may be reused
    scale: "weakref.ref[Tensor]"
    made_from: tuple[object, ...]
    numbers: Tensor


_weights: dict[int, _Kept] = {}
"""The identity of a weight -> its dequantized form; entries go with their weights."""
_lock = threading.Lock()


def scaled_linear_on_cpu(
    x_q: Tensor,
    x_s: Tensor,
    w_q: Tensor,
    w_s: Tensor,
    bias: Tensor | None,
    x_block: Sequence[int],
    w_block: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """`numerics.scaled_linear`, with the same arguments and errors."""
    x_format, w_format, integers = _formats(x_q.dtype, tuple(x_block), w_q.dtype, tuple(w_block))
    if integers and type(x_q) in PLAIN:
        return numerics.scaled_linear(
            x_q, x_s, w_q, w_s, bias, x_format=x_format, w_format=w_format, out_dtype=out_dtype
        )
    numerics.check_linear(x_q, w_q)
    if x_format.block[0] == 1:
        x = dequantize_rows(x_q, x_s, x_format.block[1])
    else:
        x = numerics.dequantize(x_q, x_s, format=x_format)
    w = _dequantized(w_q, w_s, w_format)
    return functional.linear(x, w, None if bias is None else bias.to(torch.float32)).to(out_dtype)


@cache
def _formats(
    x: torch.dtype, x_block: tuple[int, ...], w: torch.dtype, w_block: tuple[int, ...]
) -> tuple[numerics.Format, numerics.Format, bool]:
    """The formats of both operands, and whether their codes are summed as integers."""
    x_format, w_format = numerics.format_of(x_block, x), numerics.format_of(w_block, w)
    return x_format, w_format, numerics.sums_integers(torch.empty(0), x_format, w_format)


def _dequantized(weight: Tensor, scale: Tensor, format: numerics.Format) -> Tensor:
    """The dequantized weight, from an earlier call if neither the weight nor its scale has changed since."""
    if type(weight) not in PLAIN or weight.is_inference() or scale.is_inference():
        return numerics.dequantize(weight, scale, format=format)
    made_from = (format, weight._version, scale._version)
    found = _weights.get(id(weight))
    if found is not None and found.scale() is scale and found.weight() is weight and found.made_from == made_from:
        return found.numbers
    numbers = numerics.dequantize(weight, scale, format=format)
    with _lock:
        others = sum(kept.numbers.nbytes for key, kept in list(_weights.items()) if key != id(weight))
        if others + numbers.nbytes <= knobs.current().cpu_cache * 1_000_000:
            gone = weakref.ref(weight, partial(_forget, id(weight)))
            _weights[id(weight)] = _Kept(gone, weakref.ref(scale), made_from, numbers)
    return numbers


def _forget(name: int, _: object) -> None:
    _weights.pop(name, None)


def kept_bytes(weights: Iterable[Tensor] | None = None) -> int:
    """Bytes of the dequantized forms that are kept, of some weights or of all."""
    names = list(_weights) if weights is None else map(id, weights)
    return sum(kept.numbers.nbytes for name in names if (kept := _weights.get(name)) is not None)
