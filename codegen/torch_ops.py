"""The kernels as functional torch operators: `torch.ops.qcompiler.quantize` and `torch.ops.qcompiler.scaled_linear`.

Both have a fake implementation, so `torch.compile`, `torch.export` and CUDA graphs take them as opaque nodes; whatever
depends on the number of rows happens inside, at run time, and no graph is specialised on it. On a CPU they are
`qcompiler.numerics`; on a Hopper GPU they launch the Triton kernels of `codegen.kernels`.

They are defined through `Library.define` and `Library.impl`, whose calls cost half of what `custom_op` costs. Importing
this module needs no GPU.
"""

import contextlib
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from codegen.kernel_cache import use_cache_folder
from codegen.kernels.quantize import quantize_rows
from codegen.kernels.scaled_gemm import scaled_gemm_pointers, scaled_gemm_tma
from codegen.tiling import GemmConfig, GemmProblem, bucket, ceil_div, choose, quantize_config
from qcompiler import numerics
from qcompiler.errors import CodegenError, did_you_mean

SCALE_LAYOUTS = ("row_major", "col_major")
"""How the scales of 1-row blocks lie in memory: contiguous, or with strides (1, M rounded up to a multiple of 4)."""

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_COLUMNS = (32, 64, 128, 256, 512)


def scale_like(x: Tensor, block_k: int, layout: str) -> Tensor:
    """An empty FP32 scale `[..., ceil(K / block_k)]` for 1-row blocks of `x` in the given layout.

    The column-major layout is the one that the copy engine and DeepGEMM read: for each block of K the scales of all
    rows follow each other, and each such run starts at a multiple of 16 bytes. Leading dimensions count as rows.
    """
    blocks = ceil_div(x.shape[-1], block_k)
    if layout == "row_major":
        return x.new_empty((*x.shape[:-1], blocks), dtype=torch.float32)
    strides: list[int] = []
    rows = 1
    for size in reversed(x.shape[:-1]):
        strides.insert(0, rows)
        rows = rows * size
    padded = (rows + 3) // 4 * 4
    whole = x.new_empty((blocks, padded), dtype=torch.float32)
    return whole.as_strided((*x.shape[:-1], blocks), (*strides, padded))


def _quantize_fake(
    x: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, scale_layout: str
) -> tuple[Tensor, Tensor]:
    _check_layout(block, scale_layout)
    numerics.profile(profile)
    if x.dim() == 0:
        raise CodegenError("cannot quantize a scalar", need="1 dimension or more")
    q = x.new_empty(x.shape, dtype=dtype)
    if x.dim() == 1 or block[0] == 1:
        return q, scale_like(x, block[1], scale_layout)
    down, across = ceil_div(x.shape[-2], block[0]), ceil_div(x.shape[-1], block[1])
    return q, x.new_empty((*x.shape[:-2], down, across), dtype=torch.float32)


def _quantize_reference(
    x: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, scale_layout: str
) -> tuple[Tensor, Tensor]:
    _check_layout(block, scale_layout)
    q, scale = numerics.quantize(x, block, dtype, profile)
    return q, scale if scale_layout == "row_major" else scale_like(x, block[1], scale_layout).copy_(scale)


def _quantize_cuda(
    x: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, scale_layout: str
) -> tuple[Tensor, Tensor]:
    _check_device(x.device)
    one_row = block[0] == 1 and block[1] in _COLUMNS and x.dim() > 0
    if not one_row or x.dtype not in _FLOATS or dtype not in numerics.FORMAT_MAX:
        # Weights, and whatever is odd: quantized once, so torch's own operators will do, or say what is wrong.
        return _quantize_reference(x, block, dtype, profile, scale_layout)
    _check_layout(block, scale_layout)
    rule = numerics.profile(profile)
    rows = _as_rows(x)
    m, k = rows.shape
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = scale_like(x, block[1], scale_layout)
    if q.numel() == 0:
        return q, scale
    stride_m, stride_k = (scale.stride(-2) if x.dim() > 1 else 1, scale.stride(-1))
    config = quantize_config(m, block[1])
    with _on(x.device):
        quantize_rows[(ceil_div(m, config.block_m) * ceil_div(k, block[1]),)](
            rows, q, scale, m, k, rows.stride(0), stride_m, stride_k,
            AMAX_FLOOR=rule.amax_floor, TOP=numerics.FORMAT_MAX[dtype],
            RECIPROCAL=rule.division == "reciprocal", UE8M0=rule.scale_format == "ue8m0",
            BLOCK_M=config.block_m, BLOCK_K=block[1], num_warps=config.warps,
        )  # fmt: skip
    return q, scale


