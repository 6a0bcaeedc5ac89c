"""From a problem to a configuration: which kernel variant, which tile, how many warps and stages.

All of it is arithmetic on sizes, so every choice can be tested, printed and explained without a GPU. A configuration
that cannot run a problem is refused with a sentence that says why; among the others the one with the least estimated
time wins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qcompiler.errors import CodegenError

SHARED_MEMORY_LIMIT = 232448
"""Bytes of shared memory that one block may have on Hopper."""

REGISTERS_FOR_ACCUMULATORS = 160
"""Of a thread's 255 registers, those that two FP32 tiles, the sum and one product, may take without spilling."""


@dataclass(frozen=True)
class GemmProblem:
    """`out[m, n] = x[m, k] @ w[n, k].T`, both FP8 with block scales, on one device.

    Attributes:
        m: Rows of x, 1 or more.
        n: Rows of w.
        k: Depth.
        sms: Multiprocessors of the device.
        out_bytes: Bytes of an element of the result.
        aligned: x and w start at multiples of 16 bytes.
    """

    m: int
    n: int
    k: int
    sms: int = 132
    out_bytes: int = 2
    aligned: bool = True


@dataclass(frozen=True)
class GemmConfig:
    """One compiled kernel: a variant, its tile, and how it is pipelined.

    Attributes:
        block_m: Rows of the output tile.
        block_n: Columns of the output tile.
        block_k: Depth of a step, which is the depth of a scale.
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


@dataclass(frozen=True)
class QuantizeConfig:
    """The tile of the quantization kernel: rows, and the warps that share them."""

    block_m: int
    warps: int


_MEASURED = {
    GemmConfig(64, 128, 128, 4, 3, 16, "tma"): (357, 311),
    GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): (512, 330),
    GemmConfig(64, 64, 128, 4, 3, 16, "pointers"): (335, 206),
    GemmConfig(64, 32, 128, 4, 4, 16, "pointers"): (278, 195),
}
"""Nanoseconds that one step of K takes on an H200: of a tile that is alone on its multiprocessor, where waiting sets
the pace, and of each of many tiles that share one, where the tensor cores or the memory do. Three tiles of one
warpgroup fit on a multiprocessor, and one multiplies while another promotes; that is why the usual 128 x 128 tile of
two warpgroups, which move in step, is slower almost everywhere and is not here. Narrow tiles wait longer through the
copy engine than through pointers."""


def all_configs() -> Sequence[GemmConfig]:
    """Every configuration that `choose` can ever answer with; what is compiled ahead of time and tested."""
    return tuple(_MEASURED)


def refusal(config: GemmConfig, problem: GemmProblem) -> str | None:
    """Why `config` cannot run `problem`, in one sentence without a final stop, or None if it can."""
    rows_needed = config.warps // 4 * 64
    accumulators = 2 * config.block_m * config.block_n // (config.warps * 32)
    shared = config.shared_memory(problem.out_bytes)
    out_row = problem.n * problem.out_bytes
    tma = config.variant == "tma"
    rules = (
        (min(problem.m, problem.n, problem.k) < 1, f"{problem} has nothing to multiply"),
        (max(problem.m, problem.n, problem.k) >= 2**31, f"{problem} has a size beyond 32 bits"),
        (config.block_k != 128, f"a scale spans 128 of K, the step is {config.block_k}"),
        (128 % config.block_n != 0, f"a tile {config.block_n} wide does not divide the 128 columns of a weight scale"),
        (config.warps % 4 != 0, f"{config.warps} warps are no whole number of warpgroups of 4"),
        (
            config.block_m % max(rows_needed, 64) != 0,
            f"{config.warps} warps need a multiple of {max(rows_needed, 64)} rows, the tile has {config.block_m}",
        ),
        (
            accumulators > REGISTERS_FOR_ACCUMULATORS,
            f"two FP32 tiles take {accumulators} registers of a thread, {REGISTERS_FOR_ACCUMULATORS} are to be had",
        ),
        (
            shared > SHARED_MEMORY_LIMIT,
            f"{config.stages} stages need {shared} bytes of shared memory, a block may have {SHARED_MEMORY_LIMIT}",
        ),
        (tma and not problem.aligned, "the copy engine needs operands that start at a multiple of 16 bytes"),
        (tma and problem.k % 16 != 0, f"the copy engine needs K to be a multiple of 16, it is {problem.k}"),
        (
            tma and out_row % 16 != 0,
            f"the copy engine needs output rows of a multiple of 16 bytes, they have {out_row}",
        ),
    )
    return next((sentence for broken, sentence in rules if broken), None)


def choose(problem: GemmProblem) -> GemmConfig:
    """The configuration with the least estimated time among those that are not refused.

    Raises:
        CodegenError: Every configuration is refused; the message has each one's reason.
    """
    refusals = {config: refusal(config, problem) for config in _MEASURED}
    possible = [config for config, why in refusals.items() if why is None]
    if not possible:
        reasons = "; ".join(f"{config}: {why}" for config, why in refusals.items())
        raise CodegenError("no kernel configuration can run this product", got=problem, fix=f"Refused: {reasons}.")
    return min(possible, key=lambda config: estimated_time(config, problem))


def estimated_time(config: GemmConfig, problem: GemmProblem) -> float:
    """Microseconds, roughly: the steps of K, times the pace of the multiprocessor that has the most tiles."""
    latency, busy = _MEASURED[config]
    tiles = ceil_div(problem.m, config.block_m) * ceil_div(problem.n, config.block_n)
    return ceil_div(problem.k, config.block_k) * max(latency, ceil_div(tiles, problem.sms) * busy) / 1e3


def bucket(m: int) -> int:
    """The number of rows that stands for `m` when a configuration is chosen and remembered.

    The next power of two; 64 at least, because the tensor cores work on 64 rows anyway.
    """
    return 1 << max(6, (m - 1).bit_length())


def quantize_config(m: int, block_k: int) -> QuantizeConfig:
    """The tile for quantizing `m` rows in blocks of `block_k`: many small ones while the device is not full."""
    elements = 4096 if m > 512 else 1024
    return QuantizeConfig(max(elements // block_k, 1), 4 if m > 512 else 1)


def ceil_div(size: int, by: int) -> int:
    """How many parts of `by` cover `size`."""
    return -(-size // by)
