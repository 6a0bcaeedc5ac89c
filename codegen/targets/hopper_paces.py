"""Configurations for Hopper, and how long each takes, from measurements.

Nanoseconds on an H100, fitted to the times of `benchmarks/heuristic.py` and `benchmarks/epilogues.py`; H200 times had a
lower weight.
"""

from codegen.templates.fused import ExpressionPace, FusedGemmConfig, FusedPace, Separate
from codegen.templates.gemm import GemmConfig, Kind, Pace
from codegen.templates.grouped import GroupedConfig

GEMM: dict[tuple[Kind, int | None], dict[GemmConfig, Pace]] = {
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
"""The available configurations and their speed; `benchmarks/results/h200-gemm-tried.md` and `h100-gemm-tried.md` list
the rejected ones.

Three portable tiles of one warpgroup fit on a multiprocessor, and one multiplies while another promotes. The usual
128 x 128 tile of two warpgroups runs in lockstep, is slower almost everywhere for FP8, and is therefore absent. The
warp-specialized kernel needs only one tile per multiprocessor; for large K, it is faster with fewer consecutive rows of
tiles, so its large tiles have two orders. Narrow portable tiles wait longer through the copy engine than through
pointers. Paces are chosen to minimize the loss of the resulting choices on the shapes of `benchmarks/heuristic.py`."""

FUSED_GEMM: dict[FusedGemmConfig | Separate, FusedPace | ExpressionPace] = {
    FusedGemmConfig(2, 2, 3): FusedPace(460, 710, 1360, 2680, 3390),
    FusedGemmConfig(2, 1, 4): FusedPace(340, 390, 1220, 1720, 3360),
    FusedGemmConfig(1, 2, 3): FusedPace(620, 620, 2440, 7260, 3840),
    FusedGemmConfig(1, 1, 4): FusedPace(480, 390, 670, 1020, 2350),
    Separate(): ExpressionPace(2910, 2340),
}
"""The available forms. As above, paces are chosen to minimize the loss of the resulting choices."""

GROUPED_GEMM: dict[GroupedConfig, tuple[float, float]] = {
    GroupedConfig("narrow", 16, 8): (-1, 8),
    GroupedConfig("narrow", 32, 8): (8, 16),
    GroupedConfig("narrow", 64, 8): (16, 32),
    GroupedConfig("wide", 128, 4): (160, 320),
    GroupedConfig("wide", 192, 4): (32, float("inf")),
}
"""Configuration -> the range of mean rows per group in which it is best.

Group sizes vary, so a narrow tile has room for twice the mean: a group that needs two tiles reads its weights twice.
Between 160 and 320 rows, two tiles of 128 hold a group about as often as two of 192, and the smaller ones are faster.
"""
