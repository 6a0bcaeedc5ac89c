"""Compiles the kernels of the scaled product."""

from typing import Any

import torch

from codegen.gemm.config import GLUON, GemmConfig, Kind
from codegen.gemm.launch import SUM_BLOCK, gluon_constants, gluon_layout, row_constants, scale_layout
from codegen.kernels.narrow_gemm import SCALE_BOX, narrow_gemm, sum_splits
from codegen.kernels.narrow_row_gemm import narrow_row_gemm, sum_row_splits
from codegen.kernels.row_gemm import row_gemm_pointers
from codegen.kernels.scaled_gemm import scaled_gemm_pointers, scaled_gemm_tma
from codegen.kernels.warp_gemm import warp_gemm
from codegen.kernels.warp_row_gemm import warp_row_gemm
from codegen.machine_code import TRITON_TYPES, MachineCode, compile_kernel


def compile_gemm(
    config: GemmConfig,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    bias_dtype: torch.dtype | None = None,
    scale_layout: str = "col_major",
    aligned: bool = True,
    x_block: int = 128,
) -> MachineCode:
    """Compiles one configuration of the GEMM with scales inside the sum for sm_90a.

    Args:
        config: Any configuration, also one that `codegen.gemm.config` would refuse.
        out_dtype: Of the result; FP32 is also what a narrow tile writes for a split of K.
        bias_dtype: Of the bias, or None for none.
        scale_layout: Layout of the activations' scales; the Gluon kernels have one.
        aligned: N and K are multiples of 16 and pointers of 16 bytes; only the pointer variant runs without.
        x_block: Columns of the activation that share a scale, or `numerics.ALL`.

    Raises:
        CodegenError: Triton rejects the kernel.
    """
    if config.variant in GLUON:
        return _compile_gluon(config, out_dtype, bias_dtype, x_block)
    constants: dict[str, Any] = {"w_scale_stride_k": 1, "X_BLOCK": x_block}
    if scale_layout == "col_major":
        constants["a_scale_stride_m"] = 1
    kernel = scaled_gemm_tma if config.variant == "tma" else scaled_gemm_pointers
    return _compile_gemm(kernel, config, torch.float8_e4m3fn, out_dtype, bias_dtype, aligned, constants)


def compile_sum_splits(
    splits: int, *, out_dtype: torch.dtype = torch.bfloat16, bias_dtype: torch.dtype | None = None
) -> MachineCode:
    """Compiles the sum over the splits of K of a narrow tile; `splits` is a power of two."""
    types = {"partial": "*fp32", "out": f"*{TRITON_TYPES[out_dtype]}"}
    constants: dict[str, Any] = {"SPLITS": splits, "BLOCK": SUM_BLOCK}
    _add_bias(types, constants, bias_dtype)
    return compile_kernel(sum_splits, types, constants, (*types, "n"), {"num_warps": 4})


def compile_sum_row_splits(
    splits: int, kind: Kind = "rows_f8", *, out_dtype: torch.dtype = torch.bfloat16,
    bias_dtype: torch.dtype | None = None,
) -> MachineCode:  # fmt: skip
    """Compiles the sum over the splits of K of a narrow tile with scales at its end; as in `compile_sum_splits`."""
    sums = "*i32" if kind == "rows_i8" else "*fp32"
    types = {"partial": sums, "out": f"*{TRITON_TYPES[out_dtype]}", "a_scale": "*fp32", "w_scale": "*fp32"}
    constants: dict[str, Any] = {"SPLITS": splits, "BLOCK": SUM_BLOCK}
    _add_bias(types, constants, bias_dtype)
    return compile_kernel(sum_row_splits, types, constants, (*types, "n"), {"num_warps": 4})


def compile_row_gemm(
    config: GemmConfig,
    kind: Kind = "rows_f8",
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    bias_dtype: torch.dtype | None = None,
    aligned: bool = True,
    promote: bool | None = None,
    partial: bool = False,
) -> MachineCode:
    """Compiles one configuration of the GEMM with scales at the end of the sum; the rest as in `compile_gemm`.

    Args:
        config: Any configuration.
        kind: `"rows_f8"` or `"rows_i8"`.
        out_dtype: Of the result.
        bias_dtype: Of the bias, or None for none.
        aligned: As in `compile_gemm`.
        promote: Whether each step is added in FP32 registers; left out, it is for FP8.
        partial: Of a narrow tile, compile what writes sums of a split of K, whose type `out_dtype` is not.
    """
    dtype = torch.int8 if kind == "rows_i8" else torch.float8_e4m3fn
    promoted = kind == "rows_f8" if promote is None else promote
    if config.variant in GLUON:
        return _compile_gluon_rows(config, dtype, out_dtype, bias_dtype, promoted, partial)
    constants = {"PROMOTE": promoted}
    return _compile_gemm(row_gemm_pointers, config, dtype, out_dtype, bias_dtype, aligned, constants)


