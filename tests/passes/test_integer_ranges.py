"""Limits of integer values: no element of a random call is outside, and each operation of the table has some."""

import pytest
import torch

from passes.analyses.integer_ranges import is_false, is_permutation, limits_of
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.ir.sizes import evaluate

TEXT = """
func @experts(%scores: f32[s0, 8], %small: f32[s0, 5], %free: i64[s0, 2]) -> ({types}) where s0 in 1.. {{
  %n = aten.sym_size.int(%scores, 0) : int(s0)
  %best, %expert = aten.topk(%scores, 2) : f32[s0, 2], i64[s0, 2]
  %flat = aten.view(%expert, [-1]) : i64[2*s0]
  %key, %order = aten.sort(%flat) : i64[2*s0], i64[2*s0]
  %order_2 = aten.argsort(%key) : i64[2*s0]
  %token = aten.floor_divide(%order, 2) : i64[2*s0]
  %of_order = aten.index.Tensor(%key, [%order]) : i64[2*s0]
  %narrow = aten._to_copy(%key) {{dtype = i32}} : i32[2*s0]
  %unknown = aten._to_copy(%order) {{dtype = i32}} : i32[2*s0]
  %wide = aten._to_copy(%narrow) {{dtype = i64}} : i64[2*s0]
  %most = aten.argmax(%small, -1) : i64[s0]
  %low, %least = aten.min.dim(%small, 0) : f32[5], i64[5]
  %both = aten.cat([%flat, %key]) : i64[4*s0]
  %mixed = aten.cat([%flat, %order]) : i64[4*s0]
  %negative = aten.neg(%flat) : i64[2*s0]
  %half = aten.floor_divide(%negative, 2) : i64[2*s0]
  %empty = aten.empty_like(%order) : i64[2*s0]
  %m = core.mul(2, %n) : int(2*s0)
  %count = aten.arange(%m) : i64[2*s0]
  %place = aten.index_put(%empty, [%order], %count) : i64[2*s0]
  %partly = aten.index_put(%order, [%token], %count) : i64[2*s0]
  %top = aten.slice.Tensor(%place, 0, 0, 1) : i64[1]
  return {values}
}}
"""
KNOWN = {
    "expert": "0 7", "flat": "0 7", "key": "0 7", "order": "0 2*s0 - 1", "order_2": "0 2*s0 - 1",
    "token": "0 s0 - 1", "of_order": "0 7", "narrow": "0 7", "wide": "0 7", "both": "0 7", "most": "0 4",
    "least": "0 s0 - 1", "count": "0 2*s0 - 1", "place": "0 2*s0 - 1", "top": "0 2*s0 - 1",
}  # fmt: skip
UNKNOWN = ("unknown", "mixed", "negative", "half", "partly", "free")


def graph_of() -> Graph:
    """The graph, with the known values as its outputs."""
    first = Graph.parse(TEXT.format(types="i64[s0, 2]", values="%expert"))
    types = ", ".join(str(first[name].type) for name in KNOWN)
    return Graph.parse(TEXT.format(types=types, values=", ".join(f"%{name}" for name in KNOWN)))


def test_limits() -> None:
    graph = graph_of()
    found = {name: limits_of(graph[name]) for name in (*KNOWN, *UNKNOWN)}
    assert {name: f"{limits.low} {limits.high}" for name, limits in found.items() if limits} == KNOWN
    assert [name for name in KNOWN if is_permutation(graph[name])] == ["order", "order_2"]


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_elements_are_inside(rows: int) -> None:
    graph = graph_of()
    torch.manual_seed(rows)
    inputs = [torch.randn(rows, 8), torch.randn(rows, 5), torch.randint(-9, 9, (rows, 2))]
    for name, value in zip(KNOWN, interpret(graph, inputs), strict=True):
        limits = limits_of(graph[name])
        assert limits is not None
        low, high = (evaluate(size, {"s0": rows}) for size in limits)
        assert low <= value.min() and value.max() <= high, name


@pytest.mark.parametrize(
    ("mask", "false"),
    [
        ("aten.ge.Scalar(%ids, 8)", True),
        ("aten.ge.Scalar(%ids, 7)", False),
        ("aten.lt.Scalar(%ids, 0)", True),
        ("aten.eq.Scalar(%ids, 9)", True),
        ("aten.eq.Scalar(%ids, 7)", False),
        ("aten.gt.Scalar(%free, 9)", False),
    ],
)
def test_masks_that_are_never_true(mask: str, false: bool) -> None:
    graph = Graph.parse(f"""
func @mask(%scores: f32[s0, 8], %free: i64[s0, 2]) -> (b8[s0, 2]) where s0 in 1.. {{
  %best, %ids = aten.topk(%scores, 2) : f32[s0, 2], i64[s0, 2]
  %mask = {mask} : b8[s0, 2]
  return %mask
}}
""")
    assert is_false(graph, graph["mask"]) is false
