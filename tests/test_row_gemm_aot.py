"""The products with scales at the end of the sum, compiled for Hopper without a GPU: what the machine code shows."""

import pytest
import torch

from codegen.aot import compile_row_gemm
from codegen.gemm_config import GemmConfig, Kind
from codegen.machine_code import MachineCode
from codegen.tiling import all_configs

ROW_KINDS: tuple[Kind, ...] = ("rows_f8", "rows_i8")


def assert_no_spills(code: MachineCode) -> None:
    assert (code.local_loads, code.local_stores) == (0, 0), "registers were spilled to local memory"


@pytest.mark.parametrize(("kind", "config"), [(kind, c) for kind in ROW_KINDS for c in all_configs(kind)], ids=str)
def test_every_row_gemm_that_can_be_chosen(kind: Kind, config: GemmConfig) -> None:
    for out_dtype, bias in ((torch.bfloat16, None), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)):
        code = compile_row_gemm(config, kind, out_dtype=out_dtype, bias_dtype=bias)
        assert_no_spills(code)
        count = 4 * config.block_m // (config.warps // 4 * 64)
        assert (code.qgmma, code.igmma) == ((count, 0) if kind == "rows_f8" else (0, count))
        assert code.shared_memory <= config.shared_memory(out_dtype.itemsize)
        if config.variant == "tma":
            assert code.tma_loads == 2 * config.stages and code.tma_stores == 1
        else:
            assert code.tma_loads == code.tma_stores == 0
            assert code.wide_loads > 0 and code.wide_stores > 0


@pytest.mark.parametrize("config", all_configs("rows_f8"), ids=str)
def test_fp8_sums_are_added_in_registers_and_not_in_the_tensor_core(config: GemmConfig) -> None:
    # One addition an element for each 128 of K. Without the promotion there is none, and no compiler pass may make the
    # one kernel into the other.
    elements = config.block_m * config.block_n // (config.warps * 32)
    assert compile_row_gemm(config).float_adds >= elements
    assert compile_row_gemm(config, promote=False).float_adds == 0


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_row_gemm_without_any_alignment(kind: Kind) -> None:
    for config in all_configs(kind):
        if config.variant == "pointers":
            code = compile_row_gemm(config, kind, aligned=False)
            assert code.qgmma + code.igmma > 0
