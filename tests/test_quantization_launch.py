"""What the quantization kernels are launched with: arguments and constants in the order in which they take them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from codegen.quantize import plain as quantization
from codegen.quantize.tiling import LONGEST_ROW
from qcompiler import numerics

RULE = numerics.profile("deepseek")
E4M3 = torch.float8_e4m3fn
Given = tuple[Any, int, tuple[Any, ...], dict[str, Any], dict[str, int], tuple[Any, ...], Any]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Given]:
    calls: list[Given] = []
    monkeypatch.setattr(quantization, "launch", lambda *given: calls.append(given))
    return calls


def run(kind: str, x: Tensor, prescale: Tensor | None = None) -> None:
    q = torch.empty(x.shape, dtype=E4M3)
    if kind == "tiles":
        quantization._quantize_tiles(x, q, quantization.scale_like(x, 64, "col_major"), prescale, RULE, 64)
    elif kind == "tokens":
        quantization._quantize_tokens(x, q, torch.empty(x.shape[0], 1), prescale, RULE)
    elif kind == "tensor":
        quantization._quantize_tensor(x, q, torch.empty(1, 1), prescale, RULE)
    else:
        quantization._quantize_known(x, q, quantization.scale_like(x, 64, "col_major"), prescale, RULE, [1, 64])


@pytest.mark.parametrize("kind", ["tiles", "tokens", "tensor", "known"])
@pytest.mark.parametrize("rows", [8, 2000])
def test_constants_come_last_and_in_order(kind: str, rows: int, launched: list[Given]) -> None:
    run(kind, torch.zeros(rows, 256))
    names = [kernel.__name__ for kernel, *_ in launched]
    assert len(launched) == (3 if kind == "tensor" else 1), names
    for kernel, programs, arguments, constants, options, pointers, _ in launched:
        assert kernel.arg_names == [*kernel.arg_names[: len(arguments)], *constants]
        assert [each for each in arguments if each is None or isinstance(each, Tensor)] == list(pointers)
        assert programs >= 1 and options.keys() == {"num_warps"}


@pytest.mark.parametrize("kind", ["tiles", "tokens", "tensor", "known"])
def test_what_is_compiled_does_not_depend_on_the_number_of_rows(kind: str, launched: list[Given]) -> None:
    for rows in (600, 601, 1000):
        run(kind, torch.zeros(rows, 256))
    count = len(launched) // 3
    whats = [[each[-1] for each in launched[i * count : (i + 1) * count]] for i in range(3)]
    assert whats[0] == whats[1] == whats[2]


@pytest.mark.parametrize("kind", ["tiles", "tokens", "tensor", "known"])
def test_what_is_compiled_depends_on_depth_and_stride(kind: str, launched: list[Given]) -> None:
    for x in (torch.zeros(8, 256), torch.zeros(8, 192), torch.zeros(8, 300)[:, :256], torch.zeros(8, 2 * LONGEST_ROW)):
        run(kind, x)
    count = len(launched) // 4
    assert len({launched[i * count][-1] for i in range(4)}) == 4
