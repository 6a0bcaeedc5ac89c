"""The fused quantization kernel compiled for Hopper without a GPU: wide accesses, no spills, exact arithmetic."""

import os
import re
import subprocess
import sys

import pytest
import torch
from hopper_kernels import compile_fused_quantize

from codegen.fused_expressions import source, triton_function
from codegen.machine_code import MachineCode
from qcompiler import numerics
from qcompiler.dialects.fused_expression import FUNCTIONS, parse
from qcompiler.errors import CodegenError, ParseError

B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E5M2, I8 = torch.float8_e5m2, torch.int8

NORM = "n = rsqrt(mean(x0 * x0) + 1e-06); bf16(x1 * bf16(x0 * n))"
ADD_NORM = "h = bf16(x0 + x1); n = rsqrt(mean(h * h) + 1e-06); bf16(x2 * bf16(h * n))"
LAYER_NORM = "bf16(standardize(x0, 1e-05) * x1 + x2)"
GATED = "bf16(bf16(silu(x0)) * x1)"


def assert_good(code: MachineCode, loads: int, stores: int) -> None:
    assert (code.local_loads, code.local_stores) == (0, 0), "registers were spilled to local memory"
    assert code.wide_loads >= loads and code.wide_stores >= stores, "loads and stores have to be 16 bytes wide"


@pytest.mark.parametrize(("k", "m"), [(1024, 1 << 20), (4096, 8), (7168, 1 << 20), (16384, 8)])
def test_rows_with_a_reduction(k: int, m: int) -> None:
    assert_good(compile_fused_quantize(NORM, (B16, B16), k, m=m, vectors=(1,)), 2, int(k == 1024))
    assert_good(compile_fused_quantize(ADD_NORM, (B16, B16, B16), k, m=m, vectors=(2,), keep=("h",)), 3, 1)
    assert_good(compile_fused_quantize(LAYER_NORM + " * x3", (B16, B16, B16, F32), k, m=m, vectors=(1, 2, 3)), 4, 0)


@pytest.mark.parametrize("block_k", [32, 128, 512, numerics.ALL])
def test_tiles(block_k: int) -> None:
    out_dtype = I8 if block_k in (128, numerics.ALL) else E5M2
    assert_good(compile_fused_quantize(GATED, (B16, B16), 4096, block_k=block_k, out_dtype=out_dtype), 4, 1)
    code = compile_fused_quantize(GATED + " * x2", (F16, F32, F32), 4096, vectors=(2,), block_k=block_k, m=8)
    assert_good(code, 4, 0)


@pytest.mark.parametrize(
    ("profile", "layout"),
    [("deepseek", "row_major"), ("deepgemm", "col_major"), ("vllm", "row_major"), ("ue8m0", "col_major")],
)
def test_profiles_and_layouts(profile: str, layout: str) -> None:
    code = compile_fused_quantize(NORM, (B16, B16), 4096, vectors=(1,), profile=profile, scale_layout=layout)
    assert_good(code, 8, 2)
    assert "F2FP.SATFINITE.E4M3" in code.sass


def test_six_operands_and_two_residual_outputs() -> None:
    text = "h = bf16(x0 + x1); g = h * x2 + x3; bf16(standardize(g, 1e-05) * x4) * x5"
    assert_good(compile_fused_quantize(text, (B16,) * 6, 8192, vectors=(4, 5), keep=("h", "g")), 4, 2)


SUM_NORM = "h = bf16(x0 + bf16(y0)); n = rsqrt(mean(h * h) + 1e-06); bf16(x1 * bf16(h * n))"


@pytest.mark.parametrize(("terms", "k", "m"), [(2, 8192, 1 << 20), (2, 8192, 8), (8, 4096, 1 << 20), (4, 576, 64)])
def test_a_sum_of_terms_before_a_norm(terms: int, k: int, m: int) -> None:
    """Codes are read 8 or more at a time, and one scale for them."""
    code = compile_fused_quantize(SUM_NORM, (B16, B16), k, m=m, vectors=(1,), keep=("h",), terms=terms)
    assert_good(code, 4, 2)
    reads = [len(re.findall(rf"LDG\.E{width}", code.sass)) for width in (r"\.(?:64|128)\b", r"(?: |\.CONSTANT )")]
    assert reads[0] >= 8 and reads[1] <= reads[0]
    assert len(re.findall(r"\bFADD\b", code.sass)) >= (terms - 1) * k // (32 * code.warps)  # no multiply-adds


