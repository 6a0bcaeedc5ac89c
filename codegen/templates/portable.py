"""The portable Triton kernels of the scaled matmul: with pointers, or the copy engine for scales inside the sum."""

from typing import Any

from triton.tools.tensor_descriptor import TensorDescriptor

from codegen.kernels.row_gemm import row_gemm_pointers
from codegen.kernels.scaled_gemm import scaled_gemm_pointers, scaled_gemm_tma
from codegen.launching.launch import KernelCall, descriptor
from codegen.templates.gemm import GEMM, GemmConfig, GemmOperands, Measured, Pace, by_kind, tiles_of
from codegen.templates.gemm_template import GemmTemplate


class PointerGemm(GemmTemplate):
    """Operands of any alignment."""

    variant = "pointers"
    copies = stores = False
    kernel = scaled_gemm_pointers

    def calls(self, config: GemmConfig, operands: GemmOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        *_, x_scale, w_scale, bias, x_block, _ = operands
        m, n, k = operands.sizes
        kernel, last = self.kernel, {"X_BLOCK": x_block}
        strides: tuple[int, ...] = (*x_scale.stride(), *w_scale.stride())
        if x_block is None:
            kernel, last, strides = row_gemm_pointers, {"PROMOTE": operands.promoted}, operands.scale_strides
        arguments = (*self.matrices(config, operands), x_scale, w_scale, bias, m, n, k, *strides)
        sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        options = {"num_warps": config.warps, "num_stages": config.stages}
        return (
            KernelCall(kernel, tiles_of(config, m, n), arguments, {**sizes, "GROUP": config.group, **last}, options),
        )

    def matrices(self, config: GemmConfig, operands: GemmOperands) -> tuple[Any, Any, Any]:
        """x, w, and out in the form that the kernel takes."""
        return operands.x, operands.w, operands.out


class CopyEngineGemm(PointerGemm):
    """The same with tensor descriptors, for scales inside the sum."""

    variant = "tma"
    copies = stores = True
    kernel = scaled_gemm_tma

    def matrices(self, config: GemmConfig, operands: GemmOperands) -> tuple[Any, Any, Any]:
        """See `PointerGemm`."""
        m, n, k = operands.sizes
        return (
            descriptor(TensorDescriptor, operands.x, [m, k], k, [config.block_m, config.block_k]),
            descriptor(TensorDescriptor, operands.w, [n, k], k, [config.block_n, config.block_k]),
            descriptor(TensorDescriptor, operands.out, [m, n], n, [config.block_m, config.block_n]),
        )


POINTERS: Measured = {
    ("tiles", 128): {
        GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): Pace(600, 320, 1200, 3400),
        GemmConfig(64, 64, 128, 4, 3, 16, "pointers"): Pace(510, 200, 500, 3400),
        GemmConfig(64, 32, 128, 4, 4, 16, "pointers"): Pace(440, 160, 400, 2600),
    },
    ("tiles", 64): {
        GemmConfig(64, 128, 64, 4, 4, 16, "pointers"): Pace(420, 200, 800, 2000),
        GemmConfig(64, 64, 64, 4, 5, 16, "pointers"): Pace(380, 120, 1300, 2400),
        GemmConfig(64, 32, 64, 4, 5, 16, "pointers"): Pace(360, 100, 800, 2200),
    },
    ("tiles", 32): {
        GemmConfig(64, 128, 32, 4, 4, 16, "pointers"): Pace(280, 180, 2500, 2000),
        GemmConfig(64, 64, 32, 4, 5, 16, "pointers"): Pace(300, 120, 2600, 2300),
        GemmConfig(64, 32, 32, 4, 5, 16, "pointers"): Pace(280, 90, 2200, 3800),
    },
    ("rows_f8", 128): {
        GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): Pace(550, 380, 500, 2600),
        GemmConfig(64, 64, 128, 4, 4, 16, "pointers"): Pace(330, 180, 1800, 2500),
        GemmConfig(64, 32, 128, 4, 5, 16, "pointers"): Pace(310, 160, 600, 2500),
    },
    ("rows_i8", None): {
        GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): Pace(500, 210, 2800, 2900),
        GemmConfig(64, 64, 128, 4, 4, 16, "pointers"): Pace(350, 200, 1000, 2300),
        GemmConfig(64, 32, 128, 4, 5, 16, "pointers"): Pace(280, 150, 500, 2500),
    },
}
"""Measured on an H100 and an H200; other kinds than `("tiles", 128)` on an H100 alone.

Three tiles of one warpgroup fit on a multiprocessor, and one multiplies while another promotes. The usual 128 x 128
tile of two warpgroups runs in lockstep, is slower almost everywhere for FP8, and is therefore absent."""

TMA: Measured = {
    ("tiles", 128): {
        GemmConfig(64, 128, 128, 4, 3, 16, "tma"): Pace(570, 270, 900, 2800),
    },
    ("tiles", 64): {
        GemmConfig(64, 128, 64, 4, 4, 16, "tma"): Pace(370, 210, 800, 2400),
    },
    ("tiles", 32): {
        GemmConfig(64, 128, 32, 4, 4, 16, "tma"): Pace(300, 180, 2300, 2000),
    },
}
"""Measured likewise. Narrow tiles wait longer through the copy engine than through pointers."""

# In this order: of equal estimates, the first is chosen.
GEMM.add(CopyEngineGemm, by_kind(TMA), on="sm_90a")
GEMM.add(PointerGemm, by_kind(POINTERS), on="sm_90a")
