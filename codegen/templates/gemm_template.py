"""The common part of the scaled matmul templates; each variant defines the differences in its own file."""

from typing import Any, ClassVar

from torch import Tensor

from codegen.launching.launch import KernelCall
from codegen.templates.gemm import GemmConfig, GemmOperands, GemmProblem, Pace, tiles_of
from codegen.templates.template import Rule, Template, ceil_div, first_broken, next_power_of_2
from qcompiler.numerics import ALL

DEEPEST_INT8 = (2**31 - 1) // 127**2
"""The largest K whose sum of products of INT8 codes fits in 32 bits."""

MOST_SPLITS = 16
"""Maximum splits of K; one program adds their sums and holds all of them."""

SHORTEST_SPLIT = 4
"""Minimum blocks of K per split, so that its copies overlap."""

SUM_BLOCK = 512
"""Output elements per program that adds splits."""


class GemmTemplate(Template[GemmConfig, GemmProblem, GemmOperands]):
    """The common part of the variants.

    Attributes:
        splits: K is split if there are too few tiles for the device.
        together: Programs that run on a multiprocessor at once; the stages leave shared memory for as many.
        slow_when_half_empty: A tile of which half lies outside its tensor takes twice the time.
        copies: The copy engine loads the operands.
        stores: The copy engine stores the result.
        scale_copies: The copy engine loads the scales of the activation.
    """

    splits: ClassVar[bool] = False
    together: ClassVar[int] = 1
    slow_when_half_empty: ClassVar[bool] = False
    copies: ClassVar[bool] = True
    stores: ClassVar[bool] = True
    scale_copies: ClassVar[bool] = False

    def why_not(self, config: GemmConfig, problem: GemmProblem) -> str | None:
        """See `Template`."""
        return first_broken(
            (*self._sums(config, problem), *self._tiles(config, problem), *self._copies(config, problem))
        )

    def time(self, config: GemmConfig, problem: GemmProblem, pace: Pace) -> float:
        """Approximate microseconds: the steps of K times the pace of the multiprocessor with the most tiles.

        For few rows, at least the time to read the weights.
        """
        depth = self.split_depth(config, problem.m, problem.n, problem.k, problem.sms)
        splits = ceil_div(ceil_div(problem.k, config.block_k), depth)
        programs = ceil_div(tiles_of(config, problem.m, problem.n) * splits, problem.sms)
        step = pace.alone if programs == 1 else max(pace.alone, programs * pace.busy)
        if self.slow_when_half_empty and 2 * problem.m <= config.block_m:
            step *= 2
        steps = max(depth * step, problem.n * problem.k / pace.bandwidth)
        return (steps + ceil_div(programs, self.together) * pace.tail + (pace.sum if splits > 1 else 0)) / 1e3

    def split_depth(self, config: GemmConfig, m: int, n: int, k: int, sms: int) -> int:
        """Steps of K in one split: all of them, unless the kernel splits K and there are too few tiles for `sms`."""
        steps = ceil_div(k, config.block_k)
        if not self.splits:
            return steps
        splits = min(self.together * sms // tiles_of(config, m, n), steps // SHORTEST_SPLIT, MOST_SPLITS)
        return ceil_div(steps, max(splits, 1))

    def shared_memory(self, config: GemmConfig, out_bytes: int = 2, stage_scales: int = 1) -> int:
        """An upper estimate of the shared memory of a block, in bytes: the ring of operand tiles, and the output tile.

        Args:
            config: Any configuration.
            out_bytes: Bytes per element of the result.
            stage_scales: For a Gluon kernel, as in `GemmProblem`.
        """
        return self.ring(config, stage_scales) + config.block_m * config.block_n * out_bytes

    def ring(self, config: GemmConfig, stage_scales: int) -> int:
        """Bytes of the stages, the barriers, and the column scales or biases."""
        return config.stages * (config.block_m + config.block_n) * config.block_k + 2048

    def registers(self, config: GemmConfig, whole: bool) -> tuple[int, int]:
        """Registers per thread for the tile of sums and, unless the tensor cores keep the `whole` sum, for one step.

        Returns:
            That number, and how many of a thread's 255 registers may be used without spilling.
        """
        return _shared_out(config, config.block_m + (0 if whole else config.block_m)), 160

    def step_rule(self, config: GemmConfig, problem: GemmProblem) -> Rule:
        """Requirements on the step of K."""
        step = problem.step
        why = "a scale spans" if problem.kind == "tiles" else "FP8 sums are promoted every"
        broken = step is not None and config.block_k != step
        return broken, f"{why} {step} of K, the step is {config.block_k}"

    def split_side(self, config: GemmConfig) -> tuple[str, int]:
        """The side of the tile that is divided among the warpgroups."""
        return "rows", config.block_m

    def written_bytes(self, problem: GemmProblem) -> int:
        """Bytes per element that the kernel stores."""
        return problem.out_bytes

    def _sums(self, config: GemmConfig, problem: GemmProblem) -> tuple[Rule, ...]:
        """Requirements of the sizes and the scales."""
        return (
            (min(problem.m, problem.n, problem.k) < 1, f"{problem} has nothing to multiply"),
            (max(problem.m, problem.n, problem.k) >= 2**31, f"{problem} has a size beyond 32 bits"),
            (
                problem.kind == "rows_i8" and problem.k > DEEPEST_INT8,
                f"a sum of {problem.k} products of INT8 codes can exceed 32 bits, K may be at most {DEEPEST_INT8}",
            ),
            self.step_rule(config, problem),
            (
                problem.kind == "tiles" and 128 % config.block_n != 0,
                f"a tile {config.block_n} wide does not divide the 128 columns of a weight scale",
            ),
        )

    def _tiles(self, config: GemmConfig, problem: GemmProblem) -> tuple[Rule, ...]:
        """Limits of a multiprocessor."""
        whole = problem.kind == "rows_i8"
        limits, (side, got) = self.limits, self.split_side(config)
        needed = max(config.consumers * 64, 64)
        tiles = "one INT32 tile takes" if whole else "two FP32 tiles take"
        registers, most = self.registers(config, whole)
        shared = self.shared_memory(config, self.written_bytes(problem), problem.stage_scales)
        return (
            (config.warps % 4 != 0, f"{config.warps} warps are not a whole number of warpgroups of 4"),
            (got % needed != 0, f"{config.warps} warps need a multiple of {needed} {side}, the tile has {got}"),
            (registers > most, f"{tiles} {registers} registers per thread, the limit is {most}"),
            (
                shared > limits.shared_memory,
                f"{config.stages} stages need {shared} bytes of shared memory, a block may use {limits.shared_memory}",
            ),
        )

    def _copies(self, config: GemmConfig, problem: GemmProblem) -> tuple[Rule, ...]:
        """Requirements of the copy engine."""
        out_row, unit = problem.n * problem.out_bytes, self.limits.copy_alignment
        return (
            (
                self.copies and not problem.aligned,
                f"the copy engine needs operands that start at a multiple of {unit} bytes",
            ),
            (
                self.copies and problem.k % unit != 0,
                f"the copy engine needs K to be a multiple of {unit}, got {problem.k}",
            ),
            (
                self.stores and out_row % unit != 0,
                f"the copy engine needs output rows of a multiple of {unit} bytes, they have {out_row}",
            ),
            (
                self.scale_copies and problem.kind == "tiles" and not problem.scale_columns,
                f"the copy engine needs the activation's scales in columns that start at multiples of {unit} bytes",
            ),
        )


class GluonGemmTemplate(GemmTemplate):
    """A template whose kernel has a ring of stages of 128 of K, with the activation scales of each stage."""

    scale_copies = True

    def step_rule(self, config: GemmConfig, problem: GemmProblem) -> Rule:
        """Narrower scales are applied in steps inside a stage."""
        return config.block_k != 128, f"the Gluon kernels have stages of 128 of K, here it is {config.block_k}"

    def ring(self, config: GemmConfig, stage_scales: int) -> int:
        """Bytes of the stages, the barriers, and the column scales or biases."""
        return super().ring(config, stage_scales) + config.stages * 4 * max(config.block_m, 32) * stage_scales


def spans(x_block: int) -> dict[str, int]:
    """For the Gluon kernels: how many blocks of 128 a scale of x spans, and how many scales one block has."""
    if x_block == ALL:
        return {"SPAN": 1 << 30, "SUBS": 1}
    return {"SPAN": max(x_block // 128, 1), "SUBS": max(128 // x_block, 1)}


def add_splits(kernel: Any, arguments: tuple[Any, ...], out: Tensor, splits: int) -> KernelCall:
    """The call of a kernel that adds the sums of the splits of K into `out`."""
    constants = {"SPLITS": next_power_of_2(splits), "BLOCK": SUM_BLOCK}
    return KernelCall(kernel, ceil_div(out.numel(), SUM_BLOCK), arguments, constants, {"num_warps": 4})


def _shared_out(config: GemmConfig, rows: int) -> int:
    """Registers per thread for 32-bit sums of that many rows of the tile."""
    return rows * config.block_n // (config.warps * 32)
