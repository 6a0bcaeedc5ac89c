"""The warp-specialized Gluon kernels of the scaled matmul, for many rows, and for fewer rows with K split."""

from typing import Any

import torch

from codegen.kernels.narrow_gemm import sum_splits
from codegen.kernels.warp_gemm import warp_gemm
from codegen.kernels.warp_row_gemm import warp_row_gemm
from codegen.launching.launch import KernelCall
from codegen.launching.replay import empty
from codegen.templates.gemm import GEMM, GemmConfig, GemmOperands, GemmProblem, Measured, Pace, by_kind, tiles_of
from codegen.templates.gemm_template import GluonGemmTemplate, add_splits, spans
from codegen.templates.hopper import ONE_WARPGROUP, scale_columns, tile
from codegen.templates.template import ceil_div

REGISTERS_FOR_SUMS = {1: 192, 2: 192, 3: 128}
"""Consumers -> registers per consumer thread that sums may use; a thread has 255, 232, or 160."""


class WarpGemm(GluonGemmTemplate):
    """One program per multiprocessor: a producer, and consumers that compute 64 rows per step."""

    variant = "warp"
    overlaps = True
    slow_when_half_empty = True

    def registers(self, config: GemmConfig, whole: bool) -> tuple[int, int]:
        """See `GemmTemplate`."""
        rows = config.block_m + (0 if whole else min(config.block_m, 64 * config.consumers))
        return rows * config.block_n // (config.warps * 32), REGISTERS_FOR_SUMS.get(config.consumers, 0)

    def shared_memory(self, config: GemmConfig, out_bytes: int = 2, stage_scales: int = 1) -> int:
        """See `GemmTemplate`."""
        rows = 64 * config.consumers * self.out_buffers(config, out_bytes, stage_scales)
        return self.ring(config, stage_scales) + rows * config.block_n * out_bytes

    def out_buffers(self, config: GemmConfig, out_bytes: int = 2, stage_scales: int = 1) -> int:
        """Output buffers of 64 rows for each consumer: one for each of its waves if all fit, or one."""
        waves = max(config.block_m // max(config.consumers, 1) // 64, 1)
        written = 64 * config.consumers * waves * config.block_n * out_bytes
        return waves if self.ring(config, stage_scales) + written <= self.limits.shared_memory else 1

    def calls(self, config: GemmConfig, operands: GemmOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        x, _, out, x_scale, w_scale, bias, x_block, _ = operands
        if x_block is None:
            return self._rows(config, operands)
        m, n, k = operands.sizes
        sms = self.limits.multiprocessors_of(x.device.index)
        depth = self.split_depth(config, m, n, k, sms)
        splits = ceil_div(ceil_div(k, 128), depth)
        rows = ceil_div(m, config.block_m) * config.block_m  # per split: the copy engine would write beyond m
        sums = out if splits == 1 else empty((splits * rows, n), torch.float32, x.device)
        arguments = (
            *_tiles(config, operands, sums), scale_columns(x_scale, config.box), w_scale, bias if splits == 1 else None,
            m, n, k, *w_scale.stride(), depth if self.splits else None,
        )  # fmt: skip
        scales = spans(x_block)
        buffers = self.out_buffers(config, sums.element_size(), scales["SUBS"])
        constants = {**_constants(config), **scales, "BUFFERS": buffers}
        programs = min(sms, tiles_of(config, m, n) * splits)
        gemm = KernelCall(warp_gemm, programs, arguments, constants, ONE_WARPGROUP)
        if splits == 1:
            return (gemm,)
        return gemm, add_splits(sum_splits, (sums, out, bias, m, rows, n, splits), out, splits)

    def _rows(self, config: GemmConfig, operands: GemmOperands) -> tuple[KernelCall, ...]:
        """With scales at the end of the sum."""
        _, _, out, x_scale, w_scale, bias, _, _ = operands
        m, n, k = operands.sizes
        programs = min(self.limits.multiprocessors_of(out.device.index), tiles_of(config, m, n))
        last = (x_scale, w_scale, bias, m, n, k, *operands.scale_strides)
        buffers = self.out_buffers(config, out.element_size(), 0)
        constants = {**_constants(config), "PROMOTE": operands.promoted, "BUFFERS": buffers}
        arguments = (*_tiles(config, operands, out), *last)
        return (KernelCall(warp_row_gemm, programs, arguments, constants, ONE_WARPGROUP),)


class SplitGemm(WarpGemm):
    """The same with K split if there are too few tiles, for scales inside the sum."""

    variant = "split"
    splits = True

    def written_bytes(self, problem: GemmProblem) -> int:
        """Bytes per element of a split's sums."""
        return 4


def _tiles(config: GemmConfig, operands: GemmOperands, out: torch.Tensor) -> tuple[Any, Any, Any]:
    return tile(operands.x, config.box), tile(operands.w, config.block_n), tile(out, 64, config.block_n)


def _constants(config: GemmConfig) -> dict[str, int]:
    waves = config.block_m // config.consumers // 64
    return {"CONSUMERS": config.consumers, "WAVES": waves, "STAGES": config.stages, "GROUP": config.group}


WARP: Measured = {
    ("tiles", 128): {
        GemmConfig(256, 128, 128, 8, 3, 16, "warp"): Pace(830, 850, 1700, 2100),
        GemmConfig(192, 128, 128, 12, 4, 16, "warp"): Pace(530, 620, 1000, 2200),
        GemmConfig(256, 128, 128, 8, 3, 4, "warp"): Pace(830, 860, 1500, 2000),
        GemmConfig(192, 128, 128, 12, 4, 2, "warp"): Pace(520, 600, 1300, 2300),
        GemmConfig(128, 128, 128, 8, 4, 16, "warp"): Pace(400, 430, 1200, 3200),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(300, 290, 700, 3200),
    },
    ("tiles", 64): {
        GemmConfig(256, 128, 128, 8, 3, 16, "warp"): Pace(650, 920, 1800, 2600),
        GemmConfig(192, 128, 128, 12, 4, 16, "warp"): Pace(440, 650, 3000, 2300),
        GemmConfig(128, 128, 128, 8, 4, 16, "warp"): Pace(320, 460, 2400, 2300),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(300, 290, 2900, 2500),
    },
    ("tiles", 32): {
        GemmConfig(256, 128, 128, 8, 3, 16, "warp"): Pace(570, 870, 600, 2000),
        GemmConfig(192, 128, 128, 12, 4, 16, "warp"): Pace(470, 720, 800, 2200),
        GemmConfig(128, 128, 128, 8, 4, 16, "warp"): Pace(370, 430, 1500, 2600),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(320, 620, 700, 3200),
    },
    ("rows_f8", 128): {
        GemmConfig(256, 128, 128, 8, 3, 16, "warp"): Pace(320, 620, 4500, 4400),
        GemmConfig(192, 128, 128, 12, 4, 16, "warp"): Pace(230, 420, 4500, 2000),
        GemmConfig(192, 128, 128, 12, 4, 4, "warp"): Pace(240, 430, 3900, 2000),
        GemmConfig(128, 128, 128, 8, 5, 16, "warp"): Pace(220, 320, 3500, 2700),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(220, 230, 3200, 3100),
    },
    ("rows_i8", None): {
        GemmConfig(192, 128, 128, 12, 4, 4, "warp"): Pace(210, 320, 4500, 2000),
        GemmConfig(128, 128, 128, 8, 5, 4, "warp"): Pace(160, 170, 4100, 2700),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(180, 240, 2700, 2600),
    },
}
"""Measured on an H100 and an H200; other kinds than `("tiles", 128)` on an H100 alone.

The kernel needs only one tile per multiprocessor. For large K, it is faster with fewer consecutive rows of tiles, so
its large tiles have two orders."""

SPLIT: Measured = {
    ("tiles", 128): {
        GemmConfig(64, 64, 128, 4, 8, 16, "split"): Pace(200, 220, 1300, 3000, 3300),
    },
}

GEMM.add(WarpGemm, by_kind(WARP), on="sm_90a")
GEMM.add(SplitGemm, by_kind(SPLIT), on="sm_90a")
