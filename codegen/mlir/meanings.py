"""What some operations mean without a look at the data, which is what tracing needs.

The product of groups of rows reads the bounds of the groups on the host. Here each group's matrix multiplies all rows,
and each row takes its own group's result: the same numbers, for as many times the work as there are groups. A
histogram compares each number with each bin.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.ir import Format


def grouped(x: Tensor, offsets: Tensor, product: Callable[[int], Tensor], count: int) -> Tensor:
    """For each row of `x` the row of `product(group)` for its group; zeros behind the last.

    Args:
        x: `[rows, …]`.
        offsets: For each group the row behind its last.
        product: All rows with one group's matrix.
        count: How many groups there are.
    """
    rows = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    out = torch.zeros_like(product(0))
    for group in reversed(range(count)):
        inside = rows < offsets[group]
        out = torch.where(inside.unsqueeze(-1), product(group), out)
    return out


def grouped_linear(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, offsets: Tensor, *,
    x_format: Format, w_format: Format, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The meaning of `quant.grouped_linear`."""
    x = numerics.dequantize(x_q, x_s, format=x_format)

    def product(group: int) -> Tensor:
        return torch.nn.functional.linear(x, numerics.dequantize(w_q[group], w_s[group], format=w_format)).to(out_dtype)

    return grouped(x_q, offsets, product, w_q.shape[0])


def grouped_mm(x: Tensor, w: Tensor, offs: Tensor | None = None, **options: Any) -> Tensor:
    """The meaning of `aten._grouped_mm` for rows in groups, `[rows, K]` and `[groups, K, N]`."""
    if offs is None or x.dim() != 2 or w.dim() != 3:
        raise ValueError("only rows in groups, with a matrix for each group, can be spelled out")
    made = grouped(x, offs, lambda group: x.float() @ w[group].float(), w.shape[0])
    return made.to(options.get("out_dtype") or x.dtype)


def histc(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """The meaning of `aten.histc` between limits that are given."""
    if min >= max:
        raise ValueError("the limits of the histogram are those of its data")
    place = ((x - min) * bins / (max - min)).floor()
    place = torch.where(x == max, bins - 1, place)
    return (place.reshape(-1, 1) == torch.arange(bins, device=x.device)).sum(0).to(x.dtype)


MEANINGS: Mapping[str, Callable[..., Any]] = {
    "quant.grouped_linear": grouped_linear,
    "kernel.grouped_linear": grouped_linear,
    "aten._grouped_mm": grouped_mm,
    "aten.histc": histc,
    "transformers.grouped_mm_fallback": grouped_mm,
}
"""Operation -> what is traced for it."""
