"""The scaled product on a GPU: what its kernels accept, the choice of a configuration, and the launch."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from codegen.kernels.row_gemm import row_gemm_pointers, row_gemm_tma
from codegen.kernels.scaled_gemm import scaled_gemm_pointers, scaled_gemm_tma
from codegen.launching import FLOATS, as_rows, check_device, multiprocessors, on
from codegen.support import is_tiled, why_not
from codegen.tiling import GemmConfig, GemmProblem, Kind, bucket, ceil_div, choose
from qcompiler.errors import CodegenError
from qcompiler.numerics import scale_shape

_why_not = cache(why_not)


def scaled_linear_on_gpu(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`numerics.scaled_linear` on a CUDA device.

    Raises:
        CodegenError: The kernels would compute it wrongly or not at all: see `codegen.support` for blocks and formats.
    """
    _check(x_q, x_s, w_q, w_s, bias, x_block, w_block, out_dtype)
    n, k = w_q.shape
    out = torch.empty((*x_q.shape[:-1], n), dtype=out_dtype, device=x_q.device)
    if out.numel() == 0:
        return out
    if k == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand(out.shape))
    rows = as_rows(x_q).contiguous()
    m = rows.shape[0]
    scales = x_s.reshape(-1, x_s.shape[-1])
    aligned = (rows.data_ptr() | w_q.data_ptr()) % 16 == 0
    kind: Kind = "tiles" if is_tiled(w_block) else "rows_i8" if w_q.dtype == torch.int8 else "rows_f8"
    config = _config(bucket(m), n, k, out.element_size(), aligned, x_q.device.index, kind, x_block[1])
    with on(x_q.device):
        if kind == "tiles":
            scales = scales.expand(m, scales.shape[-1])
            launch_gemm(config, rows, w_q, out.view(-1, n), scales, w_s, bias, x_block[1])
        else:
            launch_row_gemm(config, rows, w_q, out.view(-1, n), scales, w_s, bias)
    return out


