"""GEMMs with scales at the end of the sum, compiled for Hopper without a GPU: properties of the machine code."""

from functools import cache

import pytest
import torch
from hopper_kernels import all_configs, compile_row_gemm, compile_sum_splits, shared_memory

from codegen.machine_code import MachineCode
from codegen.targets.hopper import HOPPER
from codegen.templates.gemm import GemmConfig, Kind
from codegen.templates.gemm_template import MOST_SPLITS

ROW_KINDS: tuple[Kind, ...] = ("rows_f8", "rows_i8")


def assert_no_spills(code: MachineCode) -> None:
    assert (code.local_loads, code.local_stores) == (0, 0), "registers were spilled to local memory"


def configs(variant: str) -> list[tuple[Kind, GemmConfig]]:
    return [(kind, config) for kind in ROW_KINDS for config in all_configs(kind) if config.variant == variant]


@cache
def row_gemm(config: GemmConfig, promote: bool) -> MachineCode:
    """The FP8 kernel without a bias, shared by several tests."""
    return compile_row_gemm(config, promote=promote)


def assert_tensor_cores(code: MachineCode, kind: Kind, count: int) -> None:
    assert (code.qgmma, code.igmma) == ((count, 0) if kind == "rows_f8" else (0, count))


OUTPUTS = ((torch.bfloat16, None), (torch.float32, torch.float16))


@pytest.mark.parametrize(("kind", "config"), configs("pointers"), ids=str)
def test_every_configuration_of_the_portable_kernel(kind: Kind, config: GemmConfig) -> None:
    for out_dtype, bias in OUTPUTS:
        code = compile_row_gemm(config, kind, out_dtype=out_dtype, bias_dtype=bias)
        assert_no_spills(code)
        assert_tensor_cores(code, kind, 4 * config.block_m // (config.warps // 4 * 64))
        assert code.shared_memory <= shared_memory(config, out_dtype.itemsize)
        assert code.tma_loads == code.tma_stores == 0
        assert code.wide_loads > 0 and code.wide_stores > 0


@pytest.mark.parametrize(("kind", "config"), configs("warp"), ids=str)
def test_every_warp_specialized_kernel(kind: Kind, config: GemmConfig) -> None:
    waves, boxes = config.block_m // 64, config.block_m // config.box
    for out_dtype, bias in OUTPUTS:
        needed = shared_memory(config, out_dtype.itemsize, 0)
        if needed > HOPPER.limits.shared_memory:
            assert out_dtype == torch.float32
            continue
        # Each way to sum is compiled once; only one of them with the other output types.
        for promote in {kind == "rows_f8", False} if bias is None else {kind == "rows_f8"}:
            code = compile_row_gemm(config, kind, out_dtype=out_dtype, bias_dtype=bias, promote=promote)
            assert_no_spills(code)
            # A wave is four instructions of K = 32; each consumer has its own code.
            assert_tensor_cores(code, kind, 4 * waves)
            assert (code.tma_loads, code.tma_stores) == (boxes + 2, waves)
            assert code.shared_memory <= needed, "the estimate is not an upper bound"
            assert code.registers == {2: 168, 3: 128}[config.consumers]


@pytest.mark.parametrize("config", [config for kind, config in configs("warp") if kind == "rows_f8"], ids=str)
def test_a_step_waits_for_the_tensor_cores_only_if_sums_are_promoted(config: GemmConfig) -> None:
    # If the tensor cores keep the sums, the waves of the next step are queued before this step's waves are done.
    waves = config.block_m // config.consumers // 64
    promoted, kept = (row_gemm(config, promote).sass for promote in (True, False))
    assert f"WARPGROUP.DEPBAR.LE gsb0, {waves:#x}" in kept and f"WARPGROUP.DEPBAR.LE gsb0, {waves:#x}" not in promoted


@pytest.mark.parametrize(("kind", "config"), configs("narrow"), ids=str)
def test_every_narrow_kernel(kind: Kind, config: GemmConfig) -> None:
    for partial in (False, True):
        code = compile_row_gemm(config, kind, bias_dtype=None if partial else torch.float16, partial=partial)
        assert_no_spills(code)
        assert_tensor_cores(code, kind, 4 * 128 // 64)
        # Two copies per stage before the loop, and two in it.
        assert (code.tma_loads, code.tma_stores) == (2 * (config.stages + 1), 0)
        assert code.shared_memory <= shared_memory(config, 2, 0)


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_sum_of_splits_uses_wide_loads(kind: Kind) -> None:
    splits = 2
    while splits <= MOST_SPLITS:
        code = compile_sum_splits(splits, kind, bias_dtype=torch.bfloat16)
        assert_no_spills(code)
        assert code.wide_loads > 0
        splits *= 2


@pytest.mark.parametrize("config", all_configs("rows_f8"), ids=str)
def test_fp8_sums_are_added_in_registers_and_not_in_the_tensor_core(config: GemmConfig) -> None:
    # One addition per element for each 128 of K. Without promotion there are none, and no compiler pass may turn one
    # kernel into the other.
    consumers = config.consumers if config.variant == "warp" else 1  # each has its own code
    elements = consumers * config.block_m * config.block_n // (config.warps * 32)
    assert row_gemm(config, True).float_adds >= elements
    assert row_gemm(config, False).float_adds == 0


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_row_gemm_without_any_alignment(kind: Kind) -> None:
    for config in all_configs(kind):
        if config.variant == "pointers":
            code = compile_row_gemm(config, kind, aligned=False)
            assert code.qgmma + code.igmma > 0