def _compile_gemm(
    kernel: Any, config: GemmConfig, dtype: torch.dtype, out_dtype: torch.dtype, bias_dtype: torch.dtype | None,
    aligned: bool, constants: dict[str, Any],
) -> MachineCode:  # fmt: skip
    element, out = TRITON_TYPES[dtype], TRITON_TYPES[out_dtype]
    if config.variant == "tma":
        types = {
            "a": f"tensordesc<{element}[{config.block_m}, {config.block_k}]>",
            "w": f"tensordesc<{element}[{config.block_n}, {config.block_k}]>",
            "out": f"tensordesc<{out}[{config.block_m}, {config.block_n}]>",
        }
    else:
        types = {"a": f"*{element}", "w": f"*{element}", "out": f"*{out}"}
    types |= {"a_scale": "*fp32", "w_scale": "*fp32"}
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
        **constants,
    }
    _add_bias(types, constants, bias_dtype)
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    divisible = (*pointers, "n", "k") if aligned else ()
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return compile_kernel(kernel, types, constants, divisible, options)


def _add_bias(types: dict[str, str], constants: dict[str, Any], dtype: torch.dtype | None) -> None:
    """The bias among a kernel's arguments: a pointer, or a constant that says that there is none."""
    if dtype is None:
        constants["bias"] = None
    else:
        types["bias"] = f"*{TRITON_TYPES[dtype]}"


def _compile_gluon(
    config: GemmConfig, out_dtype: torch.dtype, bias_dtype: torch.dtype | None, x_block: int
) -> MachineCode:
    narrow = config.variant == "narrow"
    scales = max(config.box, SCALE_BOX) if narrow else config.box
    types = _gluon_types(config, torch.float8_e4m3fn, out_dtype)
    types |= {"a_scale": f"tensordesc<fp32[1, {scales}],{scale_layout()!r}>", "w_scale": "*fp32"}
    constants = gluon_constants(config, x_block, out_dtype.itemsize) | {"w_scale_stride_k": 1}
    if config.variant == "warp":
        constants["depth"] = None
    return _compile_gluon_kernel(narrow_gemm if narrow else warp_gemm, config, types, constants, bias_dtype)


def _compile_gluon_rows(
    config: GemmConfig, dtype: torch.dtype, out_dtype: torch.dtype, bias_dtype: torch.dtype | None, promote: bool,
    partial: bool,
) -> MachineCode:  # fmt: skip
    sums = torch.int32 if dtype == torch.int8 else torch.float32
    types = _gluon_types(config, dtype, sums if partial else out_dtype)
    constants: dict[str, Any] = row_constants(config, promote, out_dtype.itemsize)
    if partial:
        constants |= {"a_scale": None, "w_scale": None}
    else:
        types |= {"a_scale": "*fp32", "w_scale": "*fp32"}
    if config.variant == "narrow":
        return _compile_gluon_kernel(narrow_row_gemm, config, types, constants, bias_dtype)
    constants["w_scale_stride"] = 1  # the JIT compiler folds a 1 as well
    return _compile_gluon_kernel(warp_row_gemm, config, types, constants, bias_dtype)


def _gluon_types(config: GemmConfig, dtype: torch.dtype, out_dtype: torch.dtype) -> dict[str, str]:
    """Triton's types of the operands and the result of a Gluon kernel."""

    def tile(rows: int, columns: int, dtype: torch.dtype) -> str:
        return f"tensordesc<{TRITON_TYPES[dtype]}[{rows}, {columns}],{gluon_layout(rows, columns, dtype)!r}>"

    narrow = config.variant == "narrow"
    out = f"*{TRITON_TYPES[out_dtype]}" if narrow else tile(64, config.block_n, out_dtype)
    return {"a": tile(config.box, 128, dtype), "w": tile(config.block_n, 128, dtype), "out": out}


def _compile_gluon_kernel(
    kernel: Any, config: GemmConfig, types: dict[str, str], constants: dict[str, Any], bias_dtype: torch.dtype | None
) -> MachineCode:
    _add_bias(types, constants, bias_dtype)
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    warps = config.warps if config.variant == "narrow" else 4  # the first consumer's; the kernel asks for the others
    return compile_kernel(kernel, types, constants, (*pointers, "n", "k"), {"num_warps": warps})
