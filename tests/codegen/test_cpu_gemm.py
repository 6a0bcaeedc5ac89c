"""The scaled matmul of the target cpu: the reference to the bit, with dequantized weights kept while they are valid."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from codegen.cpu import gemm
from codegen.cpu.gemm import kept_bytes, scaled_linear_on_cpu
from qcompiler import QCompilerError, knobs, numerics
from qcompiler.numerics import ALL, integer_matmul

Operands = tuple[Tensor, Tensor, Tensor, Tensor]

BLOCKS = [((1, 128), (128, 128)), ((1, ALL), (1, ALL)), ((ALL, ALL), (ALL, ALL)), ((1, 64), (128, 128))]


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    gemm._weights.clear()
    yield
    gemm._weights.clear()


def operands(block: tuple[int, int] = (1, 128), w_block: tuple[int, int] = (128, 128), k: int = 200) -> Operands:
    x, w = torch.randn(5, k), torch.randn(136, k)
    x_q, x_s = numerics.quantize(x, numerics.format_of(block))
    w_q, w_s = numerics.quantize(w, numerics.format_of(w_block))
    return x_q, x_s, w_q, w_s


@pytest.mark.parametrize(("x_block", "w_block"), BLOCKS)
@pytest.mark.parametrize("bias", [None, torch.randn(136)])
def test_it_equals_the_reference_in_every_call(
    x_block: tuple[int, int], w_block: tuple[int, int], bias: Tensor | None
) -> None:
    given = operands(x_block, w_block)
    want = numerics.scaled_linear(
        *given,
        bias,
        x_format=numerics.format_of(x_block, given[0].dtype),
        w_format=numerics.format_of(w_block, given[2].dtype),
        out_dtype=torch.bfloat16,
    )
    for _ in range(2):
        assert torch.equal(scaled_linear_on_cpu(*given, bias, x_block, w_block, torch.bfloat16), want)
    assert kept_bytes() == 4 * 136 * 200


def test_a_weight_or_scale_that_changes_is_dequantized_again() -> None:
    x_q, x_s, w_q, w_s = operands()
    blocks = (1, 128), (128, 128), torch.float32
    before = scaled_linear_on_cpu(x_q, x_s, w_q, w_s, None, *blocks)
    w_s.mul_(2)
    assert torch.equal(scaled_linear_on_cpu(x_q, x_s, w_q, w_s, None, *blocks), 2 * before)
    w_q.copy_((-w_q.float()).to(w_q.dtype))
    assert torch.equal(scaled_linear_on_cpu(x_q, x_s, w_q, w_s, None, *blocks), -2 * before)
    assert torch.equal(scaled_linear_on_cpu(x_q, x_s, w_q, 4 * w_s, None, *blocks), -8 * before)


def test_a_scale_in_the_memory_of_an_earlier_one_is_another_scale() -> None:
    x_q, x_s, w_q, w_s = operands()
    blocks = (1, 128), (128, 128), torch.float32
    want = scaled_linear_on_cpu(x_q, x_s, w_q, w_s, None, *blocks)
    for factor in (2, 4, 8, 16):  # each is freed before the next is made
        assert torch.equal(scaled_linear_on_cpu(x_q, x_s, w_q, w_s * factor, None, *blocks), factor * want)


def test_deleted_weights_and_untracked_changes_are_not_cached() -> None:
    given = operands()
    scaled_linear_on_cpu(*given, None, (1, 128), (128, 128), torch.float32)
    del given
    gc.collect()
    assert kept_bytes() == 0
    with torch.inference_mode():
        scaled_linear_on_cpu(*operands(), None, (1, 128), (128, 128), torch.float32)
    assert kept_bytes() == 0


def test_the_limit_holds_and_what_came_first_stays() -> None:
    first, second = operands(k=1000), operands(k=1000)
    with knobs.scope(cpu_cache=1):
        for given in (first, second, first):
            scaled_linear_on_cpu(*given, None, (1, 128), (128, 128), torch.float32)
        assert kept_bytes() == kept_bytes([first[2]]) == 4 * 136 * 1000 and kept_bytes([second[2]]) == 0
    gemm._weights.clear()
    with knobs.scope(cpu_cache=0):
        scaled_linear_on_cpu(*first, None, (1, 128), (128, 128), torch.float32)
        assert kept_bytes() == 0


def test_operands_that_do_not_fit_are_named() -> None:
    x_q, x_s, w_q, w_s = operands()
    with pytest.raises(QCompilerError, match="the operands of a scaled linear do not match"):
        scaled_linear_on_cpu(x_q[:, :100], x_s, w_q, w_s, None, (1, 128), (128, 128), torch.float32)


@pytest.mark.parametrize(("k", "code"), [(45, None), (1536, None), (integer_matmul.DEEPEST, -128), (140_000, 127)])
def test_sums_of_int8_products_are_exact_with_and_without_integer_units(
    k: int, code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = torch.randint(-127, 128, (3, k), dtype=torch.int8), torch.randint(-127, 128, (5, k), dtype=torch.int8)
    if code is not None:
        x, w = torch.full_like(x, code), torch.full_like(w, code)
    want = (x.double() @ w.double().T).float()
    for integer_units in (integer_matmul.has_integer_units(), False):
        monkeypatch.setattr(integer_matmul, "has_integer_units", lambda found=integer_units: found)
        assert torch.equal(integer_matmul.integer_matmul(x, w), want)


@pytest.mark.parametrize("lead", [(), (5,), (2, 0), (2, 3)])
@pytest.mark.parametrize(("x_block", "w_block"), [((1, ALL), (1, ALL)), ((ALL, ALL), (1, ALL)), ((1, ALL), (ALL, ALL))])
@pytest.mark.parametrize("bias", [None, torch.randn(136).bfloat16()])
def test_int8_is_scaled_once_and_keeps_no_weights(
    lead: tuple[int, ...], x_block: tuple[int, int], w_block: tuple[int, int], bias: Tensor | None
) -> None:
    x_q, x_s = numerics.quantize(torch.randn(*lead, 200), numerics.format_of(x_block, torch.int8))
    w_q, w_s = numerics.quantize(torch.randn(136, 200), numerics.format_of(w_block, torch.int8))
    got = scaled_linear_on_cpu(x_q, x_s, w_q, w_s, bias, x_block, w_block, torch.float32)
    want = (x_q.double() @ w_q.double().T).float() * (x_s * w_s.T)
    assert got.shape == (*lead, 136)
    assert torch.equal(got, (want if bias is None else want + bias).reshape(got.shape))
    assert kept_bytes() == 0
