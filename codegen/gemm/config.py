"""What a product on a GPU is, what one compiled kernel for it is, and why a kernel cannot run a product.

All of it is arithmetic on sizes. A configuration that cannot run a problem is refused with a sentence that says why.
"""

from dataclasses import dataclass
from typing import Literal

from qcompiler.numerics import ALL

SHARED_MEMORY_LIMIT = 232448
"""Bytes of shared memory that one block may have on Hopper."""

REGISTERS_FOR_ACCUMULATORS = 160
"""Of a thread's 255 registers, those that the tiles of 32-bit sums may take without spilling."""

REGISTERS_OF_CONSUMERS = {1: 192, 2: 192, 3: 128}
"""The same by the number of consumers of the warp-specialized kernel, whose threads have 232 and 160 registers."""

DEEPEST_INT8 = (2**31 - 1) // 127**2
"""The largest K whose sum of products of INT8 codes fits 32 bits."""

Kind = Literal["tiles", "rows_f8", "rows_i8"]
"""Which family of kernels runs a product: scales inside the sum, or at its end, and then of which element type."""

Variant = Literal["tma", "pointers", "warp", "split", "narrow"]
"""Which kernel of a family: a portable one on pointers, for scales inside the sum another one with the copy engine, and
the Gluon kernels for many rows, for less of them with K split, and for few."""

WARP: tuple[Variant, ...] = ("warp", "split")
"""The warp-specialized kernel."""

GLUON: tuple[Variant, ...] = (*WARP, "narrow")


@dataclass(frozen=True)
class GemmProblem:
    """`out[m, n] = x[m, k] @ w[n, k].T`, both in 8 bits with scales, on one device.

    Attributes:
        m: Rows of x, 1 or more.
        n: Rows of w.
        k: Depth.
        sms: Multiprocessors of the device.
        out_bytes: Bytes of an element of the result.
        aligned: x and w start at multiples of 16 bytes.
        kind: What the scales are and how sums are made.
        x_block: For `"tiles"`, columns of x that share a scale, or `ALL`.
        scale_columns: The scales of x for one block of K follow each other, from a multiple of 16 bytes on.
    """

    m: int
    n: int
    k: int
    sms: int = 132
    out_bytes: int = 2
    aligned: bool = True
    kind: Kind = "tiles"
    x_block: int = 128
    scale_columns: bool = True

    @property
    def step(self) -> int | None:
        """The depth of K after which sums must be scaled or promoted; None where the tensor cores keep them."""
        if self.kind == "rows_i8":
            return None
        return 128 if self.kind == "rows_f8" or self.x_block == ALL else min(self.x_block, 128)

    @property
    def stage_scales(self) -> int:
        """Scales of each row of x that a Gluon kernel has in shared memory for 128 of K."""
        return 0 if self.kind != "tiles" else 128 // (self.step or 128)


