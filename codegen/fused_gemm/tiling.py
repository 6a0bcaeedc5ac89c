"""Which products with a body the fused kernel runs, in which form, and where separate kernels are faster.

All of it is arithmetic on sizes, as in `codegen.gemm.tiling`. Times are those of one H200: `benchmarks/epilogues.py`.
"""

from dataclasses import dataclass
from typing import NamedTuple

from codegen.gemm.config import SHARED_MEMORY_LIMIT, GemmProblem
from codegen.gemm.tiling import ceil_div, choose, estimated_time

MOST_OTHERS = 2
"""Operands of a body beside the sums that the fused kernel has room for."""


@dataclass(frozen=True)
class FusedGemmProblem:
    """`body(x[m, k] @ w[parts n, k].T, others)`, FP8 tiles [1, 128] and blocks [128, 128], on one device.

    Attributes:
        m: Rows of x, 1 or more.
        n: Columns of the result.
        k: Depth.
        parts: Parts of w, one on the other, each of which is a sum that the body reads.
        handed_bytes: Bytes of an element of what the body rounds sums to first.
        out_bytes: Bytes of an element of the body's result.
        others: How many other operands it has.
        bias: Whether one is added to the sums.
        block: Rows and columns of a block in which the result is quantized, or None.
        sms: Multiprocessors of the device.
        aligned: x and w start at multiples of 16 bytes.
        scale_columns: The scales of x for one block of K follow each other, from a multiple of 16 bytes on.
    """

    m: int
    n: int
    k: int
    parts: int
    handed_bytes: int = 2
    out_bytes: int = 2
    others: int = 0
    bias: bool = False
    block: tuple[int, int] | None = (1, 128)
    sms: int = 132
    aligned: bool = True
    scale_columns: bool = True

    @property
    def product(self) -> GemmProblem:
        """The product alone."""
        rest = (self.sms, self.handed_bytes, self.aligned)
        return GemmProblem(self.m, self.parts * self.n, self.k, *rest, scale_columns=self.scale_columns)


@dataclass(frozen=True)
class FusedGemmConfig:
    """One compiled form of `codegen.kernels.fused_gemm`.

    Attributes:
        parts: Parts of the weight that a tile of the result is made of.
        waves: Units of 64 rows and one part that each of the two consumers owns.
        stages: Steps of K that are in shared memory at one time.
        group: Rows of tiles that follow each other.
    """

    parts: int
    waves: int
    stages: int
    group: int = 16

    @property
    def rows(self) -> int:
        """Rows of a tile; it has 128 columns."""
        return 128 * self.waves // self.parts

    def shared_memory(self, handed_bytes: int = 2) -> int:
        """An upper estimate of the shared memory of a block of threads, in bytes: ring, scales, sums handed over."""
        ring = self.stages * ((self.rows + 128 * self.parts) * 128 + 4 * max(self.rows, 32))
        return ring + 2 * self.waves * 64 * 128 * handed_bytes + 1024

    def __str__(self) -> str:
        return f"{self.rows}x{self.parts}x128, {self.stages} stages, groups of {self.group}"


class FusedPace(NamedTuple):
    """Nanoseconds of one form, fitted to measurements on an H200, with clocks as they are under sustained load.

    Attributes:
        alone: Of one step of K, of a tile that is alone on its multiprocessor.
        busy: Of one step of K, of each of many tiles.
        tail: Of what consumers do once a tile, beside its steps.
        finish: Of what nothing hides: the finishers' work on the last tile, and the launch.
        bandwidth: Bytes of weights that come from memory in a nanosecond.
    """

    alone: int
    busy: int
    tail: int
    finish: int
    bandwidth: int


_MEASURED = {
    FusedGemmConfig(2, 2, 3): FusedPace(700, 830, 1670, 2200, 3200),
    FusedGemmConfig(2, 1, 4): FusedPace(370, 455, 1680, 1280, 3050),
    FusedGemmConfig(1, 2, 3): FusedPace(715, 840, 2430, 7900, 3700),
    FusedGemmConfig(1, 1, 4): FusedPace(445, 500, 825, 1330, 3025),
}
"""The forms that can be chosen."""

