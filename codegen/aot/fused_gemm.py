"""Compiles the product with a body for Hopper as its launch does, on a machine without a GPU or a driver."""

from collections.abc import Sequence
from typing import Any

import torch

from codegen.bodies import triton_function
from codegen.fused_gemm.launch import BODY_COLUMNS, BODY_ROWS, OPTIONS, fused_constants
from codegen.fused_gemm.tiling import FusedGemmConfig
from codegen.gemm.launch import gluon_layout, scale_layout
from codegen.kernels.fused_gemm import fused_gemm
from codegen.kernels.pointwise import apply_body
from codegen.machine_code import TRITON_TYPES, MachineCode, compile_kernel
from qcompiler import numerics
from qcompiler.body import parse


def compile_fused(
    config: FusedGemmConfig,
    body: str,
    *,
    others: Sequence[torch.dtype] = (),
    bias_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    columns: int = 4096,
    scale_layout: str = "col_major",
    profile: str = numerics.DEFAULT_PROFILE,
) -> MachineCode:
    """Compiles one form of the kernel for sm_90a.

    Args:
        config: Any form, also one that `codegen.fused_gemm.tiling.refusal` would refuse.
        body: Text of a body.
        others: Element types of its operands beside the sums.
        bias_dtype: Of the bias, or None for none.
        out_dtype: The 8-bit format that the result is quantized to; left out, it is not.
        columns: Of the result, a multiple of 16.
        scale_layout: `"row_major"` or `"col_major"`, of the result.
        profile: A name of `numerics.PROFILES`.

    Raises:
        CodegenError: Triton rejects the kernel.
    """
    kind = out_dtype or parse(body).dtype()
    optional = {"bias": bias_dtype, "out_scale": None if out_dtype is None else torch.float32}
    optional |= dict(zip(("x0", "x1"), (*others, None, None), strict=False))
    types = {
        "a": _tile(config.rows),
        "w": _tile(128),
        "a_scale": _scales(config.rows),
        "w_scale": "*fp32",
        "out": f"*{TRITON_TYPES[kind]}",
        **{name: f"*{TRITON_TYPES[dtype]}" for name, dtype in optional.items() if dtype is not None},
    }
    constants = fused_constants(config, body, columns, kind, profile) | {"w_scale_stride_k": 1}
    constants |= {name: None for name, dtype in optional.items() if dtype is None}
    if out_dtype is not None and scale_layout == "col_major":
        constants["scale_stride_m"] = 1  # the JIT compiler folds a 1 as well
    pointers = [name for name, each in types.items() if each.startswith("*")]
    divisible = (*pointers, "n", "k", "x0_stride", "x1_stride")
    return compile_kernel(fused_gemm, types, constants, divisible, OPTIONS)


def compile_body(body: str, dtype: torch.dtype = torch.bfloat16) -> MachineCode:
    """Compiles the kernel that runs a body alone, on aligned operands of that element type."""
    made = parse(body)
    absent = [name for name in ("x0", "x1", "y0", "y1") if name not in made.operands]
    types = dict.fromkeys(made.operands, f"*{TRITON_TYPES[dtype]}") | {"out": f"*{TRITON_TYPES[made.dtype()]}"}
    constants: dict[str, Any] = {"BODY": triton_function(body), "BLOCK_M": BODY_ROWS, "BLOCK_N": BODY_COLUMNS}
    constants |= dict.fromkeys(absent)
    divisible = (*types, "n", *(f"{name}_stride" for name in made.operands))
    return compile_kernel(apply_body, types, constants, divisible, OPTIONS)


def _tile(rows: int) -> str:
    return f"tensordesc<fp8e4nv[{rows}, 128],{gluon_layout(rows, 128, torch.float8_e4m3fn)!r}>"


def _scales(rows: int) -> str:
    return f"tensordesc<fp32[1, {rows}],{scale_layout()!r}>"