@dataclass(frozen=True)
class GemmConfig:
    """One compiled kernel: a variant, its tile, and how it is pipelined.

    Attributes:
        block_m: Rows of the output tile.
        block_n: Columns of the output tile.
        block_k: Depth of a step.
        warps: Warps that multiply; each group of 4 is one warpgroup and needs 64 rows, or, of a narrow tile, columns.
        stages: Steps of K that are in shared memory at one time.
        group: Rows of tiles that follow each other in launch order.
        variant: `"tma"`, `"pointers"`, `"warp"` (`codegen.kernels.warp_gemm`, `…warp_row_gemm`), `"split"` (the former
            with K split where there are too few tiles) or `"narrow"` (`…narrow_gemm`, `…narrow_row_gemm`).
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int
    variant: Variant

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.warps // 4

    @property
    def box(self) -> int:
        """Rows of x that one copy of a Gluon kernel brings, a power of two."""
        return self.block_m if self.block_m & (self.block_m - 1) == 0 else 64

    def shared_memory(self, out_bytes: int = 2, stage_scales: int = 1) -> int:
        """An upper estimate of the shared memory of a block, in bytes.

        The ring of operand tiles, in the Gluon kernels with scales of x beside them, its barriers, and the output tile,
        which the copy engine stores from there; consumers have `out_buffers`, narrow tiles none.

        Args:
            out_bytes: Bytes of an element of the result.
            stage_scales: Of a Gluon kernel, as in `GemmProblem`.
        """
        rows = 64 * self.consumers * self.out_buffers(out_bytes, stage_scales) if self.variant in WARP else self.block_m
        written = 0 if self.variant == "narrow" else rows * self.block_n * out_bytes
        return self._ring(stage_scales) + written

    def out_buffers(self, out_bytes: int = 2, stage_scales: int = 1) -> int:
        """How many times 64 rows of output each consumer has room for: one for each of its waves if all fit, or one."""
        waves = max(self.block_m // max(self.consumers, 1) // 64, 1)
        written = 64 * self.consumers * waves * self.block_n * out_bytes
        return waves if self._ring(stage_scales) + written <= SHARED_MEMORY_LIMIT else 1

    def _ring(self, stage_scales: int) -> int:
        """Bytes of the stages, and of barriers and scales or biases of columns."""
        scales = 4 * max(self.block_m, 32) * stage_scales if self.variant in GLUON else 0
        return self.stages * ((self.block_m + self.block_n) * self.block_k + scales) + 2048

    def registers(self, whole: bool) -> int:
        """Registers of a thread for the tile of sums and, unless the tensor cores keep the `whole` sum, for a step's.

        A consumer of the warp-specialized kernel makes 64 rows in a step.
        """
        rows = 0 if whole else min(self.block_m, 64 * self.consumers) if self.variant in WARP else self.block_m
        return (self.block_m + rows) * self.block_n // (self.warps * 32)

    def __str__(self) -> str:
        return (
            f"{self.variant} {self.block_m}x{self.block_n}x{self.block_k}, "
            f"{self.warps} warps, {self.stages} stages, groups of {self.group}"
        )


def refusal(config: GemmConfig, problem: GemmProblem) -> str | None:
    """Why `config` cannot run `problem`, in one sentence without a final stop, or None if it can."""
    rules = (*_rules_of_sums(config, problem), *_rules_of_tiles(config, problem), *_rules_of_copies(config, problem))
    return next((sentence for broken, sentence in rules if broken), None)


def _rules_of_sums(config: GemmConfig, problem: GemmProblem) -> tuple[tuple[bool, str], ...]:
    """What the sizes and the scales ask for."""
    kind, step = problem.kind, problem.step
    why = "a scale spans" if kind == "tiles" else "FP8 sums are promoted every"
    gluon = config.variant in GLUON  # narrower scales are steps inside a stage
    return (
        (min(problem.m, problem.n, problem.k) < 1, f"{problem} has nothing to multiply"),
        (max(problem.m, problem.n, problem.k) >= 2**31, f"{problem} has a size beyond 32 bits"),
        (
            kind == "rows_i8" and problem.k > DEEPEST_INT8,
            f"a sum of {problem.k} products of INT8 codes can pass 32 bits, K may be {DEEPEST_INT8} at most",
        ),
        (
            step is not None and config.block_k != step and not gluon,
            f"{why} {step} of K, the step is {config.block_k}",
        ),
        (gluon and config.block_k != 128, f"the Gluon kernels have stages of 128 of K, here it is {config.block_k}"),
        (
            kind == "tiles" and 128 % config.block_n != 0,
            f"a tile {config.block_n} wide does not divide the 128 columns of a weight scale",
        ),
    )


def _rules_of_tiles(config: GemmConfig, problem: GemmProblem) -> tuple[tuple[bool, str], ...]:
    """What a multiprocessor has room for."""
    narrow, whole = config.variant == "narrow", problem.kind == "rows_i8"
    needed, side, got = (
        max(config.consumers * 64, 64),
        *(("columns", config.block_n) if narrow else ("rows", config.block_m)),
    )
    tiles = "one INT32 tile takes" if whole else "two FP32 tiles take"
    accumulators, limit = config.registers(whole), REGISTERS_FOR_ACCUMULATORS
    if config.variant in WARP:
        limit = REGISTERS_OF_CONSUMERS.get(config.consumers, 0)
    out_bytes = 4 if config.variant == "split" else problem.out_bytes  # those of a split's sums
    shared = config.shared_memory(out_bytes, problem.stage_scales)
    return (
        (config.warps % 4 != 0, f"{config.warps} warps are no whole number of warpgroups of 4"),
        (got % needed != 0, f"{config.warps} warps need a multiple of {needed} {side}, the tile has {got}"),
        (accumulators > limit, f"{tiles} {accumulators} registers of a thread, {limit} are to be had"),
        (
            shared > SHARED_MEMORY_LIMIT,
            f"{config.stages} stages need {shared} bytes of shared memory, a block may have {SHARED_MEMORY_LIMIT}",
        ),
    )


def _rules_of_copies(config: GemmConfig, problem: GemmProblem) -> tuple[tuple[bool, str], ...]:
    """What the copy engine can address."""
    out_row = problem.n * problem.out_bytes
    copies, gluon = config.variant != "pointers", config.variant in GLUON
    return (
        (copies and not problem.aligned, "the copy engine needs operands that start at a multiple of 16 bytes"),
        (copies and problem.k % 16 != 0, f"the copy engine needs K to be a multiple of 16, it is {problem.k}"),
        (
            config.variant in ("tma", *WARP) and out_row % 16 != 0,
            f"the copy engine needs output rows of a multiple of 16 bytes, they have {out_row}",
        ),
        (
            gluon and problem.kind == "tiles" and not problem.scale_columns,
            "the copy engine needs the activation's scales in columns that start at multiples of 16 bytes",
        ),
    )
