"""From a problem to a configuration: which kernel variant, which tile, how many warps and stages.

All of it is arithmetic on sizes, so every choice can be tested, printed and explained without a GPU. A configuration
that cannot run a problem is refused with a sentence that says why; among the others the one with the least estimated
time wins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qcompiler.errors import CodegenError
from qcompiler.numerics import ALL

SHARED_MEMORY_LIMIT = 232448
"""Bytes of shared memory that one block may have on Hopper."""

REGISTERS_FOR_ACCUMULATORS = 160
"""Of a thread's 255 registers, those that the tiles of 32-bit sums may take without spilling."""

DEEPEST_INT8 = (2**31 - 1) // 127**2
"""The largest K whose sum of products of INT8 codes fits 32 bits."""

Kind = Literal["tiles", "rows_f8", "rows_i8"]
"""Which family of kernels runs a product: scales inside the sum, or at its end, and then of which element type."""


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
    """

    m: int
    n: int
    k: int
    sms: int = 132
    out_bytes: int = 2
    aligned: bool = True
    kind: Kind = "tiles"
    x_block: int = 128

    @property
    def step(self) -> int | None:
        """The depth of K after which sums must be scaled or promoted; None where the tensor cores keep them."""
        if self.kind == "rows_i8":
            return None
        return 128 if self.kind == "rows_f8" or self.x_block == ALL else min(self.x_block, 128)


@dataclass(frozen=True)
class GemmConfig:
    """One compiled kernel: a variant, its tile, and how it is pipelined.

    Attributes:
        block_m: Rows of the output tile.
        block_n: Columns of the output tile.
        block_k: Depth of a step.
        warps: Warps of a block; each group of 4 is one warpgroup and needs 64 rows.
        stages: Steps of K that are in shared memory at one time.
        group: Rows of tiles that follow each other in launch order.
        variant: `"tma"` or `"pointers"`.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int
    variant: Literal["tma", "pointers"]

    def shared_memory(self, out_bytes: int = 2) -> int:
        """An upper estimate of the shared memory of a block, in bytes.

        The ring of operand tiles, its barriers, and the output tile, which the copy engine stores from there.
        """
        ring = self.stages * (self.block_m + self.block_n) * self.block_k
        return ring + self.block_m * self.block_n * out_bytes + 1024

    def __str__(self) -> str:
        return (
            f"{self.variant} {self.block_m}x{self.block_n}x{self.block_k}, "
            f"{self.warps} warps, {self.stages} stages, groups of {self.group}"
        )


_MEASURED: dict[tuple[Kind, int | None], dict[GemmConfig, tuple[int, int]]] = {
    ("tiles", 128): {
        GemmConfig(64, 128, 128, 4, 3, 16, "tma"): (357, 311),
        GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): (512, 330),
        GemmConfig(64, 64, 128, 4, 3, 16, "pointers"): (335, 206),
        GemmConfig(64, 32, 128, 4, 4, 16, "pointers"): (278, 195),
    },
    ("tiles", 64): {
        GemmConfig(64, 128, 64, 4, 4, 16, "tma"): (303, 180),
        GemmConfig(64, 128, 64, 4, 4, 16, "pointers"): (335, 196),
        GemmConfig(64, 64, 64, 4, 5, 16, "pointers"): (236, 122),
        GemmConfig(64, 32, 64, 4, 5, 16, "pointers"): (229, 91),
    },
    ("tiles", 32): {
        GemmConfig(64, 128, 32, 4, 4, 16, "tma"): (278, 166),
        GemmConfig(64, 128, 32, 4, 4, 16, "pointers"): (247, 173),
        GemmConfig(64, 64, 32, 4, 5, 16, "pointers"): (221, 115),
        GemmConfig(64, 32, 32, 4, 5, 16, "pointers"): (215, 87),
    },
    ("rows_f8", 128): {
        GemmConfig(64, 128, 128, 4, 3, 16, "tma"): (374, 258),
        GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): (482, 332),
        GemmConfig(64, 64, 128, 4, 4, 16, "pointers"): (342, 190),
        GemmConfig(64, 32, 128, 4, 5, 16, "pointers"): (284, 148),
    },
    ("rows_i8", None): {
        GemmConfig(128, 128, 128, 4, 3, 16, "tma"): (534, 392),
        GemmConfig(64, 128, 128, 4, 4, 16, "tma"): (368, 234),
        GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): (483, 264),
        GemmConfig(64, 64, 128, 4, 4, 16, "pointers"): (372, 181),
        GemmConfig(64, 32, 128, 4, 5, 16, "pointers"): (276, 147),
    },
}
"""Nanoseconds that one step of K takes on an H200: of a tile that is alone on its multiprocessor, where waiting sets
the pace, and of each of many tiles that share one, where the tensor cores or the memory do. Three tiles of one
warpgroup fit on a multiprocessor, and one multiplies while another promotes; that is why the usual 128 x 128 tile of
two warpgroups, which move in step, is slower almost everywhere for FP8 and is not here. Narrow tiles wait longer
through the copy engine than through pointers."""


