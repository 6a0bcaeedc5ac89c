"""The difference of two graphs: the lines that changed, and nothing about locations."""

import qcompiler.dialects  # noqa: F401
from qcompiler.ir import Graph, Location, diff
from qcompiler.testing import random_graph

TEXT = """\
func @f(%x: f32[4]) -> (f32[4]) {
  %a = aten.neg(%x) : f32[4]
  %b = aten.relu(%a) : f32[4]
  %c = aten.silu(%b) : f32[4]
  %d = aten.tanh(%c) : f32[4]
  return %d
}"""


def test_equal_graphs_do_not_differ() -> None:
    for seed in range(50):
        graph = random_graph(seed)
        assert diff(graph, graph.clone()) == ""


def test_locations_do_not_count() -> None:
    before, after = Graph.parse(TEXT), Graph.parse(TEXT)
    after["a"].op.loc = Location("m.py", 3)
    assert diff(before, after) == ""


def test_changed_lines_with_one_line_of_context() -> None:
    before, after = Graph.parse(TEXT), Graph.parse(TEXT)
    after.replace(after["c"], after["b"])
    after.erase(after["c"].op)
    assert (
        diff(before, after)
        == """\
--- before
+++ after
@@ -3,4 +3,3 @@
   %b = aten.relu(%a) : f32[4]
-  %c = aten.silu(%b) : f32[4]
-  %d = aten.tanh(%c) : f32[4]
+  %d = aten.tanh(%b) : f32[4]
   return %d"""
    )


def test_context_can_be_left_out() -> None:
    before, after = Graph.parse(TEXT), Graph.parse(TEXT)
    after.set_args(after["d"].op, (after["a"],))
    assert diff(before, after, context=0).splitlines()[2:] == [
        "@@ -5 +5 @@",
        "-  %d = aten.tanh(%c) : f32[4]",
        "+  %d = aten.tanh(%a) : f32[4]",
    ]


def test_operations_keep_their_lines_when_others_are_inserted() -> None:
    before, after = Graph.parse(TEXT), Graph.parse(TEXT)
    after.insert(after["c"].op, "aten.neg", after["x"], types=[after["x"].type])
    assert [line for line in diff(before, after, context=0).splitlines()[3:]] == ["+  %neg = aten.neg(%x) : f32[4]"]
