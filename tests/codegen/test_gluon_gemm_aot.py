"""The Gluon kernels compiled for Hopper without a GPU: required properties of the machine code."""

import re

import pytest
import torch
from hopper_kernels import GLUON, all_configs, compile_gemm, compile_sum_splits, shared_memory
from hopper_kernels import WARP as WARPS

from codegen.machine_code import MachineCode
from codegen.targets.hopper import HOPPER
from codegen.templates.gemm import GemmConfig
from codegen.templates.gemm_template import MOST_SPLITS

CONFIGS = [config for config in all_configs() if config.variant in GLUON]
WARP = [config for config in CONFIGS if config.variant in WARPS]
NARROW = [config for config in CONFIGS if config.variant == "narrow"]
TEAM = [config for config in CONFIGS if config.variant == "team"]


def assert_no_spills(code: MachineCode) -> None:
    assert (code.local_loads, code.local_stores) == (0, 0), "registers were spilled to local memory"


def fits(config: GemmConfig, out_dtype: torch.dtype) -> bool:
    return shared_memory(config, out_dtype.itemsize) <= HOPPER.limits.shared_memory


@pytest.mark.parametrize("config", WARP, ids=str)
def test_warp_specialized(config: GemmConfig) -> None:
    waves = config.block_m // config.consumers // 64
    boxes = config.block_m // config.box
    for out_dtype, bias in ((torch.bfloat16, None), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)):
        if not fits(config, out_dtype):
            continue
        code = compile_gemm(config, out_dtype=out_dtype, bias_dtype=bias)
        assert_no_spills(code)
        # A wave is four instructions of K = 32 into fresh registers; each consumer has its own code.
        assert code.qgmma == 4 * waves * config.consumers
        assert f"QGMMA.64x{config.block_n}x32.F32.E4M3.E4M3" in code.sass
        # Of the weight, the first stages are loaded by instructions of their own.
        assert (code.tma_loads, code.tma_stores) == (2 * boxes + 2, waves * config.consumers)
        assert code.shared_memory <= shared_memory(config, out_dtype.itemsize), "the estimate is not an upper bound"
        # Registers per thread at the start, equal for all warpgroups; the consumers then take some from the producer.
        assert code.registers == {1: 255, 2: 168, 3: 128}[config.consumers]
        shares = {int(text, 16) for text in re.findall(r"USETMAXREG\.DEALLOC\.CTAPOOL (0x[0-9a-f]+)", code.sass)}
        assert {1: {40}, 2: {232, 40}, 3: {160, 32}}[config.consumers] <= shares


@pytest.mark.parametrize("config", WARP, ids=str)
def test_turns_use_barriers_that_triton_does_not_use(config: GemmConfig) -> None:
    code = compile_gemm(config)
    waves = config.block_m // config.consumers // 64
    taken = re.findall(r"BAR\.SYNC\S* (0x[0-9a-f]+), 0x100 ", code.sass)
    given = re.findall(r"BAR\.ARV (0x[0-9a-f]+), 0x100 ", code.sass)
    # One wait and one arrive per wave, plus an arrive before the first and a wait after the last; none for 2 waves.
    turns = waves * config.consumers > 2
    assert len(taken) == len(given) == (waves * config.consumers + 1 if turns else 0)
    assert set(taken) == set(given) == {hex(8 + who) for who in range(config.consumers if turns else 0)}
    others = re.findall(r"BAR\.SYNC\S* (0x[0-9a-f]+)(?! *, 0x100 )\s*[,;]", code.sass)
    assert max(int(number, 16) for number in others if number not in taken) < 8


@pytest.mark.parametrize("config", NARROW, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_narrow(config: GemmConfig, out_dtype: torch.dtype) -> None:
    for bias in (None, torch.float16):
        code = compile_gemm(config, out_dtype=out_dtype, bias_dtype=bias)
        assert_no_spills(code)
        assert code.qgmma == 4 * 128 // 64 and f"QGMMA.64x{config.block_m}x32.F32.E4M3.E4M3" in code.sass
        # Three copies per stage before the loop, and three in it.
        assert (code.tma_loads, code.tma_stores) == (3 * (config.stages + 1), 0)
        assert code.shared_memory <= shared_memory(config, out_dtype.itemsize)


@pytest.mark.parametrize("config", TEAM, ids=str)
def test_team(config: GemmConfig) -> None:
    for out_dtype, bias in ((torch.bfloat16, None), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)):
        code = compile_gemm(config, out_dtype=out_dtype, bias_dtype=bias)
        assert_no_spills(code)
        assert code.qgmma == 4 * config.consumers and f"QGMMA.64x{config.block_n}x32.F32.E4M3.E4M3" in code.sass
        # One producer loads for all consumers, and the first one stores: the first weights, then three copies a stage.
        assert (code.tma_loads, code.tma_stores) == (4, 1)
        assert config.stages % config.consumers == 0, "a stage would change hands between consumers"
        assert code.shared_memory <= shared_memory(config, out_dtype.itemsize), "the estimate is not an upper bound"
        shares = {int(text, 16) for text in re.findall(r"USETMAXREG\.\S+ (?:UP\d, )?(0x[0-9a-f]+)", code.sass)}
        assert {2: {232, 40}, 3: {152, 40}}[config.consumers] <= shares


@pytest.mark.parametrize("config", [WARP[0], NARROW[0], TEAM[0]], ids=str)
def test_wider_tiles_of_the_activation(config: GemmConfig) -> None:
    for x_block in (256, -1):
        code = compile_gemm(config, bias_dtype=torch.bfloat16, x_block=x_block)
        assert_no_spills(code)
        assert code.qgmma > 0 and code.tma_loads > 0


@pytest.mark.parametrize("x_block", [32, 64])
def test_narrower_tiles_of_the_activation(x_block: int) -> None:
    steps = 128 // x_block
    for config in [config for config in all_configs("tiles", x_block) if config.variant in GLUON]:
        code = compile_gemm(config, bias_dtype=torch.bfloat16, x_block=x_block)
        assert_no_spills(code)
        assert code.shared_memory <= shared_memory(config, 2, steps)
        # As many tensor core instructions as with [1, 128], but each step of a stage promotes its sums.
        if config.variant in WARPS:
            waves, boxes = config.block_m // 64, config.block_m // config.box
            assert (code.qgmma, code.tma_loads) == (4 * waves, boxes * (1 + steps) + 2)
            assert code.float_adds >= steps * config.block_m * config.block_n // 128
            assert not re.search(r"BAR\.ARV", code.sass), "short waves do not use turns"
        else:
            assert (code.qgmma, code.tma_loads) == (4 * 128 // 64, (2 + steps) * (config.stages + 1))
            assert code.float_adds >= steps * config.block_m * config.block_n // (config.warps * 32)


def test_sum_of_splits_uses_wide_loads_and_stores() -> None:
    splits = 2
    while splits <= MOST_SPLITS:
        for out_dtype in (torch.bfloat16, torch.float32):
            code = compile_sum_splits(splits, out_dtype=out_dtype, bias_dtype=torch.bfloat16)
            assert_no_spills(code)
            assert code.wide_loads > 0
        splits *= 2