@pytest.mark.parametrize(("group", "dtype"), [(32, E5M2), (512, I8), (numerics.ALL, I8), (128, torch.float8_e4m3fn)])
@pytest.mark.parametrize("block_k", [32, 128, numerics.ALL])
def test_formats_of_terms(group: int, dtype: torch.dtype, block_k: int) -> None:
    for k, m in ((1000, 8), (4096, 1 << 20)):
        text, rest = ("relu(y0) * x0", (F32,)) if k == 1000 else ("y0", ())
        code = compile_fused_quantize(text, rest, k, m=m, block_k=block_k, terms=3, term_group=group, term_dtype=dtype)
        assert (code.local_loads, code.local_stores) == (0, 0)


def test_a_product_and_a_sum_stay_two_roundings() -> None:
    # The sum does not change the number of multiply-adds, all of which belong to the quantization.
    plain, summed = (compile_fused_quantize(text, (F32, F32), 4096) for text in ("x0 * x1", "x0 * x1 + x0"))
    fused = [len(re.findall(r"\bFFMA\b", code.sass)) for code in (plain, summed)]
    assert fused[0] == fused[1] > 0
    assert summed.float_adds > plain.float_adds


def test_rounding_is_not_optimized_away() -> None:
    rounded, plain = (compile_fused_quantize(text, (F32, F32), 4096) for text in ("bf16(x0 + x1) * x1", "x0 * x1"))
    assert "F2FP.BF16" in rounded.sass and "F2FP.BF16" not in plain.sass


def test_equal_expressions_share_one_function() -> None:
    assert triton_function(NORM, ()) is triton_function(NORM, ())
    other = triton_function(ADD_NORM, ("h",))
    assert other is not triton_function(ADD_NORM, ())
    assert other.src == source(parse(ADD_NORM), ("h",), other.__name__)


def test_another_process_finds_the_same_kernel() -> None:
    code = (
        f"from codegen.fused_expressions import triton_function\nprint(triton_function({ADD_NORM!r}, ('h',)).cache_key)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == triton_function(ADD_NORM, ("h",)).cache_key


def test_the_source_is_the_expression_in_python() -> None:
    assert source(parse(ADD_NORM), ("h",), "f").splitlines()[1:] == [
        "    v_h = bf16_sum(x0, x1)",
        "    v_n = rsqrt((mean((wide(v_h) * wide(v_h)), inside, columns) + 1e-06))",
        "    return (wide(bf16_product(x2, bf16((wide(v_h) * v_n)))), v_h,)",
    ]
    gluon = source(parse("y0 * f16(x0) / 2"), (), "f", "gluon")
    assert gluon.splitlines()[1:] == ["    return (divide(times(wide(y0), wide(f16(wide(x0)))), 2.0),)"]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_function_compiles(name: str) -> None:
    args = "x0, 1e-05" if FUNCTIONS[name].arity == 2 else "x0"
    code = compile_fused_quantize(f"{name}({args}) / 3 + 1 / x0", (B16,), 1000, m=8)
    if name in ("cos", "sin"):  # large angles are reduced with a table in local memory
        assert code.local_loads > 0
    else:
        assert (code.local_loads, code.local_stores) == (0, 0)


def test_expressions_that_cannot_become_functions_are_refused() -> None:
    with pytest.raises(CodegenError, match="too few parameters: got x6"):
        triton_function("x0 + x6")
    with pytest.raises(CodegenError, match="holds parts of rows"):
        triton_function("y0 * mean(y0)", language="gluon")
    with pytest.raises(ParseError):
        triton_function("x0 +")
