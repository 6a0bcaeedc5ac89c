"""Data-independent implementations of some operations, for tracing.

The grouped matmul reads the group bounds on the host. Here each group's matrix multiplies all rows, and each row
selects its own group's result: the same numbers, but the work grows with the number of groups. A histogram compares
each number with each bin.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.ir import Format


def grouped(x: Tensor, offsets: Tensor, matmul: Callable[[int], Tensor], count: int) -> Tensor:
    """For each row of `x`, the row of `matmul(group)` for its group; zeros after the last group.

    Args:
        x: `[rows, …]`.
        offsets: The end row of each group.
        matmul: Multiplies all rows by one group's matrix.
        count: Number of groups.
    """
    rows = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    out = torch.zeros_like(matmul(0))
    for group in reversed(range(count)):
        inside = rows < offsets[group]
        out = torch.where(inside.unsqueeze(-1), matmul(group), out)
    return out


def grouped_linear(
    x_q: Tensor,
    x_s: Tensor,
    w_q: Tensor,
    w_s: Tensor,
    offsets: Tensor,
    *,
    x_format: Format,
    w_format: Format,
    out_dtype: torch.dtype,
) -> Tensor:
    """The meaning of `quant.grouped_linear`."""
    x = numerics.dequantize(x_q, x_s, format=x_format)

    def matmul(group: int) -> Tensor:
        return torch.nn.functional.linear(x, numerics.dequantize(w_q[group], w_s[group], format=w_format)).to(out_dtype)

    return grouped(x_q, offsets, matmul, w_q.shape[0])


def grouped_mm(x: Tensor, w: Tensor, offs: Tensor | None = None, **options: Any) -> Tensor:
    """The meaning of `aten._grouped_mm` for rows in groups, `[rows, K]` and `[groups, K, N]`."""
    if offs is None or x.dim() != 2 or w.dim() != 3:
        raise ValueError("only groups of rows with a matrix for each group are supported")
    made = grouped(x, offs, lambda group: x.float() @ w[group].float(), w.shape[0])
    return made.to(options.get("out_dtype") or x.dtype)


def histc(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """The meaning of `aten.histc` between given limits."""
    if min >= max:
        raise ValueError("the limits of the histogram depend on its data")
    place = ((x - min) * bins / (max - min)).floor()
    place = torch.where(x == max, bins - 1, place)
    return (place.reshape(-1, 1) == torch.arange(bins, device=x.device)).sum(0).to(x.dtype)


MEANINGS: Mapping[str, Callable[..., Any]] = {
    "quant.grouped_linear": grouped_linear,
    "aten._grouped_mm": grouped_mm,
    "aten.histc": histc,
    "transformers.grouped_mm_fallback": grouped_mm,
}
"""Operation -> the implementation to trace."""
