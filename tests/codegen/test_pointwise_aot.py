"""Generated pointwise kernels compiled for Hopper without a GPU: full-width loads and stores, no spills."""

import pytest
import torch
from pointwise_examples import (
    ROTARY,
    SHAPES,
    compile_combining,
    compile_norm,
    compile_pointwise,
    compile_rotary,
    compile_rotary_append,
    compile_step_tables,
    compile_terms,
    meta,
)


@pytest.mark.parametrize("tokens", [1, 4096])
def test_rotary_embedding(tokens: int) -> None:
    code = compile_rotary(tokens)
    per_thread = 1 if tokens == 1 else 2
    assert (code.local_loads, code.local_stores) == (0, 0)
    assert code.wide_loads == 2 * 5 * per_thread  # x at three indices, the cosine and the sine, for both results
    assert code.wide_stores == 2 * per_thread


def test_a_norm_before_a_rotary_embedding() -> None:
    text = "t0 = mean(x0[i0, i2, 64*i1 + i3] * x0[i0, i2, 64*i1 + i3]); t1 = rsqrt(t0 + 1e-06);" + ROTARY.replace(
        "x0[i0, i2, 64*i1 + i3]", "bf16(x3[i3] * bf16(x0[i0, i2, 64*i1 + i3] * t1))"
    )
    code = compile_pointwise(
        (text,), SHAPES[:1], [meta(2, 4096, 256), meta(2, 4096, 64), meta(2, 4096, 64), meta(64)],
        [meta(2, 4, 4096, 64)],
    )  # fmt: skip
    assert (code.local_loads, code.local_stores) == (0, 0)
    assert code.wide_stores == 2


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (16, 1), (1, 4096)])
def test_rows_of_an_embedding_and_a_table_of_positions(batch: int, tokens: int) -> None:
    code = compile_step_tables(batch, tokens)
    assert (code.local_loads, code.local_stores) == (0, 0)
    assert code.wide_loads and code.wide_stores


@pytest.mark.parametrize(("experts", "columns", "tokens"), [(2, 4096, 4096), (8, 2048, 4096), (12, 2048, 64)])
def test_the_sum_over_the_experts_of_a_token(experts: int, columns: int, tokens: int) -> None:
    code = compile_combining(experts, columns, tokens)
    assert (code.local_loads, code.local_stores) == (0, 0)
    assert code.wide_loads == experts * code.wide_stores, "shares and places of rows do not narrow the loads of rows"
    assert code.registers <= 168


@pytest.mark.parametrize(("terms", "tokens", "columns"), [(2, 1, 8192), (2, 4096, 5120), (8, 4096, 8192)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_sum_of_quantized_terms(terms: int, tokens: int, columns: int, dtype: torch.dtype) -> None:
    """Rows of scales are not as aligned as rows of codes: 40 numbers for 5120 columns."""
    code = compile_terms(terms, tokens, columns, dtype)
    assert (code.local_loads, code.local_stores) == (0, 0)
    assert code.wide_loads == 8 + 2 * terms  # of 8192 columns for 256 threads: residual, gain, and codes


@pytest.mark.parametrize("rounded", ["bf16({})", "f16({})", "bf16(bf16({}) * 2.0)"])
def test_one_number_of_a_row_is_rounded(rounded: str) -> None:
    """Few tokens take one row a program, so the number is a tile of one, where packed instructions take two."""
    code = compile_combining(8, 2048, 64, rounded)
    assert (code.local_loads, code.local_stores) == (0, 0)


@pytest.mark.parametrize("columns", [768, 4096, 16384])
def test_a_norm_of_a_whole_row(columns: int) -> None:
    code = compile_norm(columns)
    assert (code.local_loads, code.local_stores) == (0, 0)
    assert code.wide_loads and code.wide_stores


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 512])
def test_rotary_embedding_and_append(dtype: torch.dtype, tokens: int) -> None:
    code = compile_rotary_append(dtype, tokens)
    assert (code.local_loads, code.local_stores) == (0, 0)
    assert code.wide_loads >= 5 + 5 + 1
    assert ("F2FP.SATFINITE.E4M3" in code.sass) == (dtype == torch.float8_e4m3fn)


def test_rotary_embedding_and_append_to_a_ring() -> None:
    code, full = compile_rotary_append(capacity=4096), compile_rotary_append()
    assert (code.local_loads, code.local_stores) == (0, 0)
    assert code.wide_loads == full.wide_loads and code.registers <= full.registers + 16


def test_offsets_are_wide_only_if_a_tensor_is_large() -> None:
    narrow, wide = (
        compile_pointwise(("bf16(x0[i0, i1] * 2.0)",), ("x0.0, 4096",), [meta(rows, 4096)], [meta(rows, 4096)])
        for rows in (2**18, 2**20)
    )
    assert wide.sass.count(".WIDE") != narrow.sass.count(".WIDE")
    assert narrow.wide_loads == wide.wide_loads == 2


def test_a_transposed_operand_and_other_dtypes() -> None:
    code = compile_pointwise(
        ("where(i1 < 3, x0[i0, i1], exp(x1[i1 - 3, i0]))",), ("x0.0, 1027",),
        [meta(100, 3, dtype=torch.float32), meta(100, 1024, dtype=torch.float16).t()],
        [meta(100, 1027, dtype=torch.float32)],
    )  # fmt: skip
    assert (code.local_loads, code.local_stores) == (0, 0)
