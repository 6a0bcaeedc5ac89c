"""Compiles the kernels of quantization."""

from typing import Any

import torch

from codegen.kernels.quantize import quantize_tiles, quantize_tokens
from codegen.kernels.quantize_known import partial_amax, quantize_known
from codegen.machine_code import TRITON_TYPES, MachineCode, compile_kernel
from codegen.quantize.tiling import LONGEST_ROW, QuantizeConfig, quantize_config, tensor_config, token_config
from qcompiler import numerics

MANY_ROWS = 1 << 20
"""A number of rows that fills any device."""


def compile_quantize(
    dtype: torch.dtype = torch.bfloat16,
    *,
    profile: str = numerics.DEFAULT_PROFILE,
    scale_layout: str = "row_major",
    block_k: int = 128,
    out_dtype: torch.dtype = torch.float8_e4m3fn,
    prescale: bool = False,
    config: QuantizeConfig | None = None,
) -> MachineCode:
    """Compiles the quantization of tiles for sm_90a as a launch on an aligned tensor with K a multiple of 16 does.

    Args:
        dtype: Of the tensor that is quantized.
        profile: A name of `numerics.PROFILES`.
        scale_layout: `"row_major"` or `"col_major"`.
        block_k: Columns of a block.
        out_dtype: The 8-bit format.
        prescale: Whether each channel is multiplied first.
        config: The tile; left out, the one for many rows.

    Raises:
        CodegenError: Triton rejects the kernel.
    """
    tile = config or quantize_config(MANY_ROWS, block_k)
    constants = _rule(profile, out_dtype) | {"BLOCK_M": tile.block_m, "BLOCK_K": block_k}
    if scale_layout == "col_major":
        constants["scale_stride_m"] = 1  # the JIT compiler folds a 1 as well
    return _compile_quantize(quantize_tiles, dtype, out_dtype, prescale, constants, tile)


def compile_tokens(
    k: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    m: int = MANY_ROWS,
    profile: str = numerics.DEFAULT_PROFILE,
    out_dtype: torch.dtype = torch.float8_e4m3fn,
    prescale: bool = False,
) -> MachineCode:
    """Compiles the quantization of `m` rows of `k` columns with a scale each; the rest as in `compile_quantize`."""
    tile = token_config(m, k)
    constants = _rule(profile, out_dtype) | {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "scale_stride_m": 1}
    constants["ONE_STEP"] = k <= LONGEST_ROW
    return _compile_quantize(quantize_tokens, dtype, out_dtype, prescale, constants, tile)


def compile_known(
    dtype: torch.dtype = torch.bfloat16,
    *,
    m: int = MANY_ROWS,
    profile: str = numerics.DEFAULT_PROFILE,
    out_dtype: torch.dtype = torch.float8_e4m3fn,
    block_k: int | None = None,
    prescale: bool = False,
) -> MachineCode:
    """Compiles quantization with a given scale: for tiles of `block_k` columns, or, without it, for the tensor."""
    tile = tensor_config(m) if block_k is None else quantize_config(m, block_k)
    rule = _rule(profile, out_dtype)
    constants = {"TOP": rule["TOP"], "RECIPROCAL": rule["RECIPROCAL"], "ONE_SCALE": block_k is None}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "scale_stride_m": 1}
    return _compile_quantize(quantize_known, dtype, out_dtype, prescale, constants, tile)


def compile_amax(
    dtype: torch.dtype = torch.bfloat16,
    *,
    m: int = MANY_ROWS,
    out_dtype: torch.dtype = torch.float8_e4m3fn,
    prescale: bool = False,
) -> MachineCode:
    """Compiles the amax of a tensor of `m` rows."""
    tile = tensor_config(m)
    constants = {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "FINITE": out_dtype != torch.int8}
    return _compile_quantize(partial_amax, dtype, out_dtype, prescale, constants, tile)


def _rule(profile: str, out_dtype: torch.dtype) -> dict[str, Any]:
    """The constants that a profile and a format come down to."""
    rule = numerics.profile(profile)
    return {
        "AMAX_FLOOR": rule.amax_floor(out_dtype),
        "TOP": numerics.FORMAT_MAX[out_dtype],
        "RECIPROCAL": rule.division == "reciprocal",
        "UE8M0": rule.scale_format == "ue8m0",
    }


def _compile_quantize(
    kernel: Any, dtype: torch.dtype, out_dtype: torch.dtype, prescale: bool, constants: dict[str, Any],
    tile: QuantizeConfig,
) -> MachineCode:  # fmt: skip
    types = {"x": f"*{TRITON_TYPES[dtype]}", "q": f"*{TRITON_TYPES[out_dtype]}", "scale": "*fp32", "partial": "*fp32"}
    if prescale:
        types["prescale"] = "*fp32"
    else:
        constants = {**constants, "prescale": None}
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    return compile_kernel(kernel, types, constants, (*types, "k", "x_stride"), {"num_warps": tile.warps})
