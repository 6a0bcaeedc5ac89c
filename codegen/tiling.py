"""From a problem to a configuration: which kernel variant, which tile, how many warps and stages.

All of it is arithmetic on sizes, so every choice can be tested, printed and explained without a GPU. Among the
configurations that `codegen.gemm_config` does not refuse, the one with the least estimated time wins.
"""

from collections.abc import Sequence
from typing import NamedTuple

from codegen.gemm_config import GemmConfig, GemmProblem, Kind, refusal
from qcompiler.errors import CodegenError

MOST_SPLITS = 16
"""Parts of K at most; their sums are added by one program, which holds them all."""

SHORTEST_SPLIT = 4
"""Blocks of K that a split has at least, so that its copies overlap."""


class Pace(NamedTuple):
    """Nanoseconds, measured on an H200.

    Attributes:
        alone: Of one step of K, of a tile that is alone on its multiprocessor, where waiting sets the pace.
        busy: Of one step of K, of each of many tiles that share a multiprocessor, where the tensor cores or the memory
            do.
        tail: Of what a multiprocessor does once a tile, beside its steps.
        sum: Of the kernel that adds the splits of K.
        bandwidth: Bytes of weights that come from memory in a nanosecond.
    """

    alone: int
    busy: int
    tail: int = 0
    sum: int = 0
    bandwidth: int = 3400


_MEASURED: dict[tuple[Kind, int | None], dict[GemmConfig, Pace]] = {
    ("tiles", 128): {
        GemmConfig(256, 128, 128, 8, 3, 16, "warp"): Pace(920, 920, 2000),
        GemmConfig(192, 128, 128, 12, 4, 16, "warp"): Pace(640, 640, 1300),
        GemmConfig(128, 128, 128, 8, 4, 16, "warp"): Pace(460, 495, 1100),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(290, 345, 1300),
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(460, 450, 1100, 2200, 4000),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(480, 470, 1100, 2200, 4000),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(490, 520, 1100, 2200, 3500),
        GemmConfig(64, 128, 128, 4, 3, 16, "tma"): Pace(357, 311, 650),
        GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): Pace(512, 330, 500),
        GemmConfig(64, 64, 128, 4, 3, 16, "pointers"): Pace(335, 206, 300),
        GemmConfig(64, 32, 128, 4, 4, 16, "pointers"): Pace(278, 195, 200),
    },
    ("tiles", 64): {
        GemmConfig(64, 128, 64, 4, 4, 16, "tma"): Pace(303, 180),
        GemmConfig(64, 128, 64, 4, 4, 16, "pointers"): Pace(335, 196),
        GemmConfig(64, 64, 64, 4, 5, 16, "pointers"): Pace(236, 122),
        GemmConfig(64, 32, 64, 4, 5, 16, "pointers"): Pace(229, 91),
    },
    ("tiles", 32): {
        GemmConfig(64, 128, 32, 4, 4, 16, "tma"): Pace(278, 166),
        GemmConfig(64, 128, 32, 4, 4, 16, "pointers"): Pace(247, 173),
        GemmConfig(64, 64, 32, 4, 5, 16, "pointers"): Pace(221, 115),
        GemmConfig(64, 32, 32, 4, 5, 16, "pointers"): Pace(215, 87),
    },
    ("rows_f8", 128): {
        GemmConfig(64, 128, 128, 4, 3, 16, "tma"): Pace(374, 258),
        GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): Pace(482, 332),
        GemmConfig(64, 64, 128, 4, 4, 16, "pointers"): Pace(342, 190),
        GemmConfig(64, 32, 128, 4, 5, 16, "pointers"): Pace(284, 148),
    },
    ("rows_i8", None): {
        GemmConfig(128, 128, 128, 4, 3, 16, "tma"): Pace(534, 392),
        GemmConfig(64, 128, 128, 4, 4, 16, "tma"): Pace(368, 234),
        GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): Pace(483, 264),
        GemmConfig(64, 64, 128, 4, 4, 16, "pointers"): Pace(372, 181),
        GemmConfig(64, 32, 128, 4, 5, 16, "pointers"): Pace(276, 147),
    },
}
"""The configurations that can be chosen, and how fast they are; `benchmarks/results/h200-gemm-tried.md` has the others.

Three portable tiles of one warpgroup fit on a multiprocessor, and one multiplies while another promotes; that is why
the usual 128 x 128 tile of two warpgroups, which move in step, is slower almost everywhere for FP8 and is not here. The
warp-specialized kernel needs one tile only. Narrow portable tiles wait longer through the copy engine than through
pointers."""


def all_configs(kind: Kind = "tiles", x_block: int = 128) -> Sequence[GemmConfig]:
    """Every configuration that `choose` can answer with for such problems; compiled ahead of time and tested."""
    return tuple(_candidates(GemmProblem(1, 1, 1, kind=kind, x_block=x_block)))


def _candidates(problem: GemmProblem) -> dict[GemmConfig, Pace]:
    return _MEASURED[problem.kind, problem.step]


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
    """Microseconds, roughly: the steps of K, times the pace of the multiprocessor that has the most tiles.

    Few rows take at least the time in which their weights are read.
    """
    pace = _candidates(problem)[config]
    depth = split_depth(config, problem.m, problem.n, problem.k, problem.sms)
    splits = ceil_div(ceil_div(problem.k, config.block_k), depth)
    rounds = ceil_div(tiles_of(config, problem.m, problem.n) * splits, problem.sms)
    step = pace.alone if rounds == 1 else max(pace.alone, rounds * pace.busy)
    if config.variant == "warp" and 2 * problem.m <= config.block_m:
        step *= 2  # the copy engine is slow in a tile of which half lies beyond its tensor
    steps = max(depth * step, problem.n * problem.k / pace.bandwidth)
    return (steps + rounds * pace.tail + (pace.sum if splits > 1 else 0)) / 1e3


def split_depth(config: GemmConfig, m: int, n: int, k: int, sms: int) -> int:
    """Steps of K in one split: all of them, unless the tile is narrow and there are too few to fill the device."""
    steps = ceil_div(k, config.block_k)
    if config.variant != "narrow":
        return steps
    splits = min(sms // tiles_of(config, m, n), steps // SHORTEST_SPLIT, MOST_SPLITS)
    return ceil_div(steps, max(splits, 1))


def tiles_of(config: GemmConfig, m: int, n: int) -> int:
    """How many tiles the output has."""
    return ceil_div(m, config.block_m) * ceil_div(n, config.block_n)


def bucket(m: int) -> int:
    """The number of rows that stands for `m` when a configuration is chosen and remembered.

    The next power of two; 16 at least, the rows of the least tile.
    """
    return 1 << max(4, (m - 1).bit_length())


def ceil_div(size: int, by: int) -> int:
    """How many parts of `by` cover `size`."""
    return -(-size // by)