def _scaled_linear_fake(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x_q.new_empty((*x_q.shape[:-1], w_q.shape[0]), dtype=out_dtype)


def _scaled_linear_reference(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return numerics.scaled_linear(
        x_q, x_s, w_q, w_s, bias, x_block=x_block, w_block=w_block, out_dtype=out_dtype
    )  # fmt: skip


def _scaled_linear_cuda(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check_gemm(x_q, x_s, w_q, w_s, bias, x_block, w_block, out_dtype)
    n, k = w_q.shape
    out = torch.empty((*x_q.shape[:-1], n), dtype=out_dtype, device=x_q.device)
    if out.numel() == 0:
        return out
    if k == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand(out.shape))
    rows = _as_rows(x_q).contiguous()
    scales = x_s.reshape(rows.shape[0], x_s.shape[-1])
    aligned = (rows.data_ptr() | w_q.data_ptr()) % 16 == 0
    config = _config(bucket(rows.shape[0]), n, k, out.element_size(), aligned, x_q.device.index)
    with _on(x_q.device):
        launch_gemm(config, rows, w_q, out.view(-1, n), scales, w_s, bias)
    return out


def launch_gemm(
    config: GemmConfig, x: Tensor, w: Tensor, out: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None
) -> None:
    """Launches one configuration on the current CUDA device and stream, unchecked.

    Args:
        config: One that `codegen.tiling.refusal` does not refuse for these operands.
        x: float8_e4m3fn `[m, k]`, contiguous, m and k at least 1.
        w: float8_e4m3fn `[n, k]`, contiguous.
        out: bfloat16, float16 or float32 `[m, n]`, contiguous; overwritten.
        x_scale: FP32 `[m, ceil(k / 128)]`, any strides.
        w_scale: FP32 `[ceil(n / 128), ceil(k / 128)]`, any strides.
        bias: `[n]`, contiguous, or None.
    """
    (m, k), n = x.shape, w.shape[0]
    tile = (config.block_m, config.block_n, config.block_k)
    grid = (ceil_div(m, tile[0]) * ceil_div(n, tile[1]),)
    operands: tuple[Tensor | TensorDescriptor, ...] = (x, w, out)
    kernel = scaled_gemm_pointers
    if config.variant == "tma":
        kernel = scaled_gemm_tma
        operands = (
            TensorDescriptor(x, [m, k], [k, 1], [tile[0], tile[2]]),
            TensorDescriptor(w, [n, k], [k, 1], [tile[1], tile[2]]),
            TensorDescriptor(out, [m, n], [n, 1], [tile[0], tile[1]]),
        )
    kernel[grid](
        *operands, x_scale, w_scale, bias, m, n, k, *x_scale.stride(), *w_scale.stride(),
        BLOCK_M=tile[0], BLOCK_N=tile[1], BLOCK_K=tile[2], GROUP=config.group,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


@cache
def _config(m: int, n: int, k: int, out_bytes: int, aligned: bool, device: int) -> GemmConfig:
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return choose(GemmProblem(m, n, k, sms, out_bytes, aligned))


@cache
def _check_device(device: torch.device) -> None:
    """Raises CodegenError where there is no FP8; once a device, so it also settles where its kernels are kept."""
    use_cache_folder()
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise CodegenError(
            "this GPU has no FP8", got=f"{name}, compute capability {capability[0]}.{capability[1]}",
            need="compute capability 8.9 or later", fix="Compile the model for the target 'cpu' on this machine.",
        )  # fmt: skip


def _check_layout(block: Sequence[int], layout: str) -> None:
    if layout not in SCALE_LAYOUTS:
        raise CodegenError("unknown scale layout", got=repr(layout), fix=did_you_mean(layout, SCALE_LAYOUTS))
    if layout == "col_major" and block[0] != 1:
        raise CodegenError("the column-major scale layout is for blocks of 1 row", got=list(block), need="[1, columns]")


def _check_gemm(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raises CodegenError, with the value got and the value needed, for what the kernels would compute wrongly."""
    _check_device(x_q.device)
    n, k = w_q.shape if w_q.dim() == 2 else (-1, -1)
    blocks = ceil_div(k, 128)
    # One comparison after another, because this runs at every call; the message is made only when there is one.
    fits = (
        x_q.dtype is torch.float8_e4m3fn
        and w_q.dtype is torch.float8_e4m3fn
        and x_s.dtype is torch.float32
        and w_s.dtype is torch.float32
        and out_dtype in _FLOATS
        and tuple(x_block) == (1, 128)
        and tuple(w_block) == (128, 128)
        and x_q.dim() > 0
        and x_q.shape[-1] == k
        and x_s.shape == (*x_q.shape[:-1], blocks)
        and w_s.shape == (ceil_div(n, 128), blocks)
        and w_q.is_contiguous()
        and x_q.device == x_s.device == w_q.device == w_s.device
        and (bias is None or (bias.shape == (n,) and bias.is_contiguous() and bias.device == x_q.device))
    )
    if fits:
        return
    facts = (
        ("block of the activations", list(x_block), [1, 128]),
        ("block of the weights", list(w_block), [128, 128]),
        ("format of the activations", x_q.dtype, torch.float8_e4m3fn),
        ("format of the weights", w_q.dtype, torch.float8_e4m3fn),
        ("depth of the activations", x_q.shape[-1] if x_q.dim() else None, k),
        ("shape of the activation scales", list(x_s.shape), [*x_q.shape[:-1], blocks]),
        ("shape of the weight scales", list(w_s.shape), [ceil_div(n, 128), blocks]),
        ("dtype of the scales", {x_s.dtype, w_s.dtype}, {torch.float32}),
        ("layout of the weights (contiguous)", w_q.is_contiguous(), True),
        ("shape of the bias", None if bias is None else list(bias.shape), None if bias is None else [n]),
        ("layout of the bias (contiguous)", bias is None or bias.is_contiguous(), True),
        ("device of the operands", {t.device for t in (x_s, w_q, w_s, bias) if t is not None}, {x_q.device}),
    )
    for what, got, need in facts:
        if got != need:
            raise CodegenError(f"the FP8 GEMM kernels cannot run this {what}", got=got, need=need)
    raise CodegenError("the FP8 GEMM kernels cannot write this dtype", got=out_dtype, need=list(_FLOATS))


def _as_rows(x: Tensor) -> Tensor:
    """`x` as a matrix of its last dimension with contiguous rows; a view where its strides allow."""
    k = x.shape[-1]
    rows = x.reshape(x.numel() // k if k else 0, k)
    return rows if rows.stride(-1) == 1 or k == 1 else rows.contiguous()


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: switch to the operands' one, if it is another."""
    return contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def _register() -> torch.library.Library | None:
    """Defines both operators; None where another copy of this module already has."""
    if hasattr(torch.ops.qcompiler, "scaled_linear"):
        return None
    # A fragment, because the namespace may hold more operators than these.
    library = torch.library.Library("qcompiler", "FRAGMENT")
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(
        "quantize(Tensor x, int[] block, ScalarType dtype, str profile, str scale_layout) -> (Tensor, Tensor)",
        tags=tags,
    )
    library.define(
        "scaled_linear(Tensor x_q, Tensor x_s, Tensor w_q, Tensor w_s, Tensor? bias, int[] x_block, int[] w_block, "
        "ScalarType out_dtype) -> Tensor",
        tags=tags,
    )
    for name, cpu, cuda, fake in (
        ("quantize", _quantize_reference, _quantize_cuda, _quantize_fake),
        ("scaled_linear", _scaled_linear_reference, _scaled_linear_cuda, _scaled_linear_fake),
    ):
        library.impl(name, cpu, "CPU")
        library.impl(name, cuda, "CUDA")
        torch.library.register_fake(f"qcompiler::{name}", fake, lib=library)
    return library


if "_LIBRARY" not in globals():  # a reload keeps the library, whose end would be the end of its operators
    _LIBRARY = _register()
