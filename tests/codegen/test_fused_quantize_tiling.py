"""Tiles of the fused quantization kernel: invariants for any problem, and enough programs for few rows."""

import pytest

from codegen.support import TILE_COLUMNS
from codegen.templates.fused_quantize import FusedQuantizeConfig, FusedQuantizeProblem, fused_quantize_configs
from codegen.templates.quantize import LONGEST_ROW
from codegen.templates.template import ceil_div
from qcompiler.numerics import ALL

MULTIPROCESSORS = 132
ROWS = (1, 3, 64, 512, 513, 8192, 1 << 20)
COLUMNS = (1, 31, 128, 1000, 4096, 5120, 7168, 11008, LONGEST_ROW)


def fused_config(
    m: int, k: int, block_k: int, *, whole_rows: bool, operand_bytes: int, residuals: int
) -> FusedQuantizeConfig:
    problem = FusedQuantizeProblem(m, k, (1, block_k), whole_rows, 1, operand_bytes, residuals)
    (config,) = fused_quantize_configs(problem)
    return config


@pytest.mark.parametrize("block_k", [*TILE_COLUMNS, ALL])
@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("operand_bytes", [2, 4])
@pytest.mark.parametrize("residuals", [0, 2])
def test_the_kernel_can_run_the_tile(block_k: int, whole_rows: bool, operand_bytes: int, residuals: int) -> None:
    for m in ROWS:
        for k in COLUMNS:
            tile = fused_config(m, k, block_k, whole_rows=whole_rows, operand_bytes=operand_bytes, residuals=residuals)
            for size in (tile.block_m, tile.block_k, tile.group, tile.warps, tile.vector):
                assert size > 0 and size & (size - 1) == 0, (m, k, tile)
            assert tile.block_k % tile.group == 0
            assert tile.group == (tile.block_k if block_k == ALL else block_k)
            if whole_rows or block_k == ALL:
                assert tile.block_k >= k, "the tile must hold the row"
            assert tile.warps <= 16
            assert tile.block_m * tile.block_k <= 128 * 32 * tile.warps, "more than 128 numbers a thread"


def test_few_rows_are_spread_over_many_programs() -> None:
    for m in (1, 16, 64, 132, 512):
        tile = fused_config(m, 4096, 128, whole_rows=True, operand_bytes=2, residuals=0)
        assert ceil_div(m, tile.block_m) == m
    tile = fused_config(64, 8192, 128, whole_rows=False, operand_bytes=2, residuals=0)
    assert ceil_div(64, tile.block_m) * ceil_div(8192, tile.block_k) >= MULTIPROCESSORS
