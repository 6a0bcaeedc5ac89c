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
    """A tile of 128 rows of the weight and few rows of the activation.

    Two programs with half of the shared memory each hide each other's latency. The next kernel's programs start early
    (see `codegen.kernels.overlap`), and find room only where one has ended: so each multiprocessor again gets two.
    """

    variant = "narrow"
    overlaps = True
    splits = True
    together = 2
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
        GemmConfig(16, 128, 128, 4, 6, 1, "narrow"): Pace(750, 370, 1300, 3700, 800),
        GemmConfig(32, 128, 128, 4, 5, 1, "narrow"): Pace(750, 430, 1800, 3500, 600),
    },
    ("tiles", 64): {
        GemmConfig(16, 128, 128, 4, 6, 1, "narrow"): Pace(420, 360, 1300, 3200, 1400),
        GemmConfig(32, 128, 128, 4, 5, 1, "narrow"): Pace(490, 650, 1100, 3000, 1200),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(560, 460, 2900, 2600, 4000),
    },
    ("tiles", 32): {
        GemmConfig(16, 128, 128, 4, 6, 1, "narrow"): Pace(330, 440, 900, 3600, 1000),
        GemmConfig(32, 128, 128, 4, 5, 1, "narrow"): Pace(240, 430, 500, 3100, 4000),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(680, 470, 2400, 2200, 2300),
    },
    ("rows_f8", 128): {
        GemmConfig(16, 128, 128, 4, 6, 1, "narrow"): Pace(890, 690, 1100, 3000, 500),
        GemmConfig(32, 128, 128, 4, 5, 1, "narrow"): Pace(420, 360, 700, 2600, 700),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(500, 430, 800, 2400, 2700),
    },
    ("rows_i8", None): {
        GemmConfig(16, 128, 128, 4, 6, 1, "narrow"): Pace(270, 370, 800, 3500, 1900),
        GemmConfig(32, 128, 128, 4, 5, 1, "narrow"): Pace(190, 490, 1500, 3200, 500),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(210, 340, 2300, 2100, 800),
    },
}
"""Measured on an H100, `("tiles", 128)` also on an H200."""

GEMM.add(NarrowGemm, by_kind(NARROW), on="sm_90a")
