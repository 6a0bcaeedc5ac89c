"""Type rules of collectives, in graphs with placements and in programs of one rank."""

import pytest

from qcompiler.errors import VerifyError
from qcompiler.ir import Graph

CUT, PARTIAL = "<tp = shard(axis = 1, parts = 2)>", "<tp = partial(parts = 2)>"


def graph(x: str, op: str, y: str) -> Graph:
    return Graph.parse(f"func @m(%x: {x}) -> ({y}) where s0 in 1.. {{\n  %y = coll.{op} : {y}\n  return %y\n}}")


GATHER = 'all_gather(%x) {axis = 1, mesh = "tp", ranks = 2}'
SCATTER = 'reduce_scatter(%x) {axis = 1, mesh = "tp", ranks = 2}'
REDUCE = 'all_reduce(%x) {mesh = "tp"}'


@pytest.mark.parametrize(
    ("x", "op", "y"),
    [
        (f"f32[s0, 8]{PARTIAL}", REDUCE, "f32[s0, 8]"),
        ("f32[s0, 8]", REDUCE, "f32[s0, 8]"),
        (f"f32[s0, 8]{CUT}", GATHER, "f32[s0, 8]"),
        ("f32[s0, 4]", GATHER, "f32[s0, 8]"),
        (f"f32[s0, 8]{PARTIAL}", SCATTER, f"f32[s0, 8]{CUT}"),
        ("f32[s0, 8]", SCATTER, "f32[s0, 4]"),
        (f"f32[s0, 8]{PARTIAL}", 'reshard(%x) {mesh = "tp"}', f"f32[s0, 8]{CUT}"),
    ],
)
def test_types(x: str, op: str, y: str) -> None:
    graph(x, op, y).verify()


@pytest.mark.parametrize(
    ("x", "op", "y", "message"),
    [
        (f"f32[s0, 8]{CUT}", REDUCE, "f32[s0, 8]", "is cut along 'tp', so that its parts are not terms of a sum"),
        (f"f32[s0, 8]{PARTIAL}", REDUCE, f"f32[s0, 8]{PARTIAL}", r"the type rule requires f32\[s0, 8\]"),
        (f"f32[s0, 8]{PARTIAL}", GATHER, "f32[s0, 8]", "which is not cut along axis 1"),
        (f"f32[s0, 8]{CUT}", SCATTER, f"f32[s0, 8]{CUT}", "which is not a partial sum along 'tp'"),
        ("f32[s0, 7]", SCATTER, "f32[s0, 4]", "the 7 elements of axis 1 cannot be cut into 2 equal parts"),
        ("f32[8]", GATHER, "f32[16]", "which has no axis 1"),
        ("f32[8]", "all_reduce(%x)", "f32[8]", "attribute 'mesh' is missing"),
    ],
)
def test_wrong_types(x: str, op: str, y: str, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        graph(x, op, y).verify()
