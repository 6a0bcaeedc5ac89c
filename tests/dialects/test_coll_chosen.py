"""Collectives over the tokens of experts: type rules, and what ranks receive for any choices."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.dialects.coll_chosen import gather_chosen_tokens, reduce_scatter_chosen_tokens
from qcompiler.dialects.coll_tokens import all_gather_tokens, is_cut, own_tokens, reduce_scatter_tokens
from qcompiler.distributed.communicator import current
from qcompiler.distributed.simulation import Simulation
from qcompiler.errors import VerifyError
from qcompiler.ir import Graph, Mesh

CHOSEN = '{few = 64, groups = 8, mesh = "tp", ranks = 2}'
PART = "f32[1, share(7*s0, 2, 64), 8]"


def graph(inputs: str, op: str, y: str) -> Graph:
    return Graph.parse(f"func @m({inputs}) -> ({y}) where s0 in 1.. {{\n  %y = coll.{op} : {y}\n  return %y\n}}")


@pytest.mark.parametrize(
    ("inputs", "op", "y"),
    [
        (f"%x: {PART}, %e: i64[7*s0, 2], %n: int(s0)", "gather_chosen_tokens(%x, %e, [%n, 7])", "f32[s0, 7, 8]"),
        ("%x: f8e4m3fn[35, 8], %e: i32[70, 2]", "gather_chosen_tokens(%x, %e, [70])", "f8e4m3fn[70, 8]"),
        ("%x: f32[s0, 7, 8], %e: i64[7*s0, 3]", "reduce_scatter_chosen_tokens(%x, %e)", PART),
    ],
)  # fmt: skip
def test_types(inputs: str, op: str, y: str) -> None:
    graph(inputs, f"{op} {CHOSEN}", y).verify()


@pytest.mark.parametrize(
    ("inputs", "op", "y", "message"),
    [
        ("%x: f32[35, 8], %e: i64[70, 2]", "gather_chosen_tokens(%x, %e)", "f32[70, 8]", "and a list of sizes"),
        ("%x: f32[35, 8], %e: i64[70, 2]", "gather_chosen_tokens(%x, %e, 70)", "f32[70, 8]", "must list 1 sizes"),
        ("%x: f32[35, 8], %e: i64[35, 2]", "gather_chosen_tokens(%x, %e, [70])", "f32[70, 8]", "for each of 70 tokens"),
        ("%x: f32[70, 8], %e: f32[70, 2]", "reduce_scatter_chosen_tokens(%x, %e)", "f32[35, 8]", "a row of integers"),
        ("%x: f32[70, 8], %e: i64[70]", "reduce_scatter_chosen_tokens(%x, %e)", "f32[35, 8]", "a row of integers"),
    ],
)  # fmt: skip
def test_wrong_types(inputs: str, op: str, y: str, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        graph(inputs, f"{op} {CHOSEN}", y).verify()


def test_experts_are_divided_equally() -> None:
    op = 'reduce_scatter_chosen_tokens(%x, %e) {few = 64, groups = 8, mesh = "tp", ranks = 3}'
    with pytest.raises(VerifyError, match="8 groups cannot be divided among 3 ranks"):
        graph("%x: f32[70, 8], %e: i64[70, 2]", op, "f32[24, 8]").verify()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(2, 4), st.integers(1, 12), st.integers(1, 3), st.booleans(), st.data())
def test_each_rank_has_the_tokens_that_it_needs(
    tokens: int, ranks: int, few: int, chosen: int, codes: bool, data: Any
) -> None:
    """Any choices: ranks that no token chooses, and one that all choose."""
    groups = 2 * ranks
    numbers = st.lists(st.integers(0, groups - 1), min_size=chosen, max_size=chosen, unique=True)
    experts = torch.tensor(data.draw(st.lists(numbers, min_size=tokens, max_size=tokens)))
    x, dtype = torch.arange(1.0, 1 + tokens * 3.0).view(tokens, 3), torch.float8_e4m3fn if codes else torch.float32
    cut: dict[str, Any] = {"mesh": "tp", "ranks": ranks, "few": few}
    mine = [((experts // 2) == rank).any(1, keepdim=True) for rank in range(ranks)]

    def program() -> tuple[torch.Tensor, ...]:
        own = own_tokens(x, **cut).to(dtype)
        term = (x * (1 + current().place("tp"))).where(mine[current().place("tp")], 0)
        return (
            all_gather_tokens(own, [tokens], **cut),
            gather_chosen_tokens(own, experts, [tokens], groups=groups, **cut),
            gather_chosen_tokens(own, experts, [1, tokens], groups=groups, scale_layout="col_major", **cut),
            reduce_scatter_tokens(term, **cut),
            reduce_scatter_chosen_tokens(term, experts, groups=groups, **cut),
        )

    results = Simulation(Mesh((("tp", ranks),))).run([program] * ranks)
    for rank, (whole, found, columns, want, got) in enumerate(results):
        needed = mine[rank] | (not is_cut(tokens, ranks, few))
        assert found.dtype is dtype and torch.equal(found.float(), whole.float().where(needed, 0))
        assert torch.equal(columns.float()[0], found.float()) and columns.stride(2) == -(-tokens // 4) * 4
        assert torch.equal(got, want)


def test_other_tokens_are_zeros() -> None:
    experts = torch.tensor([[0, 1], [2, 3], [0, 3], [1, 0]])

    def program() -> torch.Tensor:
        own = own_tokens(torch.ones(4, 2), mesh="tp", ranks=2, few=1)
        return gather_chosen_tokens(own, experts, [4], mesh="tp", ranks=2, few=1, groups=4)

    found = Simulation(Mesh.parse("tp=2")).run([program] * 2)
    assert [each[:, 0].tolist() for each in found] == [[1, 0, 1, 1], [0, 1, 1, 0]]
