"""From a problem to a configuration: which kernel variant, which tile, how many warps and stages.

All of it is arithmetic on sizes, so every choice can be tested, printed and explained without a GPU. Among the
configurations that `codegen.gemm.config` does not refuse, the one with the least estimated time wins.
"""

from collections.abc import Sequence
from typing import NamedTuple

from codegen.gemm.config import GemmConfig, GemmProblem, Kind, refusal
from qcompiler.errors import CodegenError

MOST_SPLITS = 16
"""Parts of K at most; their sums are added by one program, which holds them all."""

SHORTEST_SPLIT = 4
"""Blocks of K that a split has at least, so that its copies overlap."""


class Pace(NamedTuple):
    """Nanoseconds on an H200, fitted to the times of `benchmarks/heuristic.py`.

    Attributes:
        alone: Of one step of K, of a tile that is alone on its multiprocessor, where waiting sets the pace.
        busy: Of one step of K, of each of many tiles that share a multiprocessor, where the tensor cores or the memory
            do.
        tail: Of what a multiprocessor does once a tile, beside its steps.
        bandwidth: Bytes of weights that come from memory in a nanosecond.
        sum: Of the kernel that adds the splits of K of a narrow tile.
    """

    alone: int
    busy: int
    tail: int
    bandwidth: int
    sum: int = 0


_MEASURED: dict[tuple[Kind, int | None], dict[GemmConfig, Pace]] = {
    ("tiles", 128): {
        GemmConfig(256, 128, 128, 8, 3, 16, "warp"): Pace(800, 780, 2600, 2500),
        GemmConfig(192, 128, 128, 12, 4, 16, "warp"): Pace(510, 550, 1500, 2500),
        GemmConfig(128, 128, 128, 8, 4, 16, "warp"): Pace(370, 410, 1100, 3200),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(310, 270, 1400, 3200),
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(390, 230, 1600, 4100, 2300),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(430, 300, 1200, 4000, 3100),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(460, 360, 2000, 3600, 3100),
        GemmConfig(64, 128, 128, 4, 3, 16, "tma"): Pace(540, 260, 600, 3100),
        GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): Pace(600, 400, 1100, 3800),
        GemmConfig(64, 64, 128, 4, 3, 16, "pointers"): Pace(530, 210, 400, 4000),
        GemmConfig(64, 32, 128, 4, 4, 16, "pointers"): Pace(430, 170, 500, 3200),
    },
    ("tiles", 64): {
        GemmConfig(256, 128, 128, 8, 3, 16, "warp"): Pace(1000, 940, 2700, 4000),
        GemmConfig(192, 128, 128, 12, 4, 16, "warp"): Pace(680, 690, 2000, 2500),
        GemmConfig(128, 128, 128, 8, 4, 16, "warp"): Pace(490, 500, 2000, 3200),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(330, 290, 3800, 3900),
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(430, 290, 1800, 3900, 2500),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(460, 310, 3200, 4000, 1500),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(620, 490, 1700, 3200, 2900),
        GemmConfig(64, 128, 64, 4, 4, 16, "tma"): Pace(280, 180, 1200, 3000),
        GemmConfig(64, 128, 64, 4, 4, 16, "pointers"): Pace(370, 230, 600, 2500),
        GemmConfig(64, 64, 64, 4, 5, 16, "pointers"): Pace(250, 110, 1700, 3000),
        GemmConfig(64, 32, 64, 4, 5, 16, "pointers"): Pace(250, 90, 1200, 3200),
    },
    ("tiles", 32): {
        GemmConfig(256, 128, 128, 8, 3, 16, "warp"): Pace(1180, 1190, 4000, 4400),
        GemmConfig(192, 128, 128, 12, 4, 16, "warp"): Pace(850, 910, 3200, 4400),
        GemmConfig(128, 128, 128, 8, 4, 16, "warp"): Pace(610, 580, 3700, 2700),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(420, 400, 3200, 3000),
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(460, 300, 2100, 3700, 2500),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(530, 350, 3700, 3900, 1600),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(790, 650, 1400, 4400, 4400),
        GemmConfig(64, 128, 32, 4, 4, 16, "tma"): Pace(250, 140, 3500, 2500),
        GemmConfig(64, 128, 32, 4, 4, 16, "pointers"): Pace(200, 140, 3800, 2500),
        GemmConfig(64, 64, 32, 4, 5, 16, "pointers"): Pace(200, 80, 3900, 2500),
        GemmConfig(64, 32, 32, 4, 5, 16, "pointers"): Pace(190, 70, 3400, 2500),
    },
    ("rows_f8", 128): {
        GemmConfig(256, 128, 128, 8, 3, 16, "warp"): Pace(730, 730, 3200, 3800),
        GemmConfig(192, 128, 128, 12, 4, 16, "warp"): Pace(450, 490, 2700, 3000),
        GemmConfig(128, 128, 128, 8, 5, 16, "warp"): Pace(340, 370, 2200, 3600),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(230, 200, 2800, 3600),
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(280, 170, 2100, 4300, 1800),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(310, 200, 2500, 2800, 1500),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(410, 300, 2200, 3600, 2600),
        GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): Pace(540, 290, 2000, 3900),
        GemmConfig(64, 64, 128, 4, 4, 16, "pointers"): Pace(320, 130, 2700, 3700),
        GemmConfig(64, 32, 128, 4, 5, 16, "pointers"): Pace(280, 120, 1400, 3000),
    },
    ("rows_i8", None): {
        GemmConfig(192, 128, 128, 12, 4, 16, "warp"): Pace(440, 470, 2600, 2800),
        GemmConfig(128, 128, 128, 8, 5, 16, "warp"): Pace(310, 310, 2100, 3600),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(230, 220, 1400, 2800),
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(270, 170, 2200, 4300, 1700),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(330, 190, 2900, 4200, 1500),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(390, 280, 2600, 3800, 2200),
        GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): Pace(540, 230, 1600, 3700),
        GemmConfig(64, 64, 128, 4, 4, 16, "pointers"): Pace(330, 120, 3000, 4400),
        GemmConfig(64, 32, 128, 4, 5, 16, "pointers"): Pace(260, 90, 1700, 4200),
    },
}
"""The configurations that can be chosen, and how fast they are; `benchmarks/results/h200-gemm-tried.md` has the others.

Three portable tiles of one warpgroup fit on a multiprocessor, and one multiplies while another promotes; that is why
the usual 128 x 128 tile of two warpgroups, which move in step, is slower almost everywhere for FP8 and is not here. The
warp-specialized kernel needs one tile only. Narrow portable tiles wait longer through the copy engine than through
pointers. The paces are those for which the choices lose least, on the shapes of `benchmarks/heuristic.py`."""


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
