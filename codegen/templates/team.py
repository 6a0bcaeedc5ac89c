"""The Gluon kernel of the scaled matmul for few rows: the consumers divide K inside a tile."""

from codegen.kernels.team_gemm import team_gemm
from codegen.launching.launch import KernelCall
from codegen.templates.gemm import GEMM, GemmConfig, GemmOperands, Measured, Pace, by_kind, tiles_of
from codegen.templates.gemm_template import GluonGemmTemplate, spans
from codegen.templates.hopper import ONE_WARPGROUP, scale_columns, tile

REGISTERS_FOR_SUMS = {2: 192, 3: 112}
"""Consumers -> registers per consumer thread that sums may use; a thread has 232, or 152."""


class TeamGemm(GluonGemmTemplate):
    """One program per multiprocessor: a producer, and consumers that take alternate blocks of K of 64 rows."""

    variant = "team"
    overlaps = True

    def split_side(self, config: GemmConfig) -> tuple[str, int]:
        """Each consumer has all rows."""
        return "rows times consumers", config.block_m * max(config.consumers, 1)

    def registers(self, config: GemmConfig, whole: bool) -> tuple[int, int]:
        """See `GemmTemplate`."""
        tiles = 1 if whole else 2
        return tiles * config.block_m * config.block_n // 128, REGISTERS_FOR_SUMS.get(config.consumers, 0)

    def shared_memory(self, config: GemmConfig, out_bytes: int = 2, stage_scales: int = 1) -> int:
        """The ring, the output tile, and the sums of all consumers but the first."""
        others = 4 * max(config.consumers - 1, 0)
        return self.ring(config, stage_scales) + config.block_m * config.block_n * (out_bytes + others)

    def calls(self, config: GemmConfig, operands: GemmOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        x, w, out, x_scale, w_scale, bias, x_block, _ = operands
        assert x_block is not None, "the configurations are for scales inside the sum"
        m, n, k = operands.sizes
        arguments = (
            tile(x, config.box), tile(w, config.block_n), tile(out, 64, config.block_n),
            scale_columns(x_scale, config.box), w_scale, bias, m, n, k, *w_scale.stride(),
        )  # fmt: skip
        constants = {
            "TEAM": config.consumers, "STAGES": config.stages, "GROUP": config.group, "SPAN": spans(x_block)["SPAN"],
        }  # fmt: skip
        programs = min(self.limits.multiprocessors_of(x.device.index), tiles_of(config, m, n))
        return (KernelCall(team_gemm, programs, arguments, constants, ONE_WARPGROUP),)


TEAM: Measured = {
    ("tiles", 128): {
        GemmConfig(64, 32, 128, 12, 15, 16, "team"): Pace(140, 120, 2100, 3200),
        GemmConfig(64, 64, 128, 12, 9, 16, "team"): Pace(180, 170, 1500, 3100),
        GemmConfig(64, 128, 128, 8, 6, 16, "team"): Pace(250, 270, 900, 2800),
    },
}
"""Measured on an H200."""

GEMM.add(TeamGemm, by_kind(TEAM), on="sm_90a")
