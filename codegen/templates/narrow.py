"""The Gluon kernels of the scaled matmul for few rows, which are the right operand of the tensor cores; K is split."""

from typing import Any

import torch

from codegen.kernels.narrow_gemm import SCALE_BOX, narrow_gemm, sum_splits
from codegen.kernels.narrow_row_gemm import narrow_row_gemm, sum_row_splits
from codegen.launching.launch import KernelCall
from codegen.launching.replay import empty
from codegen.templates.gemm import GEMM, GemmConfig, GemmOperands, Measured, Pace, by_kind, tiles_of
from codegen.templates.gemm_template import GluonGemmTemplate, add_splits, spans
from codegen.templates.hopper import scale_columns, tile
from codegen.templates.template import ceil_div


class NarrowGemm(GluonGemmTemplate):
    """A tile of 128 rows of the weight and few rows of the activation."""

    variant = "narrow"
    overlaps = True
    splits = True
    stores = False

    def split_side(self, config: GemmConfig) -> tuple[str, int]:
        """See `GemmTemplate`."""
        return "columns", config.block_n

    def shared_memory(self, config: GemmConfig, out_bytes: int = 2, stage_scales: int = 1) -> int:
        """See `GemmTemplate`."""
        return self.ring(config, stage_scales)  # the result goes from registers to memory

    def calls(self, config: GemmConfig, operands: GemmOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        x, w, out, x_scale, w_scale, bias, x_block, _ = operands
        m, n, k = operands.sizes
        depth = self.split_depth(config, m, n, k, self.limits.multiprocessors_of(x.device.index))
        splits = ceil_div(ceil_div(k, 128), depth)
        sums, whole = out, splits == 1
        if not whole:
            kind = torch.int32 if x_block is None and x.dtype == torch.int8 else torch.float32
            sums = empty((splits, m, n), kind, x.device)
        applied: tuple[Any, ...] = (x_scale, w_scale, bias)
        if x_block is None:
            kernel, strides = narrow_row_gemm, operands.scale_strides
            constants: dict[str, Any] = {"STAGES": config.stages, "PROMOTE": operands.promoted}
            last = add_splits(sum_row_splits, (sums, out, *applied, m, n, splits, *strides), out, splits)
            applied = applied if whole else (None, None, None)
        else:
            kernel, strides = narrow_gemm, (w_scale.stride(0), w_scale.stride(1))
            constants = {"STAGES": config.stages, **spans(x_block)}
            last = add_splits(sum_splits, (sums, out, bias, m, m, n, splits), out, splits)
            applied = (scale_columns(x_scale, max(config.box, SCALE_BOX)), w_scale, bias if whole else None)
        arguments = (tile(x, config.box), tile(w, 128), sums, *applied, m, n, k, *strides, depth)
        programs, options = tiles_of(config, m, n) * splits, {"num_warps": config.warps}
        gemm = KernelCall(kernel, programs, arguments, constants, options)
        return (gemm,) if whole else (gemm, last)


NARROW: Measured = {
    ("tiles", 128): {
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(440, 290, 1200, 3200, 1800),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(470, 310, 1300, 2800, 1600),
    },
    ("tiles", 64): {
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(420, 320, 1400, 2700, 1600),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(490, 310, 2500, 2800, 1500),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(560, 460, 2600, 2700, 2300),
    },
    ("tiles", 32): {
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(440, 310, 2100, 2700, 1800),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(520, 390, 3200, 2800, 2100),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(640, 690, 2100, 2900, 4500),
    },
    ("rows_f8", 128): {
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(990, 310, 700, 3000, 500),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(420, 310, 1300, 2800, 2400),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(500, 430, 800, 2500, 2700),
    },
    ("rows_i8", None): {
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(320, 290, 1000, 2800, 1900),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(330, 280, 2300, 2600, 1300),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(480, 390, 1300, 2600, 1700),
    },
}
"""Measured on an H100, and with a lower weight on an H200."""

GEMM.add(NarrowGemm, by_kind(NARROW), on="sm_90a")
