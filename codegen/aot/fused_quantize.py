"""The kernel of `kernel.fused_quantize` compiled for Hopper as launches do, on a machine without a GPU or a driver."""

from typing import Any

import torch

from codegen.aot.quantize import MANY_ROWS
from codegen.bodies import OPERANDS, triton_function
from codegen.kernels.fused_quantize import fused_quantize
from codegen.machine_code import TRITON_TYPES, MachineCode, compile_kernel
from codegen.quantize.fused import MOST_KEPT, MOST_OPERANDS
from codegen.quantize.tiling import FusedConfig, fused_config
from qcompiler import numerics
from qcompiler.body import parse


def compile_fused_quantize(
    body: str,
    operands: tuple[torch.dtype, ...],
    k: int,
    *,
    m: int = MANY_ROWS,
    vectors: tuple[int, ...] = (),
    keep: tuple[str, ...] = (),
    block_k: int = 128,
    out_dtype: torch.dtype = torch.float8_e4m3fn,
    profile: str = numerics.DEFAULT_PROFILE,
    scale_layout: str = "col_major",
    config: FusedConfig | None = None,
) -> MachineCode:
    """Compiles it for sm_90a for aligned operands.

    Args:
        body: The body.
        operands: Element types of x0, x1, ….
        k: Columns.
        m: Rows, of which the tile depends on.
        vectors: Numbers of the operands that are vectors.
        keep: The definitions that are stored.
        block_k: Columns that share a scale, or `numerics.ALL`.
        out_dtype: The 8-bit format.
        profile: A name of `numerics.PROFILES`.
        scale_layout: `"row_major"` or `"col_major"`.
        config: The tile; left out, the one that the launch chooses.

    Raises:
        CodegenError: Triton rejects the kernel.
    """
    made, rule = parse(body), numerics.profile(profile)
    held = max(dtype.itemsize for dtype in operands)
    tile = config or fused_config(m, k, block_k, whole_rows=made.across, operand_bytes=held, kept=len(keep))
    types = {"q": f"*{TRITON_TYPES[out_dtype]}", "scale": "*fp32"}
    constants: dict[str, Any] = {
        "K": k, "BODY": triton_function(body, keep),
        "AMAX_FLOOR": rule.amax_floor(out_dtype), "TOP": numerics.FORMAT_MAX[out_dtype],
        "RECIPROCAL": rule.division == "reciprocal", "UE8M0": rule.scale_format == "ue8m0", "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k, "GROUP": tile.group, "VECTOR": tile.vector,
    }  # fmt: skip
    constants["scale_stride_m" if scale_layout == "col_major" or block_k == numerics.ALL else "scale_stride_k"] = 1
    strides = []
    for place in range(MOST_OPERANDS):
        name = OPERANDS[place]
        if place < len(operands):
            types[name] = f"*{TRITON_TYPES[operands[place]]}"
        else:
            constants[name] = None
        if place < len(operands) and place not in vectors:
            strides.append(f"{name}_stride")
        else:
            constants[f"{name}_stride"] = None
    for place in range(MOST_KEPT):
        if place < len(keep):
            types[f"kept{place}"] = f"*{TRITON_TYPES[made.dtype(keep[place])]}"
        else:
            constants[f"kept{place}"] = None
    divisible = (*types, *strides) if k % 16 == 0 else tuple(types)
    options = {"num_warps": tile.warps, "enable_fp_fusion": False}
    return compile_kernel(fused_quantize, types, constants, divisible, options)
