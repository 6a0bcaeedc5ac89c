"""The end of a greedy decode step: the operator on a CPU, its kernels in Triton's interpreter, and for Hopper."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
from triton_interpreter import needs_interpreter, prepare_interpreter, run_interpreted

if TYPE_CHECKING:
    from torch import Tensor

ROWS = [3, 0, 4]


def tables(logits: "Tensor", slots: Sequence[int] = ROWS) -> "list[Tensor]":
    """Operands: of five slots, slot 0 is not active."""
    torch.manual_seed(1)
    chosen, active = torch.tensor(slots), torch.tensor([0, 1, 1, 1, 1])
    tokens, lengths = torch.randint(9, (5,)), torch.randint(9, (5,))
    return [logits, chosen, active, tokens, lengths, torch.full_like(chosen, 7), lengths[chosen]]


def check(given: "list[Tensor]", logits: "Tensor", slots: Sequence[int]) -> None:
    """The tables after the step, computed without the operator."""
    _, chosen, _, tokens, lengths, row_tokens, row_lengths = given
    before = tables(logits, slots)
    assert row_tokens.tolist() == logits.argmax(-1).tolist()
    assert row_lengths.tolist() == [int(before[4][slot]) + (slot != 0) for slot in slots]
    assert torch.equal(tokens[chosen], row_tokens) and torch.equal(lengths[chosen], row_lengths)
    others = [slot for slot in range(5) if slot not in slots]
    assert torch.equal(tokens[others], before[3][others]) and torch.equal(lengths[others], before[4][others])


def examples() -> "list[Tensor]":
    """Logits with equal largest ones, infinities, zeros of both signs, and NaN."""
    equal = torch.randn(3, 5000).mul(4).round()
    special = torch.tensor([[-0.0, 0.0, -1.0], [-torch.inf, -torch.inf, -torch.inf], [1.0, torch.nan, torch.inf]])
    negative = -torch.rand(3, 700) - 1
    made = [equal, special, negative, torch.randn(3, 4096), torch.randn(3, 1), equal.flip(1)[:, ::2]]
    made[1][2, 1] = -torch.tensor(torch.nan)
    return [*made, *(each.half() for each in made)]


if __name__ != "__main__":
    import torch
    from hopper_kernels import compile_next_tokens

    import codegen.torch_ops  # noqa: F401  (registers the operators)

    def test_on_a_cpu() -> None:
        for logits in examples():
            given = tables(logits)
            torch.ops.qcompiler.next_tokens(*given)
            check(given, logits, ROWS)

    @pytest.mark.parametrize(("columns", "wide"), [(128256, 2), (50257, 0)])
    def test_the_kernels_for_hopper(columns: int, wide: int) -> None:
        for code in compile_next_tokens(16, columns):
            assert (code.local_loads, code.local_stores) == (0, 0)
            assert "ACQBULK" in code.sass and "PREEXIT" in code.sass
        assert compile_next_tokens(16, columns)[0].wide_loads == wide

    @pytest.mark.gpu
    @pytest.mark.parametrize("columns", [96, 50257, 128256])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_on_a_gpu(columns: int, dtype: torch.dtype) -> None:
        logits = torch.randn(3, columns).to(dtype)
        logits[0, [columns - 1, columns // 2, columns // 2 - 1]] = 100.0
        logits[2, columns - 3] = torch.nan
        for _ in range(3):  # the third call is replayed
            given = [each.cuda() for each in tables(logits)]
            torch.ops.qcompiler.next_tokens(*given)
            check([each.cpu() for each in given], logits, ROWS)


@needs_interpreter
@pytest.mark.timeout(240)
def test_the_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


if __name__ == "__main__":
    import torch

    from codegen.targets.hopper import HOPPER
    from codegen.templates.next_tokens import NEXT_TOKENS, NextTokensConfig, NextTokensOperands

    prepare_interpreter()
    for logits in examples():
        for slots in (ROWS, [1], [0, 1, 2, 3, 4]):
            some = logits.repeat(2, 1)[: len(slots)]
            given = tables(some, slots)
            NEXT_TOKENS.family(HOPPER).launch(NextTokensConfig(512, 4), NextTokensOperands(*given))
            check(given, some, slots)
    print("all cases ran")
