"""GEMMs with scales inside the sum, compiled for Hopper without a GPU: required properties of the machine code."""

import dataclasses

import pytest
import torch
from hopper_kernels import GLUON, all_configs, compile_gemm, shared_memory

from codegen.machine_code import MachineCode
from codegen.templates.gemm import GemmConfig
from qcompiler.errors import CodegenError

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def portable(x_block: int = 128) -> list[GemmConfig]:
    return [config for config in all_configs("tiles", x_block) if config.variant not in GLUON]


PORTABLE = portable()


def assert_no_spills(code: MachineCode) -> None:
    assert (code.local_loads, code.local_stores) == (0, 0), "registers were spilled to local memory"


@pytest.mark.parametrize("config", PORTABLE, ids=str)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("bias", [None, torch.bfloat16])
def test_every_gemm_that_can_be_chosen(config: GemmConfig, out_dtype: torch.dtype, bias: torch.dtype | None) -> None:
    code = compile_gemm(config, out_dtype=out_dtype, bias_dtype=bias)
    assert_no_spills(code)
    # One tl.dot is four instructions of K = 32 for each 64 rows of a warpgroup, into fresh registers.
    assert code.qgmma == 4 * config.block_m // (config.warps // 4 * 64)
    assert "QGMMA.64x" in code.sass and "E4M3.E4M3" in code.sass
    assert code.shared_memory <= shared_memory(config, out_dtype.itemsize), "the estimate is not an upper bound"
    if config.variant == "tma":
        assert code.tma_loads == 2 * config.stages and code.tma_stores == 1
    else:
        assert code.tma_loads == code.tma_stores == 0
        assert code.wide_loads > 0 and code.wide_stores > 0


@pytest.mark.parametrize("config", PORTABLE, ids=str)
def test_gemm_with_the_other_scale_layout(config: GemmConfig) -> None:
    assert_no_spills(compile_gemm(config, scale_layout="row_major", bias_dtype=torch.float32))


@pytest.mark.parametrize("config", [config for config in PORTABLE if config.variant == "pointers"], ids=str)
def test_pointer_gemm_without_any_alignment(config: GemmConfig) -> None:
    code = compile_gemm(config, aligned=False)
    assert code.qgmma > 0


def test_three_tiles_of_the_main_configuration_fit_on_a_multiprocessor() -> None:
    # Required for speed: one tile multiplies while the others promote. 65536 registers, 228 KB of shared memory.
    main = next(config for config in PORTABLE if config.variant == "tma")
    code = compile_gemm(main, bias_dtype=torch.bfloat16)
    per_warp = -(-code.registers // 8) * 8 * 32
    assert 65536 // (per_warp * main.warps) >= 3
    assert 3 * (code.shared_memory + 1024) <= 228 * 1024


def test_a_kernel_that_cannot_be_compiled_raises_our_error() -> None:
    with pytest.raises(CodegenError, match="cannot compile scaled_gemm_tma for sm_90a"):
        compile_gemm(dataclasses.replace(PORTABLE[0], block_n=256))


@pytest.mark.parametrize("x_block", [32, 64, 256, -1])
def test_every_gemm_for_other_tiles(x_block: int) -> None:
    for config in portable(x_block):
        code = compile_gemm(config, bias_dtype=torch.bfloat16, x_block=x_block, out_dtype=torch.float32)
        assert_no_spills(code)
        assert code.qgmma == config.block_k // 32 * config.block_m // (config.warps // 4 * 64)
        assert (code.tma_loads, code.tma_stores) == ((2 * config.stages, 1) if config.variant == "tma" else (0, 0))
        assert code.shared_memory <= shared_memory(config, 4)
