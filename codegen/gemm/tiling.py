"""From a problem to a configuration: which kernel variant, which tile, how many warps and stages.

All of it is arithmetic on sizes, so every choice can be tested, printed and explained without a GPU. Among the
configurations that `codegen.gemm.config` does not refuse, the one with the least estimated time wins.
"""

from collections.abc import Sequence
from typing import NamedTuple

from codegen.gemm.config import WARP, GemmConfig, GemmProblem, Kind, refusal
from qcompiler.errors import CodegenError

MOST_SPLITS = 16
"""Parts of K at most; their sums are added by one program, which holds them all."""

SHORTEST_SPLIT = 4
"""Blocks of K that a split has at least, so that its copies overlap."""


class Pace(NamedTuple):
    """Nanoseconds on an H100, fitted to the times of `benchmarks/heuristic.py`; those of an H200 counted for less.

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
        GemmConfig(256, 128, 128, 8, 3, 16, "warp"): Pace(370, 730, 3400, 2000),
        GemmConfig(192, 128, 128, 12, 4, 16, "warp"): Pace(290, 560, 1600, 2000),
        GemmConfig(256, 128, 128, 8, 3, 4, "warp"): Pace(380, 770, 2100, 2100),
        GemmConfig(192, 128, 128, 12, 4, 2, "warp"): Pace(270, 520, 2600, 2000),
        GemmConfig(128, 128, 128, 8, 4, 16, "warp"): Pace(270, 420, 1800, 3000),
        GemmConfig(128, 64, 128, 8, 6, 16, "split"): Pace(290, 290, 1200, 2700, 4500),
        GemmConfig(64, 128, 128, 4, 6, 16, "split"): Pace(320, 310, 1400, 2700, 4500),
        GemmConfig(64, 64, 128, 4, 8, 16, "split"): Pace(210, 220, 2300, 3500, 3200),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(270, 280, 1400, 3100),
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(440, 290, 1200, 3200, 1800),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(470, 310, 1300, 2800, 1600),
        GemmConfig(64, 128, 128, 4, 3, 16, "tma"): Pace(550, 310, 1000, 3000),
        GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): Pace(570, 350, 900, 2900),
        GemmConfig(64, 64, 128, 4, 3, 16, "pointers"): Pace(490, 210, 600, 3200),
        GemmConfig(64, 32, 128, 4, 4, 16, "pointers"): Pace(450, 160, 500, 2600),
    },
    ("tiles", 64): {
        GemmConfig(256, 128, 128, 8, 3, 16, "warp"): Pace(650, 920, 1800, 2600),
        GemmConfig(192, 128, 128, 12, 4, 16, "warp"): Pace(440, 650, 3000, 2300),
        GemmConfig(128, 128, 128, 8, 4, 16, "warp"): Pace(320, 460, 2400, 2300),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(300, 290, 2900, 2500),
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(420, 320, 1400, 2700, 1600),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(490, 310, 2500, 2800, 1500),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(560, 460, 2600, 2700, 2300),
        GemmConfig(64, 128, 64, 4, 4, 16, "tma"): Pace(370, 210, 800, 2400),
        GemmConfig(64, 128, 64, 4, 4, 16, "pointers"): Pace(420, 200, 800, 2000),
        GemmConfig(64, 64, 64, 4, 5, 16, "pointers"): Pace(380, 120, 1300, 2400),
        GemmConfig(64, 32, 64, 4, 5, 16, "pointers"): Pace(360, 100, 800, 2200),
    },
    ("tiles", 32): {
        GemmConfig(256, 128, 128, 8, 3, 16, "warp"): Pace(770, 1270, 2600, 2900),
        GemmConfig(192, 128, 128, 12, 4, 16, "warp"): Pace(550, 860, 4100, 3700),
        GemmConfig(128, 128, 128, 8, 4, 16, "warp"): Pace(400, 620, 3600, 2100),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(340, 300, 4500, 2500),
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(440, 310, 2100, 2700, 1800),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(520, 390, 3200, 2800, 2100),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(640, 690, 2100, 2900, 4500),
        GemmConfig(64, 128, 32, 4, 4, 16, "tma"): Pace(300, 180, 2300, 2000),
        GemmConfig(64, 128, 32, 4, 4, 16, "pointers"): Pace(280, 180, 2500, 2000),
        GemmConfig(64, 64, 32, 4, 5, 16, "pointers"): Pace(300, 120, 2600, 2300),
        GemmConfig(64, 32, 32, 4, 5, 16, "pointers"): Pace(280, 90, 2200, 3800),
    },
    ("rows_f8", 128): {
        GemmConfig(256, 128, 128, 8, 3, 16, "warp"): Pace(320, 620, 4500, 4400),
        GemmConfig(192, 128, 128, 12, 4, 16, "warp"): Pace(230, 420, 4500, 2000),
        GemmConfig(192, 128, 128, 12, 4, 4, "warp"): Pace(240, 430, 3900, 2000),
        GemmConfig(128, 128, 128, 8, 5, 16, "warp"): Pace(220, 320, 3500, 2700),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(220, 230, 3200, 3100),
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(990, 310, 700, 3000, 500),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(420, 310, 1300, 2800, 2400),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(500, 430, 800, 2500, 2700),
        GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): Pace(550, 380, 500, 2600),
        GemmConfig(64, 64, 128, 4, 4, 16, "pointers"): Pace(330, 180, 1800, 2500),
        GemmConfig(64, 32, 128, 4, 5, 16, "pointers"): Pace(310, 160, 600, 2500),
    },
    ("rows_i8", None): {
        GemmConfig(192, 128, 128, 12, 4, 4, "warp"): Pace(210, 320, 4500, 2000),
        GemmConfig(128, 128, 128, 8, 5, 4, "warp"): Pace(160, 170, 4100, 2700),
        GemmConfig(128, 64, 128, 8, 6, 16, "warp"): Pace(180, 240, 2700, 2600),
        GemmConfig(16, 128, 128, 4, 4, 1, "narrow"): Pace(320, 290, 1000, 2800, 1900),
        GemmConfig(32, 128, 128, 4, 4, 1, "narrow"): Pace(330, 280, 2300, 2600, 1300),
        GemmConfig(64, 128, 128, 4, 4, 1, "narrow"): Pace(480, 390, 1300, 2600, 1700),
        GemmConfig(64, 128, 128, 4, 3, 16, "pointers"): Pace(500, 210, 2800, 2900),
        GemmConfig(64, 64, 128, 4, 4, 16, "pointers"): Pace(350, 200, 1000, 2300),
        GemmConfig(64, 32, 128, 4, 5, 16, "pointers"): Pace(280, 150, 500, 2500),
    },
}
"""The configurations that can be chosen, and how fast they are; `benchmarks/results/h200-gemm-tried.md` and
`h100-gemm-tried.md` have the others.

Three portable tiles of one warpgroup fit on a multiprocessor, and one multiplies while another promotes; that is why
the usual 128 x 128 tile of two warpgroups, which move in step, is slower almost everywhere for FP8 and is not here. The
warp-specialized kernel needs one tile only; where K is deep, it is faster with fewer rows of tiles that follow each
other, so there are two orders of its large tiles. Narrow portable tiles wait longer through the copy engine than
through pointers. The paces are those for which the choices lose least, on the shapes of `benchmarks/heuristic.py`."""


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
    if config.variant in WARP and 2 * problem.m <= config.block_m:
        step *= 2  # the copy engine is slow in a tile of which half lies beyond its tensor
    steps = max(depth * step, problem.n * problem.k / pace.bandwidth)
    return (steps + rounds * pace.tail + (pace.sum if splits > 1 else 0)) / 1e3


def split_depth(config: GemmConfig, m: int, n: int, k: int, sms: int) -> int:
    """Steps of K in one split: all of them, unless the kernel splits K and there are too few tiles for the device."""
    steps = ceil_div(k, config.block_k)
    if config.variant not in ("narrow", "split"):
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
