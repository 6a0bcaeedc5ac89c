"""The quantization kernels compiled for Hopper without a GPU: wide loads and stores, no spills, exact arithmetic."""

import pytest
import torch
from hopper_kernels import compile_amax, compile_known, compile_quantize, compile_tokens

from codegen.machine_code import MachineCode
from codegen.operators.quantize import SCALE_LAYOUTS
from codegen.templates.quantize import quantize_config
from qcompiler import numerics

E4M3, I8 = torch.float8_e4m3fn, torch.int8


def assert_no_spills(code: MachineCode) -> None:
    assert (code.local_loads, code.local_stores) == (0, 0), "registers were spilled to local memory"


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


@pytest.mark.parametrize("out_dtype", [E4M3, I8])
def test_quantization_of_whole_rows_and_tensors(out_dtype: torch.dtype) -> None:
    codes = [compile_tokens(k, out_dtype=out_dtype) for k in (512, 16384, 32768)]
    codes += [compile_tokens(8192, torch.float32, out_dtype=out_dtype, m=3)]
    codes += [compile_known(out_dtype=out_dtype), compile_known(out_dtype=out_dtype, block_k=128)]
    codes += [compile_known(torch.float16, out_dtype=out_dtype, profile="deepgemm")]
    for code in codes:
        assert_no_spills(code)
        assert code.wide_loads >= 2 and code.wide_stores >= 1, "loads and stores have to be 16 bytes wide"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_prescale_is_multiplied_in_floating_point(dtype: torch.dtype) -> None:
    # ptxas 12.8 turns (x * p as bits) << 1 into an integer product, with a float factor of 2.8e-45, whose bits are a 2.
    codes = [compile_amax(dtype, m=m, prescale=True) for m in (8, 8192)]
    codes += [compile_quantize(dtype, prescale=True, out_dtype=I8), compile_tokens(4096, dtype, prescale=True)]
    codes += [compile_tokens(32768, dtype, prescale=True), compile_known(dtype, prescale=True)]
    for code in codes:
        assert_no_spills(code)
        assert "FMUL" in code.sass and "e-45" not in code.sass


def test_the_amax_of_a_tensor_is_read_in_wide_loads() -> None:
    code = compile_amax()
    assert_no_spills(code)
    assert code.wide_loads >= 4