LAUNCH = 2200
"""Nanoseconds that one kernel more costs, at the least."""

BANDWIDTH = 3400
"""Bytes in a nanosecond of a kernel that runs a body alone."""


def all_fused_configs() -> tuple[FusedGemmConfig, ...]:
    """Every form that `choose_fused` can answer with; compiled ahead of time and tested."""
    return tuple(_MEASURED)


def refusal(config: FusedGemmConfig, problem: FusedGemmProblem) -> str | None:
    """Why one form cannot run a problem, in a sentence without a final stop, or None if it can."""
    shared = config.shared_memory(problem.handed_bytes)
    rules = (
        (min(problem.m, problem.n, problem.k) < 1, f"{problem} has nothing to multiply"),
        (max(problem.m, problem.n * problem.parts, problem.k) >= 2**31, f"{problem} has a size beyond 32 bits"),
        (
            config.parts != problem.parts,
            f"its tiles are made of {config.parts} parts of the weight, here there are {problem.parts}",
        ),
        (
            problem.parts > 1 and problem.n % 128 != 0,
            f"each part of the weight must begin with a block of 128 rows, here they have {problem.n}",
        ),
        (
            problem.others > MOST_OTHERS,
            f"a body may read {MOST_OTHERS} operands beside the sums, this one reads {problem.others}",
        ),
        (
            problem.bias and config.parts * config.waves > 2,
            "its consumers have no registers for a bias beside two units of two parts",
        ),
        (
            problem.block not in (None, (1, 128)),
            f"a tile of the result holds whole blocks of [1, 128], not of {list(problem.block or ())}",
        ),
        (not problem.aligned, "the copy engine needs operands that start at a multiple of 16 bytes"),
        (problem.k % 16 != 0, f"the copy engine needs K to be a multiple of 16, it is {problem.k}"),
        (
            not problem.scale_columns,
            "the copy engine needs the activation's scales in columns that start at multiples of 16 bytes",
        ),
        (
            shared > SHARED_MEMORY_LIMIT,
            f"its ring, and sums of {problem.handed_bytes} bytes handed over, need {shared} bytes of shared memory, "
            f"a block may have {SHARED_MEMORY_LIMIT}",
        ),
    )
    return next((sentence for broken, sentence in rules if broken), None)


def choose_fused(problem: FusedGemmProblem) -> FusedGemmConfig | str:
    """The form with the least estimated time, or why separate kernels are to run the problem."""
    refusals = {config: refusal(config, problem) for config in _MEASURED}
    possible = [config for config, why in refusals.items() if why is None]
    if not possible:
        mine = [why for config, why in refusals.items() if config.parts == problem.parts]
        return str((mine or list(refusals.values()))[-1])
    best = min(possible, key=lambda config: fused_time(config, problem))
    fused, separate = fused_time(best, problem), separate_time(problem)
    if fused < separate:
        return best
    return f"separate kernels are estimated to take {separate:.1f} us, and one, {best}, {fused:.1f}"


def fused_time(config: FusedGemmConfig, problem: FusedGemmProblem) -> float:
    """Microseconds, roughly."""
    pace = _MEASURED[config]
    rounds = ceil_div(ceil_div(problem.m, config.rows) * ceil_div(problem.n, 128), problem.sms)
    step = pace.alone if rounds == 1 else pace.busy
    if 2 * problem.m <= config.rows:
        step *= 2  # the copy engine is slow in a tile of which half lies beyond its tensor
    weights = problem.parts * problem.n * problem.k / pace.bandwidth
    return (max(rounds * (ceil_div(problem.k, 128) * step + pace.tail), weights) + pace.finish) / 1e3


def separate_time(problem: FusedGemmProblem) -> float:
    """Microseconds, roughly, of the product and of a kernel that runs the body behind it."""
    elements = problem.m * problem.n
    read = elements * (problem.parts * problem.handed_bytes + problem.others * problem.out_bytes)
    written = elements * (problem.out_bytes if problem.block is None else 1)
    product = estimated_time(choose(problem.product), problem.product)
    return product + (LAUNCH + (read + written) / BANDWIDTH) / 1e3
