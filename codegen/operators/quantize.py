"""The operators `quantize` and `quantize_static`, and the layout of the scales.

On a GPU, quantizations without a template in `codegen.templates.quantize`, such as blocks of a weight, run only once,
so torch's operators do them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from codegen.cpu.quantize import quantize
from codegen.launching.launch import FLOATS, as_rows, on
from codegen.launching.replay import empty, replayed
from codegen.operators.operator import Operator, declare
from codegen.targets.cuda import gpu_at
from codegen.templates.quantize import QUANTIZE, QuantizeOperands, QuantizeProblem, why_not_quantize
from codegen.templates.template import ceil_div
from qcompiler import numerics
from qcompiler.errors import CodegenError, did_you_mean
from qcompiler.numerics import ALL

SCALE_LAYOUTS = ("row_major", "col_major")
"""Memory layout of the scales of 1-row blocks: contiguous, or strides (1, M rounded up to a multiple of 4)."""


def scale_like(x: Tensor, block_k: int, layout: str) -> Tensor:
    """An empty FP32 scale `[..., ceil(K / block_k)]` for 1-row blocks of `x` in the given layout.

    The copy engine and DeepGEMM read the column-major layout: for each block of K, the scales of all rows are
    contiguous and start at a multiple of 16 bytes. Leading dimensions count as rows.
    """
    shape, strides = scale_sizes(x.shape, block_k, layout)
    if strides is None:
        return x.new_empty(shape, dtype=torch.float32)
    return x.new_empty_strided(shape, strides, dtype=torch.float32)


def scale_sizes(shape: Sequence[int], block_k: int, layout: str) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The sizes of the scale of a tensor of that shape, and its strides if it is not contiguous."""
    *leading, columns = shape
    sizes = (*leading, 1 if block_k == ALL else ceil_div(columns, block_k))
    if layout == "row_major":
        return sizes, None
    strides: list[int] = []
    rows = 1
    for size in reversed(leading):
        strides.insert(0, rows)
        rows = rows * size
    return sizes, (*strides, (rows + 3) // 4 * 4)


def check_layout(block: Sequence[int], layout: str) -> None:
    """Raises CodegenError for an unknown layout, or one that these blocks do not support."""
    if layout not in SCALE_LAYOUTS:
        raise CodegenError("unknown scale layout", got=repr(layout), fix=did_you_mean(layout, SCALE_LAYOUTS))
    if layout == "col_major" and block[0] != 1:
        raise CodegenError("the column-major scale layout is for blocks of 1 row", got=list(block), need="[1, columns]")


def quantize_on_cpu(
    x: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, scale_layout: str, prescale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`numerics.quantize`, with the scales in the given layout."""
    check_layout(block, scale_layout)
    scale = None if scale_layout == "row_major" or x.dim() == 0 else scale_like(x, block[1], scale_layout)
    return quantize(x, block, dtype, profile, prescale, scale, for_matmul=True)


def quantize_fake(
    x: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, scale_layout: str, prescale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The codes and scales without data."""
    check_layout(block, scale_layout)
    q = _codes(x, dtype, profile)
    if x.dim() == 1 or block[0] == 1:
        return q, scale_like(x, block[1], scale_layout)
    return q, x.new_empty(numerics.scale_shape(x.shape, block), dtype=torch.float32)


def _codes(x: Tensor, dtype: torch.dtype, profile: str) -> Tensor:
    numerics.profile(profile)
    if x.dim() == 0:
        raise CodegenError("cannot quantize a scalar", need="1 dimension or more")
    return x.new_empty(x.shape, dtype=dtype)


def quantize_on_gpu(
    x: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, scale_layout: str, prescale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`numerics.quantize` on a CUDA device, with the scales in the given layout; the same errors."""
    what = ("quantize", *block, dtype, profile, scale_layout)
    return replayed(_quantize, what, (x, prescale), x, block, dtype, profile, scale_layout, prescale)


def _quantize_static_on_cpu(
    x: Tensor, scale: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, prescale: Tensor | None = None
) -> Tensor:
    return numerics.quantize_static(x, scale, numerics.format_of(block, dtype, profile), prescale)


def _quantize_static_fake(
    x: Tensor, scale: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, prescale: Tensor | None = None
) -> Tensor:
    return _codes(x, dtype, profile)


def _quantize_static_on_gpu(
    x: Tensor, scale: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, prescale: Tensor | None = None
) -> Tensor:
    """`numerics.quantize_static` on a CUDA device; the same errors. The host does not wait for the scale."""
    what = ("quantize_static", *block, dtype, profile)
    return replayed(_quantize_static, what, (x, scale, prescale), x, scale, block, dtype, profile, prescale)


def _quantize(
    x: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, scale_layout: str, prescale: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_layout(block, scale_layout)
    if not _has_kernel(x, block, dtype, prescale):
        return quantize_on_cpu(x, block, dtype, profile, scale_layout, prescale)
    numerics.profile(profile)
    q = empty(x.shape, dtype, x.device)
    if block[0] == ALL:
        scale = empty(numerics.scale_shape(x.shape, block), torch.float32, x.device)
    else:
        shape, strides = scale_sizes(x.shape, block[1], scale_layout)
        scale = empty(shape, torch.float32, x.device, strides)
    _launch(QuantizeOperands(as_rows(x), q, scale, block, profile, prescale))
    return q, scale


def _quantize_static(
    x: Tensor, scale: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, prescale: Tensor | None
) -> Tensor:
    has_kernel = _has_kernel(x, block, dtype, prescale) and scale.dtype == torch.float32 and scale.device == x.device
    if not has_kernel or list(scale.shape) != numerics.scale_shape(x.shape, block):
        return _quantize_static_on_cpu(x, scale, block, dtype, profile, prescale)
    numerics.profile(profile)
    q = empty(x.shape, dtype, x.device)
    _launch(QuantizeOperands(as_rows(x), q, scale, block, profile, prescale), known=True)
    return q


def _launch(operands: QuantizeOperands, known: bool = False) -> None:
    """Launches the kernels; without codes, scales may still have to be computed unless they are `known`."""
    x, _, scale, block, _, prescale = operands
    if (operands.q if known else scale).numel() == 0:
        return
    with on(x.device):
        if prescale is not None:
            operands = operands._replace(prescale=prescale.contiguous())
        family = QUANTIZE.family(gpu_at(x.device))
        config = family.choose(QuantizeProblem(x.shape[0], x.shape[1], (block[0], block[1]), known))
        family.launch(config, operands)


def _has_kernel(x: Tensor, block: Sequence[int], dtype: torch.dtype, prescale: Tensor | None) -> bool:
    """Whether a kernel runs it; otherwise torch does, or reports the error."""
    gpu_at(x.device)
    known = why_not_quantize(block) is None
    fits = prescale is None or (
        prescale.shape == x.shape[-1:] and prescale.is_floating_point() and prescale.device == x.device
    )
    return known and fits and x.dim() > 0 and x.dtype in FLOATS and dtype in numerics.FORMAT_MAX


QUANTIZE_SCHEMA = (
    "quantize(Tensor x, int[] block, ScalarType dtype, str profile, str scale_layout, Tensor? prescale=None) "
    "-> (Tensor, Tensor)"
)
declare(Operator(QUANTIZE_SCHEMA, quantize_on_cpu, quantize_on_gpu, quantize_fake))
QUANTIZE_STATIC_SCHEMA = (
    "quantize_static(Tensor x, Tensor scale, int[] block, ScalarType dtype, str profile, Tensor? prescale=None) "
    "-> Tensor"
)
declare(Operator(QUANTIZE_STATIC_SCHEMA, _quantize_static_on_cpu, _quantize_static_on_gpu, _quantize_static_fake))
