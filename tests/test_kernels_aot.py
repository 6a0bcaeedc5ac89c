"""Every kernel variant compiled for Hopper without a GPU, and what its machine code has to show."""

import dataclasses
from fractions import Fraction
from math import floor, log2

import pytest
import torch

from codegen.aot import MachineCode, compile_gemm, compile_quantize
from codegen.tiling import GemmConfig, all_configs, quantize_config
from codegen.torch_ops import SCALE_LAYOUTS
from qcompiler import numerics
from qcompiler.errors import CodegenError

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def assert_no_spills(code: MachineCode) -> None:
    assert (code.local_loads, code.local_stores) == (0, 0), "registers were spilled to local memory"


@pytest.mark.parametrize("config", all_configs(), ids=str)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("bias", [None, torch.bfloat16])
def test_every_gemm_that_can_be_chosen(config: GemmConfig, out_dtype: torch.dtype, bias: torch.dtype | None) -> None:
    code = compile_gemm(config, out_dtype=out_dtype, bias_dtype=bias)
    assert_no_spills(code)
    # One tl.dot is four instructions of K = 32 for each 64 rows of a warpgroup, into fresh registers.
    assert code.qgmma == 4 * config.block_m // (config.warps // 4 * 64)
    assert "QGMMA.64x" in code.sass and "E4M3.E4M3" in code.sass
    assert code.shared_memory <= config.shared_memory(out_dtype.itemsize), "the estimate is not an upper bound"
    if config.variant == "tma":
        assert code.tma_loads == 2 * config.stages and code.tma_stores == 1
    else:
        assert code.tma_loads == code.tma_stores == 0
        assert code.wide_loads > 0 and code.wide_stores > 0


@pytest.mark.parametrize("config", all_configs(), ids=str)
def test_gemm_with_the_other_scale_layout(config: GemmConfig) -> None:
    assert_no_spills(compile_gemm(config, scale_layout="row_major", bias_dtype=torch.float32))


@pytest.mark.parametrize("config", [config for config in all_configs() if config.variant == "pointers"], ids=str)
def test_pointer_gemm_without_any_alignment(config: GemmConfig) -> None:
    code = compile_gemm(config, aligned=False)
    assert code.qgmma > 0


def test_three_tiles_of_the_main_configuration_fit_on_a_multiprocessor() -> None:
    # Its speed rests on this: one tile multiplies while the others promote. 65536 registers, 228 KB of shared memory.
    main = next(config for config in all_configs() if config.variant == "tma")
    code = compile_gemm(main, bias_dtype=torch.bfloat16)
    per_warp = -(-code.registers // 8) * 8 * 32
    assert 65536 // (per_warp * main.warps) >= 3
    assert 3 * (code.shared_memory + 1024) <= 228 * 1024


@pytest.mark.parametrize("profile", sorted(numerics.PROFILES))
@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_quantization(profile: str, layout: str) -> None:
    code = compile_quantize(profile=profile, scale_layout=layout)
    assert_no_spills(code)
    assert code.wide_loads >= 4 and code.wide_stores >= 2, "loads and stores have to be 16 bytes wide"
    assert "F2FP.SATFINITE.E4M3" in code.sass


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_quantization_of_other_dtypes(dtype: torch.dtype) -> None:
    for config in (quantize_config(1, 128), quantize_config(4096, 128)):
        code = compile_quantize(dtype, config=config)
        assert_no_spills(code)
        assert code.wide_loads >= 4


@pytest.mark.parametrize("block_k", [32, 512])
def test_quantization_in_other_blocks(block_k: int) -> None:
    assert_no_spills(compile_quantize(block_k=block_k, out_dtype=torch.float8_e5m2))


def test_a_kernel_that_cannot_be_compiled_is_an_error_of_ours() -> None:
    with pytest.raises(CodegenError, match="cannot compile scaled_gemm_tma for sm_90a"):
        compile_gemm(dataclasses.replace(all_configs()[0], block_n=256))


def test_the_division_of_the_quantization_kernel_rounds_to_the_right_code() -> None:
    # The proof that the kernel's comment promises. A code is decided by comparing the quotient with a tie between two
    # codes, an integer T in [16, 32) times a power of two. If the corrected quotient is RN(x / s + e), the comparison
    # can differ from that of RN(x / s) only where x / s is within e of T + half an ulp or T - half an ulp. Written in
    # integers (x = 16 X, s = S), |e| <= 2^-22 ulp asks S / 2^20 to be within 2^-17 of an integer, so S to be within 8
    # of a multiple of 2^20. All of these, and as many again, times all T, are tried here in exact arithmetic.
    wrong = {0: 0, 1: 0}
    for s in (Fraction(j * 2**20 + near) for j in range(8, 17) for near in range(-17, 18)):
        if not 2**23 <= s < 2**24:
            continue
        reciprocal = float32(1 / s)
        for tie in map(Fraction, range(16, 33)):
            for half_ulp in (Fraction(1, 2**20), Fraction(-1, 2**20), Fraction(-1, 2**21)):
                middle = float32(s * (tie + half_ulp))
                ulp = Fraction(2) ** (floor(log2(middle)) - 23)
                for x in (middle - ulp, middle, middle + ulp):
                    want = side(float32(x / s), tie)
                    quotient = float32(x * reciprocal)
                    wrong[0] += side(quotient, tie) != want
                    quotient = float32(quotient - float32(quotient * s - x) * reciprocal)
                    wrong[1] += side(quotient, tie) != want
    assert wrong[1] == 0
    assert wrong[0] > 0, "without the correction these cases do go wrong, or they would show nothing"


def side(value: Fraction, tie: Fraction) -> int:
    return (value > tie) - (value < tie)


def float32(value: Fraction) -> Fraction:
    """The nearest FP32 number, ties to even, for a value of ordinary size."""
    if value == 0:
        return value
    magnitude = abs(value)
    exponent = floor(log2(magnitude))
    exponent += (magnitude >= Fraction(2) ** (exponent + 1)) - (magnitude < Fraction(2) ** exponent)
    ulp = Fraction(2) ** (exponent - 23)
    return round(value / ulp) * ulp  # round() of a Fraction is to even
