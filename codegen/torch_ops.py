"""The kernels as functional torch operators, in `torch.ops.qcompiler`.

quantize, quantize_static and scaled_linear, their fused forms (fused_quantize and fused_linear), and grouped matmuls
(grouped_linear and grouped_linear_masked). All have a fake implementation, so `torch.compile`, `torch.export` and CUDA
graphs treat them as opaque nodes; everything that depends on the number of rows happens inside, at run time, and no
graph is specialized on it. On a CPU they run `qcompiler.numerics`; on a Hopper GPU they launch the Triton kernels of
`codegen.kernels`.

They are defined through `Library.define` and `Library.impl`, whose calls cost half as much as `custom_op`. Importing
this module needs no GPU.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from codegen.fused_gemm.product import fused_linear_on_gpu
from codegen.gemm.on_cpu import scaled_linear_on_cpu
from codegen.gemm.product import scaled_linear_on_gpu
from codegen.grouped_gemm.product import (
    grouped_linear_fake,
    grouped_linear_masked_fake,
    grouped_linear_masked_on_gpu,
    grouped_linear_masked_reference,
    grouped_linear_on_gpu,
    grouped_linear_reference,
)
from codegen.quantize.fused import fused_quantize_on_gpu
from codegen.quantize.plain import (
    SCALE_LAYOUTS,
    check_layout,
    quantize_on_gpu,
    quantize_static_on_gpu,
    scale_like,
)
from qcompiler import numerics
from qcompiler.dialects.fused_expression import parse
from qcompiler.dialects.kernel import fused_linear, fused_quantize
from qcompiler.errors import CodegenError

__all__ = ["ON_GPU", "SCALE_LAYOUTS"]


def _quantize_fake(
    x: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, scale_layout: str, prescale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_layout(block, scale_layout)
    q = _quantize_static_fake(x, None, block, dtype, profile, prescale)
    if x.dim() == 1 or block[0] == 1:
        return q, scale_like(x, block[1], scale_layout)
    return q, x.new_empty(numerics.scale_shape(x.shape, block), dtype=torch.float32)


def _quantize_reference(
    x: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, scale_layout: str, prescale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_layout(block, scale_layout)
    q, scale = numerics.quantize(x, numerics.format_of(block, dtype, profile), prescale)
    return _laid_out(q, scale, block, scale_layout)


def _laid_out(q: Tensor, scale: Tensor, block: Sequence[int], scale_layout: str) -> tuple[Tensor, Tensor]:
    """Codes and their scales, with the scales in the given layout."""
    return q, scale if scale_layout == "row_major" else scale_like(q, block[1], scale_layout).copy_(scale)


def _quantize_static_reference(
    x: Tensor, scale: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, prescale: Tensor | None = None
) -> Tensor:
    return numerics.quantize_static(x, scale, numerics.format_of(block, dtype, profile), prescale)


def _quantize_static_fake(
    x: Tensor, scale: Tensor | None, block: Sequence[int], dtype: torch.dtype, profile: str,
    prescale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    numerics.profile(profile)
    if x.dim() == 0:
        raise CodegenError("cannot quantize a scalar", need="1 dimension or more")
    return x.new_empty(x.shape, dtype=dtype)


def _scaled_linear_fake(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x_q.new_empty((*x_q.shape[:-1], w_q.shape[0]), dtype=out_dtype)


def _fused_quantize_fake(
    operands: Sequence[Tensor], expression: str, keep: Sequence[str], block: Sequence[int], dtype: torch.dtype,
    profile: str, scale_layout: str,
) -> list[Tensor]:  # fmt: skip
    made, x = parse(expression), operands[0]
    codes = _quantize_fake(x, block, dtype, profile, scale_layout)
    return [*codes, *(x.new_empty(x.shape, dtype=made.dtype(name)) for name in keep)]


def _fused_quantize_reference(
    operands: Sequence[Tensor], expression: str, keep: Sequence[str], block: Sequence[int], dtype: torch.dtype,
    profile: str, scale_layout: str,
) -> list[Tensor]:  # fmt: skip
    check_layout(block, scale_layout)
    q, scale, *kept = fused_quantize(
        *operands, expression=expression, keep=keep, format=numerics.format_of(block, dtype, profile)
    )
    return [*_laid_out(q, scale, block, scale_layout), *kept]


def _fused_linear_fake(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None, others: Sequence[Tensor],
    expression: str, parts: int, x_block: Sequence[int], w_block: Sequence[int], block: Sequence[int] | None = None,
    dtype: torch.dtype | None = None, profile: str | None = None, scale_layout: str | None = None,
) -> list[Tensor]:  # fmt: skip
    result = x_q.new_empty((*x_q.shape[:-1], w_q.shape[0] // parts), dtype=parse(expression).dtype())
    if block is None or dtype is None or profile is None or scale_layout is None:
        return [result]
    return list(_quantize_fake(result, block, dtype, profile, scale_layout))


def _multiplied(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None,
    *, x_format: numerics.Format, w_format: numerics.Format, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return scaled_linear_on_cpu(x_q, x_s, w_q, w_s, bias, x_format.block, w_format.block, out_dtype)


def _fused_linear_reference(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None, others: Sequence[Tensor],
    expression: str, parts: int, x_block: Sequence[int], w_block: Sequence[int], block: Sequence[int] | None = None,
    dtype: torch.dtype | None = None, profile: str | None = None, scale_layout: str | None = None,
) -> list[Tensor]:  # fmt: skip
    run = partial(
        fused_linear, x_q, x_s, w_q, w_s, bias, *others, expression=expression, parts=parts, multiply=_multiplied,
        x_format=numerics.format_of(x_block, x_q.dtype), w_format=numerics.format_of(w_block, w_q.dtype),
    )  # fmt: skip
    if block is None or dtype is None or profile is None or scale_layout is None:
        return list(run())
    check_layout(block, scale_layout)
    q, scale = run(format=numerics.format_of(block, dtype, profile))
    return list(_laid_out(q, scale, block, scale_layout))


_OPERATORS = (
    (
        "quantize(Tensor x, int[] block, ScalarType dtype, str profile, str scale_layout, Tensor? prescale=None) "
        "-> (Tensor, Tensor)",
        (_quantize_reference, quantize_on_gpu, _quantize_fake),
    ),
    (
        "quantize_static(Tensor x, Tensor scale, int[] block, ScalarType dtype, str profile, Tensor? prescale=None) "
        "-> Tensor",
        (_quantize_static_reference, quantize_static_on_gpu, _quantize_static_fake),
    ),
    (
        "scaled_linear(Tensor x_q, Tensor x_s, Tensor w_q, Tensor w_s, Tensor? bias, int[] x_block, int[] w_block, "
        "ScalarType out_dtype) -> Tensor",
        (scaled_linear_on_cpu, scaled_linear_on_gpu, _scaled_linear_fake),
    ),
    (
        "fused_quantize(Tensor[] operands, str expression, str[] keep, int[] block, ScalarType dtype, str profile, "
        "str scale_layout) -> Tensor[]",
        (_fused_quantize_reference, fused_quantize_on_gpu, _fused_quantize_fake),
    ),
    (
        "fused_linear(Tensor x_q, Tensor x_s, Tensor w_q, Tensor w_s, Tensor? bias, Tensor[] others, str expression, "
        "int parts, int[] x_block, int[] w_block, int[]? block=None, ScalarType? dtype=None, str? profile=None, "
        "str? scale_layout=None) -> Tensor[]",
        (_fused_linear_reference, fused_linear_on_gpu, _fused_linear_fake),
    ),
    (
        "grouped_linear(Tensor x_q, Tensor x_s, Tensor w_q, Tensor w_s, Tensor offsets, int[] x_block, int[] w_block, "
        "ScalarType out_dtype) -> Tensor",
        (grouped_linear_reference, grouped_linear_on_gpu, grouped_linear_fake),
    ),
    (
        "grouped_linear_masked(Tensor x_q, Tensor x_s, Tensor w_q, Tensor w_s, Tensor counts, int[] x_block, "
        "int[] w_block, ScalarType out_dtype, int? expected=None) -> Tensor",
        (grouped_linear_masked_reference, grouped_linear_masked_on_gpu, grouped_linear_masked_fake),
    ),
)
"""Each operator's schema, and its implementations on a CPU, on a GPU, and for fake tensors."""

ON_GPU: Mapping[str, Callable[..., Any]] = {schema.partition("(")[0]: gpu for schema, (_, gpu, _) in _OPERATORS}
"""Each operator's implementation on a CUDA device, by name; arguments are in schema order."""


def _register() -> torch.library.Library | None:
    """Defines the operators; returns None if another copy of this module already has."""
    if hasattr(torch.ops.qcompiler, "scaled_linear"):
        return None
    # A fragment, because the namespace may hold more operators than these.
    library = torch.library.Library("qcompiler", "FRAGMENT")
    for schema, (cpu, cuda, fake) in _OPERATORS:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = schema.partition("(")[0]
        library.impl(name, cpu, "CPU")
        library.impl(name, cuda, "CUDA")
        torch.library.register_fake(f"qcompiler::{name}", fake, lib=library)
    return library


if "_LIBRARY" not in globals():  # a reload keeps the library, because deleting it would unregister its operators
    _LIBRARY = _register()
