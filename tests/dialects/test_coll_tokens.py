"""Collectives over tokens: type rules, and what ranks hold of any number of tokens."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.dialects.coll import own_first
from qcompiler.dialects.coll_tokens import (
    all_gather_tokens,
    all_to_all_tokens,
    own_tokens,
    reduce_scatter_tokens,
    share,
)
from qcompiler.distributed.communicator import current
from qcompiler.distributed.simulation import Simulation
from qcompiler.errors import VerifyError
from qcompiler.ir import Graph, Mesh, evaluate, parse_size

CUT = '{few = 64, mesh = "tp", ranks = 2}'

CODES = "%q: f8e4m3fn[s0, s1, 128], %s: f32[s0, s1, 1], %w: f8e4m3fn[256, 128], %v: f32[2, 1]"
LINEAR = '{few = 64, mesh = "tp", out_dtype = bf16, ranks = 2, w_format = #fp8_block, x_format = #fp8_tile}'


def graph(inputs: str, op: str, y: str) -> Graph:
    return Graph.parse(
        f"func @m({inputs}) -> ({y}) where s0 in 1.., s1 in 1.. {{\n  %y = coll.{op} : {y}\n  return %y\n}}"
    )


@pytest.mark.parametrize(
    ("inputs", "op", "y"),
    [
        ("%x: f32[s0, s1, 8]", f"own_tokens(%x) {CUT}", "f32[1, share(s0*s1, 2, 64), 8]"),
        ("%x: f32[70, 8]", f"reduce_scatter_tokens(%x) {CUT}", "f32[35, 8]"),
        ("%x: f32[60, 8]", f"reduce_scatter_tokens(%x) {CUT}", "f32[60, 8]"),
        (
            "%p: f32[1, share(7*s0, 2, 64), 8], %n: int(s0)",
            f"all_gather_tokens(%p, [%n, 7]) {CUT}",
            "f32[s0, 7, 8]",
        ),
        ("%x: i8[s0, s1, 8]", f"all_to_all_tokens(%x) {CUT}", "i8[2, 1, share(s0*s1, 2, 64), 8]"),
        ("%x: f32[70, 8]", f"all_to_all_tokens(%x) {CUT}", "f32[2, 35, 8]"),
        (CODES, f"linear_scatter_tokens(%q, %s, %w, %v) {LINEAR}", "bf16[1, share(s0*s1, 2, 64), 256]"),
        ("%k: i64[s0]", 'own_first(%k) {groups = 8, mesh = "tp", ranks = 4}', "i64[s0]"),
        ("%x: f32[s0, 8], %e: i32[4]", "own_rows(%x, %e)", "f32[s0, 8]"),
    ],
)
def test_types(inputs: str, op: str, y: str) -> None:
    graph(inputs, op, y).verify()


@pytest.mark.parametrize(
    ("inputs", "op", "y", "message"),
    [
        ("%x: f32[8]", f"own_tokens(%x) {CUT}", "f32[8]", "which has no axis of tokens before its last one"),
        ("%x: f32[8]", f"all_to_all_tokens(%x) {CUT}", "f32[2, 8]", "which has no axis of tokens before its last one"),
        (CODES, f"linear_scatter_tokens(%q, %s, %w, %v) {LINEAR}", "bf16[s0, s1, 256]", r"bf16\[1, share"),
        (CODES, f"linear_scatter_tokens(%q, %v, %w, %v) {LINEAR}", "bf16[1, s0, 256]", "the scale is "),
        ("%x: f32[s0, 8]", f"own_tokens(%x) {CUT}", "f32[s0, 8]", r"rule requires f32\[share\(s0, 2, 64\), 8\]"),
        ("%x: f32[s0, 8], %n: int(s0)", f"all_gather_tokens(%x, [%n]) {CUT}", "f32[s0, 8]", "but a rank holds "),
        ("%x: f32[s0, 8], %n: int", f"all_gather_tokens(%x, [%n]) {CUT}", "f32[s0, 8]", "the size %n is not known"),
        ("%x: f32[s0, 8], %n: int(s0)", f"all_gather_tokens(%x, %n) {CUT}", "f32[s0, 8]", "must list 1 sizes"),
        ("%k: f32[s0]", 'own_first(%k) {groups = 8, mesh = "tp", ranks = 2}', "f32[s0]", "groups are integers"),
        ("%k: i64[s0]", 'own_first(%k) {groups = 8, mesh = "tp", ranks = 3}', "i64[s0]", "8 groups cannot be divided"),
        ("%x: f32[s0, 8], %e: i32[4, 1]", "own_rows(%x, %e)", "f32[s0, 8]", "the ends of groups of its rows"),
    ],
)  # fmt: skip
def test_wrong_types(inputs: str, op: str, y: str, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        graph(inputs, op, y).verify()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(2, 4), st.integers(1, 12), st.booleans())
def test_what_ranks_hold_is_the_whole(batch: int, length: int, ranks: int, few: int, codes: bool) -> None:
    x = torch.arange(batch * length * 3.0).reshape(batch, length, 3)
    dtype = torch.float8_e4m3fn if codes else torch.float32
    cut: dict[str, Any] = {"mesh": "tp", "ranks": ranks, "few": few}

    def program() -> tuple[torch.Tensor, ...]:
        own = own_tokens(x, **cut).to(dtype)
        sums = reduce_scatter_tokens(x * (1 + current().place("tp")), **cut)
        whole = all_gather_tokens(own, [batch, length], **cut)
        columns = all_gather_tokens(own, [batch, length], scale_layout="col_major", **cut)
        terms = all_to_all_tokens(x.to(dtype), **cut)
        return own, whole, columns, all_gather_tokens(sums, [batch, length], **cut), terms

    mine = share(batch * length, ranks, few)
    assert mine == evaluate(parse_size(f"share(s0, {ranks}, {few})"), {"s0": batch * length})
    assert mine == (batch * length if batch * length < few else -(-batch * length // ranks))
    for own, whole, columns, sums, terms in Simulation(Mesh((("tp", ranks),))).run([program] * ranks):
        assert list(own.shape) == [1, mine, 3]
        assert torch.equal(whole.float(), x.to(dtype).float()) and torch.equal(columns.float(), whole.float())
        assert torch.equal(sums, x * sum(range(1, ranks + 1)))
        assert terms.dtype is dtype and terms.is_contiguous() and list(terms.shape) == [ranks, 1, mine, 3]
        assert all(torch.equal(term.float(), own.float()) for term in terms)
        assert columns.stride(2) == -(-batch * length // 4) * 4  # aligned columns, as kernels read them


def test_terms_are_in_the_order_of_the_ranks() -> None:
    """With fewer tokens than are few, each rank has the terms of all tokens."""

    def program(tokens: int) -> torch.Tensor:
        return all_to_all_tokens(torch.arange(tokens * 2.0).view(tokens, 2) + 100 * current().place("tp"), **cut)

    cut: dict[str, Any] = {"mesh": "tp", "ranks": 3, "few": 3}
    found = Simulation(Mesh.parse("tp=3")).run([partial(program, 4)] * 3)
    assert found[1][:, :, 0].tolist() == [[4, 6], [104, 106], [204, 206]]
    assert found[2].tolist() == [[[0, 0], [0, 0]]] * 3  # zeros after the last token
    few = Simulation(Mesh.parse("tp=3")).run([partial(program, 2)] * 3)
    assert [each[:, :, 0].tolist() for each in few] == [[[0, 2], [100, 102], [200, 202]]] * 3


def test_own_groups_have_the_first_numbers() -> None:
    keys = torch.tensor([0, 5, 3, 2, 4, 1])
    program = partial(own_first, keys, mesh="tp", ranks=3, groups=6)
    found = Simulation(Mesh.parse("tp=3")).run([program] * 3)
    assert [each.tolist() for each in found] == [[0, 5, 3, 2, 4, 1], [4, 3, 1, 0, 2, 5], [2, 1, 5, 4, 0, 3]]
