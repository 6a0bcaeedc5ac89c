"""The end of a decode step: the operators on a CPU, their kernels in Triton's interpreter, and for Hopper."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
from triton_interpreter import needs_interpreter, prepare_interpreter, run_interpreted

if TYPE_CHECKING:
    from torch import Tensor

ROWS = [3, 0, 4]


def tables(slots: Sequence[int] = ROWS) -> "list[Tensor]":
    """Operands after the parts: of five slots, slot 0 is not active."""
    torch.manual_seed(1)
    chosen, active = torch.tensor(slots), torch.tensor([0, 1, 1, 1, 1])
    tokens, lengths = torch.randint(9, (5,)), torch.randint(9, (5,))
    return [chosen, active, tokens, lengths, torch.full_like(chosen, 7), lengths[chosen]]


def check(given: "list[Tensor]", logits: "Tensor", slots: Sequence[int]) -> None:
    """The tables after the step, computed without the operators."""
    chosen, _, tokens, lengths, row_tokens, row_lengths = given
    before = tables(slots)
    assert row_tokens.tolist() == logits.argmax(-1).tolist()
    assert row_lengths.tolist() == [int(before[3][slot]) + (slot != 0) for slot in slots]
    assert torch.equal(tokens[chosen], row_tokens) and torch.equal(lengths[chosen], row_lengths)
    others = [slot for slot in range(5) if slot not in slots]
    assert torch.equal(tokens[others], before[2][others]) and torch.equal(lengths[others], before[3][others])


def examples() -> "list[Tensor]":
    """Logits with equal largest ones, infinities, zeros of both signs, and NaN."""
    equal = torch.randn(3, 5000).mul(4).round()
    special = torch.tensor([[-0.0, 0.0, -1.0], [-torch.inf, -torch.inf, -torch.inf], [1.0, torch.nan, torch.inf]])
    negative = -torch.rand(3, 700) - 1
    made = [equal, special, negative, torch.randn(3, 4096), torch.randn(3, 1), equal.flip(1)[:, ::2]]
    made[1][2, 1] = -torch.tensor(torch.nan)
    return [*made, *(each.half() for each in made)]


def cut(logits: "Tensor") -> "list[tuple[Tensor, int]]":
    """The columns of three ranks, with the index of the first one: equal largest logits may be in several parts."""
    parts = logits.tensor_split(3, -1) if logits.shape[1] > 2 else (logits,)
    firsts = itertools.accumulate((part.shape[1] for part in parts), initial=0)
    return list(zip(parts, firsts, strict=False))


if __name__ != "__main__":
    import torch
    from hopper_kernels import compile_next_tokens

    from codegen.direct import kernels
    from codegen.operators.next_tokens import chosen

    def test_on_a_cpu() -> None:
        for logits in examples():
            for parts in ([kernels.rank_parts(logits, 0)], [kernels.rank_parts(*each) for each in cut(logits)]):
                given, ranked = tables(), torch.cat(parts)
                kernels.enter_tokens(ranked, *given)
                check(given, logits, ROWS)
                assert torch.equal(chosen(ranked), logits.argmax(-1))

    @pytest.mark.parametrize(("columns", "wide"), [(128256, 2), (50257, 0)])
    def test_the_kernels_for_hopper(columns: int, wide: int) -> None:
        """Also for the last of eight ranks, and for candidates of all of them."""
        alone, last = compile_next_tokens(16, columns), compile_next_tokens(16, columns, 7 * columns, ranks=8)
        assert [alone[0].wide_loads, last[0].wide_loads] == [wide, wide]
        for code in (*alone, *last):
            assert (code.local_loads, code.local_stores) == (0, 0)
            assert "ACQBULK" in code.sass and "PREEXIT" in code.sass

    @pytest.mark.gpu
    @pytest.mark.parametrize("columns", [96, 50257, 128256])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_on_a_gpu(columns: int, dtype: torch.dtype) -> None:
        logits = torch.randn(3, columns).to(dtype)
        logits[0, [columns - 1, columns // 2, columns // 2 - 1]] = 100.0
        logits[1] = 0.0  # all are equal
        logits[2, columns - 3] = torch.nan
        for ranks in ([(logits, 0)], cut(logits)):
            for _ in range(3):  # the third call is replayed
                given = [each.cuda() for each in tables()]
                parts = [kernels.rank_parts(part.cuda(), first) for part, first in ranks]
                kernels.enter_tokens(torch.cat(parts), *given)
                check([each.cpu() for each in given], logits, ROWS)


@needs_interpreter
@pytest.mark.timeout(240)
def test_the_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


if __name__ == "__main__":
    import torch

    from codegen.targets.hopper import HOPPER
    from codegen.templates.next_tokens import (
        ENTER_TOKENS,
        RANK_PARTS,
        EnterTokensConfig,
        EnterTokensOperands,
        RankPartsConfig,
        RankPartsOperands,
    )

    prepare_interpreter()

    def ranked(part: torch.Tensor, first: int) -> torch.Tensor:
        parts = torch.zeros(-(-part.shape[1] // 512), len(part), dtype=torch.int64)
        RANK_PARTS.family(HOPPER).launch(RankPartsConfig(512, 4), RankPartsOperands(part, parts, first))
        return parts

    for logits in examples():
        for slots in (ROWS, [1], [0, 1, 2, 3, 4]):
            some = logits.repeat(2, 1)[: len(slots)].contiguous()
            for ranks in ([(some, 0)], cut(some)):
                given, parts = tables(slots), torch.cat([ranked(*each) for each in ranks])
                ENTER_TOKENS.family(HOPPER).launch(EnterTokensConfig(1), EnterTokensOperands(parts, *given))
                check(given, some, slots)
    print("all cases ran")
