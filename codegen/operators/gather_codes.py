"""The operator `gather_codes`: rows of codes and of their scales, on a GPU by one kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codegen.launching.launch import as_rows, on
from codegen.launching.replay import empty, replayed
from codegen.operators.operator import Operator, declare
from codegen.operators.quantize import check_layout, scale_like, scale_sizes
from codegen.targets.cuda import gpu_at
from codegen.templates.gather_codes import GATHER_CODES, GatherCodesOperands, GatherCodesProblem
from qcompiler import numerics
from qcompiler.errors import CodegenError


def gather_codes_on_cpu(
    data: Tensor, scale: Tensor, rows: Tensor, block: Sequence[int], scale_layout: str
) -> tuple[Tensor, Tensor]:
    """`kernel.gather_codes`, with the scales in the given layout."""
    _check(data, scale, rows, block, scale_layout)
    q = data[rows]
    return q, scale_like(q, block[1], scale_layout).copy_(scale[rows])


def gather_codes_on_gpu(
    data: Tensor, scale: Tensor, rows: Tensor, block: Sequence[int], scale_layout: str
) -> tuple[Tensor, Tensor]:
    """The same on a CUDA device, where a row that does not exist has the scale NaN."""
    what = ("gather_codes", *block, scale_layout)
    return replayed(_run, what, (data, scale, rows), data, scale, rows, block, scale_layout)


def _run(data: Tensor, scale: Tensor, rows: Tensor, block: Sequence[int], scale_layout: str) -> tuple[Tensor, Tensor]:
    _check(data, scale, rows, block, scale_layout)
    q = empty((*rows.shape, data.shape[1]), data.dtype, data.device)
    sizes, strides = scale_sizes(q.shape, block[1], scale_layout)
    out_scale = empty(sizes, torch.float32, data.device, strides)
    if q.numel():
        family = GATHER_CODES.family(gpu_at(data.device))
        with on(data.device):
            config = family.choose(GatherCodesProblem(q.shape[0], q.shape[1]))
            family.launch(config, GatherCodesOperands(as_rows(data), scale, rows.contiguous(), q, out_scale))
    return q, out_scale


def _fake(data: Tensor, scale: Tensor, rows: Tensor, block: Sequence[int], scale_layout: str) -> tuple[Tensor, Tensor]:
    _check(data, scale, rows, block, scale_layout)
    q = data.new_empty((*rows.shape, data.shape[1]))
    return q, scale_like(q, block[1], scale_layout)


def _check(data: Tensor, scale: Tensor, rows: Tensor, block: Sequence[int], scale_layout: str) -> None:
    """Raises CodegenError unless the operands are a quantized matrix with scales within rows, and a vector of rows."""
    check_layout(block, scale_layout)
    fits = (
        data.dim() == 2
        and block[0] == 1
        and data.dtype in numerics.FORMAT_MAX
        and scale.dtype == torch.float32
        and list(scale.shape) == numerics.scale_shape(data.shape, block)
        and rows.dim() == 1
        and rows.dtype in (torch.int32, torch.int64)
    )
    if fits:
        return
    codes, numbers = f"{data.dtype} {list(data.shape)}", f"{rows.dtype} {list(rows.shape)}"
    raise CodegenError(
        "the operands of a gather of codes do not fit",
        got=f"codes {codes}, scales {scale.dtype} {list(scale.shape)}, block {list(block)}, rows {numbers}",
        need="8-bit codes [m, k] with float32 scales of one row each, and int32 or int64 rows [n]",
    )


GATHER_CODES_SCHEMA = (
    "gather_codes(Tensor data, Tensor scale, Tensor rows, int[] block, str scale_layout) -> (Tensor, Tensor)"
)
declare(Operator(GATHER_CODES_SCHEMA, gather_codes_on_cpu, gather_codes_on_gpu, _fake))