def launch_gemm(
    config: GemmConfig, x: Tensor, w: Tensor, out: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None,
    x_block: int = 128,
) -> None:  # fmt: skip
    """Launches one configuration of the kernels with scales inside the sum, on the current CUDA stream, unchecked.

    Args:
        config: One that `codegen.tiling.refusal` does not refuse for these operands.
        x: float8_e4m3fn `[m, k]`, contiguous, m and k at least 1.
        w: float8_e4m3fn `[n, k]`, contiguous.
        out: bfloat16, float16 or float32 `[m, n]`, contiguous; overwritten.
        x_scale: FP32 `[m, ceil(k / x_block)]`, any strides.
        w_scale: FP32 `[ceil(n / 128), ceil(k / 128)]`, any strides.
        bias: `[n]`, contiguous, or None.
        x_block: Columns of x that share a scale, or `ALL`.
    """
    (m, k), n = x.shape, w.shape[0]
    kernel = scaled_gemm_tma if config.variant == "tma" else scaled_gemm_pointers
    kernel[_grid(config, m, n)](
        *_tiles(config, x, w, out), x_scale, w_scale, bias, m, n, k, *x_scale.stride(), *w_scale.stride(),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP=config.group, X_BLOCK=x_block,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def launch_row_gemm(
    config: GemmConfig, x: Tensor, w: Tensor, out: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None,
    promote: bool | None = None,
) -> None:  # fmt: skip
    """Launches one configuration of the kernels with scales at the end of the sum, as `launch_gemm` does.

    Args:
        config: One that `codegen.tiling.refusal` does not refuse for these operands.
        x: float8_e4m3fn or int8 `[m, k]`, contiguous, m and k at least 1.
        w: The same dtype, `[n, k]`, contiguous.
        out: bfloat16, float16 or float32 `[m, n]`, contiguous; overwritten.
        x_scale: FP32, `[m, 1]`, or one number for the tensor.
        w_scale: FP32, `[n, 1]`, or one number for the tensor.
        bias: `[n]`, contiguous, or None.
        promote: Whether each step is added in FP32 registers; left out, it is for FP8.
    """
    (m, k), n = x.shape, w.shape[0]
    kernel = row_gemm_tma if config.variant == "tma" else row_gemm_pointers
    strides = (0 if scale.numel() == 1 else scale.stride(0) for scale in (x_scale, w_scale))
    kernel[_grid(config, m, n)](
        *_tiles(config, x, w, out), x_scale, w_scale, bias, m, n, k, *strides,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP=config.group,
        PROMOTE=x.dtype != torch.int8 if promote is None else promote,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _grid(config: GemmConfig, m: int, n: int) -> tuple[int]:
    return (ceil_div(m, config.block_m) * ceil_div(n, config.block_n),)


def _tiles(config: GemmConfig, x: Tensor, w: Tensor, out: Tensor) -> tuple[Tensor | TensorDescriptor, ...]:
    """The operands as the variant takes them."""
    if config.variant == "pointers":
        return x, w, out
    (m, k), n = x.shape, w.shape[0]
    return (
        TensorDescriptor(x, [m, k], [k, 1], [config.block_m, config.block_k]),
        TensorDescriptor(w, [n, k], [k, 1], [config.block_n, config.block_k]),
        TensorDescriptor(out, [m, n], [n, 1], [config.block_m, config.block_n]),
    )


@cache
def _config(
    m: int, n: int, k: int, out_bytes: int, aligned: bool, device: int, kind: Kind, x_block: int
) -> GemmConfig:  # fmt: skip
    return choose(GemmProblem(m, n, k, multiprocessors(device), out_bytes, aligned, kind, x_block))


def _check(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raises CodegenError, with the value got and the value needed, for what the kernels would compute wrongly."""
    check_device(x_q.device)
    why = _why_not(tuple(x_block), tuple(w_block), x_q.dtype, w_q.dtype)
    if why is not None:
        raise CodegenError(f"no GPU kernel runs this scaled linear: {why}")
    n, k = w_q.shape if w_q.dim() == 2 else (-1, -1)
    # One comparison after another, because this runs at every call; the message is made only when there is one.
    fits = (
        x_s.dtype is torch.float32
        and w_s.dtype is torch.float32
        and out_dtype in FLOATS
        and x_q.dim() > 0
        and x_q.shape[-1] == k
        and list(x_s.shape) == scale_shape(x_q.shape, x_block)
        and list(w_s.shape) == scale_shape(w_q.shape, w_block)
        and w_q.is_contiguous()
        and x_q.device == x_s.device == w_q.device == w_s.device
        and (bias is None or (bias.shape == (n,) and bias.is_contiguous() and bias.device == x_q.device))
    )
    if fits:
        return
    facts = (
        ("depth of the activations", x_q.shape[-1] if x_q.dim() else None, k),
        ("shape of the activation scales", list(x_s.shape), scale_shape(x_q.shape or [1], x_block)),
        ("shape of the weight scales", list(w_s.shape), scale_shape(w_q.shape or [1], w_block)),
        ("dtype of the scales", {x_s.dtype, w_s.dtype}, {torch.float32}),
        ("layout of the weights (contiguous)", w_q.is_contiguous(), True),
        ("shape of the bias", None if bias is None else list(bias.shape), None if bias is None else [n]),
        ("layout of the bias (contiguous)", bias is None or bias.is_contiguous(), True),
        ("device of the operands", {t.device for t in (x_s, w_q, w_s, bias) if t is not None}, {x_q.device}),
    )
    for what, got, need in facts:
        if got != need:
            raise CodegenError(f"the GPU kernels cannot run this {what}", got=got, need=need)
    raise CodegenError("the GPU kernels cannot write this dtype", got=out_dtype, need=list(FLOATS))
