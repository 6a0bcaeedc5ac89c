"""Compiles the grouped kernels for Hopper as their launches do."""

import torch

from codegen.gemm.launch import gluon_layout, scale_layout
from codegen.grouped_gemm.launch import GroupedConfig, grouped_constants
from codegen.kernels.grouped_gemm import grouped_narrow, grouped_wide
from codegen.machine_code import TRITON_TYPES, MachineCode, compile_kernel

E4M3 = torch.float8_e4m3fn


def compile_grouped(
    config: GroupedConfig, *, out_dtype: torch.dtype = torch.bfloat16, groups: int = 256, masked: bool = False
) -> MachineCode:
    """Compiles one configuration of the grouped product for sm_90a.

    Args:
        config: Any.
        out_dtype: Of the result.
        groups: How many there are.
        masked: Whether each group has room for as many rows, in place of following the one before.

    Raises:
        CodegenError: Triton rejects the kernel.
    """
    types = {
        "x": _tile(config.box, E4M3),
        "w": _tile(128, E4M3),
        "x_scale": f"tensordesc<fp32[1, {config.scale_box}],{scale_layout()!r}>",
        "out": f"*{TRITON_TYPES[out_dtype]}",
        "w_scale": "*fp32",
        "offsets": "*i32",
    }
    wide = config.variant == "wide"
    if wide:
        types["out_box"] = _tile(64, out_dtype)
    constants = grouped_constants(config, groups)
    if not masked:
        constants["capacity"] = None
    divisible = ("out", "w_scale", "offsets", "n")
    return compile_kernel(grouped_wide if wide else grouped_narrow, types, constants, divisible, {"num_warps": 4})


def _tile(rows: int, dtype: torch.dtype) -> str:
    return f"tensordesc<{TRITON_TYPES[dtype]}[{rows}, 128],{gluon_layout(rows, 128, dtype)!r}>"