def all_configs(kind: Kind = "tiles", x_block: int = 128) -> Sequence[GemmConfig]:
    """Every configuration that `choose` can answer with for such problems; compiled ahead of time and tested."""
    return tuple(_candidates(GemmProblem(1, 1, 1, kind=kind, x_block=x_block)))


def _candidates(problem: GemmProblem) -> dict[GemmConfig, tuple[int, int]]:
    return _MEASURED[problem.kind, problem.step]


def refusal(config: GemmConfig, problem: GemmProblem) -> str | None:
    """Why `config` cannot run `problem`, in one sentence without a final stop, or None if it can."""
    rules = (*_rules_of_sums(config, problem), *_rules_of_tiles(config, problem), *_rules_of_copies(config, problem))
    return next((sentence for broken, sentence in rules if broken), None)


def _rules_of_sums(config: GemmConfig, problem: GemmProblem) -> tuple[tuple[bool, str], ...]:
    """What the sizes and the scales ask for."""
    kind, step = problem.kind, problem.step
    why = "a scale spans" if kind == "tiles" else "FP8 sums are promoted every"
    return (
        (min(problem.m, problem.n, problem.k) < 1, f"{problem} has nothing to multiply"),
        (max(problem.m, problem.n, problem.k) >= 2**31, f"{problem} has a size beyond 32 bits"),
        (
            kind == "rows_i8" and problem.k > DEEPEST_INT8,
            f"a sum of {problem.k} products of INT8 codes can pass 32 bits, K may be {DEEPEST_INT8} at most",
        ),
        (step is not None and config.block_k != step, f"{why} {step} of K, the step is {config.block_k}"),
        (
            kind == "tiles" and 128 % config.block_n != 0,
            f"a tile {config.block_n} wide does not divide the 128 columns of a weight scale",
        ),
    )


def _rules_of_tiles(config: GemmConfig, problem: GemmProblem) -> tuple[tuple[bool, str], ...]:
    """What a multiprocessor has room for."""
    rows_needed = max(config.warps // 4 * 64, 64)
    count, tiles = (1, "one INT32 tile takes") if problem.kind == "rows_i8" else (2, "two FP32 tiles take")
    accumulators = count * config.block_m * config.block_n // (config.warps * 32)
    shared = config.shared_memory(problem.out_bytes)
    return (
        (config.warps % 4 != 0, f"{config.warps} warps are no whole number of warpgroups of 4"),
        (
            config.block_m % rows_needed != 0,
            f"{config.warps} warps need a multiple of {rows_needed} rows, the tile has {config.block_m}",
        ),
        (
            accumulators > REGISTERS_FOR_ACCUMULATORS,
            f"{tiles} {accumulators} registers of a thread, {REGISTERS_FOR_ACCUMULATORS} are to be had",
        ),
        (
            shared > SHARED_MEMORY_LIMIT,
            f"{config.stages} stages need {shared} bytes of shared memory, a block may have {SHARED_MEMORY_LIMIT}",
        ),
    )


def _rules_of_copies(config: GemmConfig, problem: GemmProblem) -> tuple[tuple[bool, str], ...]:
    """What the copy engine can address."""
    out_row = problem.n * problem.out_bytes
    tma = config.variant == "tma"
    return (
        (tma and not problem.aligned, "the copy engine needs operands that start at a multiple of 16 bytes"),
        (tma and problem.k % 16 != 0, f"the copy engine needs K to be a multiple of 16, it is {problem.k}"),
        (
            tma and out_row % 16 != 0,
            f"the copy engine needs output rows of a multiple of 16 bytes, they have {out_row}",
        ),
    )


def choose(problem: GemmProblem) -> GemmConfig:
    """The configuration with the least estimated time among those that are not refused.

    Raises:
        CodegenError: Every configuration is refused; the message has each one's reason.
    """
    refusals = {config: refusal(config, problem) for config in _candidates(problem)}
    possible = [config for config, why in refusals.items() if why is None]
    if not possible:
        reasons = "; ".join(f"{config}: {why}" for config, why in refusals.items())
        raise CodegenError("no kernel configuration can run this product", got=problem, fix=f"Refused: {reasons}.")
    return min(possible, key=lambda config: estimated_time(config, problem))


def estimated_time(config: GemmConfig, problem: GemmProblem) -> float:
    """Microseconds, roughly: the steps of K, times the pace of the multiprocessor that has the most tiles."""
    latency, busy = _candidates(problem)[config]
    tiles = ceil_div(problem.m, config.block_m) * ceil_div(problem.n, config.block_n)
    return ceil_div(problem.k, config.block_k) * max(latency, ceil_div(tiles, problem.sms) * busy) / 1e3


def bucket(m: int) -> int:
    """The number of rows that stands for `m` when a configuration is chosen and remembered.

    The next power of two; 64 at least, because the tensor cores work on 64 rows anyway.
    """
    return 1 << max(6, (m - 1).bit_length())


def ceil_div(size: int, by: int) -> int:
    """How many parts of `by` cover `size`."""
    return -(-size // by)
