"""fold-constants: quantized weights are stored, one at a time, and an original goes as soon as nobody reads it."""

import weakref
from collections.abc import Iterator, MutableMapping

import torch

from passes.fold_constants import FoldConstants
from qcompiler import numerics
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.pass_manager import Pipeline
from qcompiler.testing import random_inputs

TO_FUSED = Pipeline.parse("canonicalize; fp8-tile; share-quantize; fuse-linear")

CHAIN = """
func @m(%x: f32[3, 128]) -> (f32[3, 128]) {
  %a = core.param() {name = "blocks.0.w"} : f32[128, 128]
  %b = core.param() {name = "blocks.1.w"} : f32[128, 128]
  %y = aten.linear(%x, %a) : f32[3, 128]
  %z = aten.mm(%y, %b) : f32[3, 128] loc("m.py":5)
  return %z
}
"""


def prepared(text: str) -> tuple[Graph, list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """A graph up to fuse-linear, with weights and inputs, and what it gives."""
    graph = Graph.parse(text)
    inputs, graph.weights = random_inputs(graph, 2)
    for step in TO_FUSED:
        step.run(graph)
    return graph, inputs, interpret(graph, inputs)


def test_equal_bits_and_the_originals_are_gone() -> None:
    graph, inputs, before = prepared(CHAIN)
    original = graph.weights["blocks.1.w"]
    assert FoldConstants().run(graph)
    graph.verify()
    assert all(map(torch.equal, interpret(graph, inputs), before))
    assert sorted(graph.weights) == ["blocks.0.w_q", "blocks.0.w_s", "blocks.1.w_q", "blocks.1.w_s"]
    q, s = numerics.quantize(original.t(), (128, 128))
    assert torch.equal(graph.weights["blocks.1.w_q"].float(), q.float())
    assert torch.equal(graph.weights["blocks.1.w_s"], s)
    assert str(graph["blocks.1.w_q"].op.loc) == 'loc("m.py":5 by "fold-constants")'
    assert not FoldConstants().run(graph)
    assert FoldConstants().explain(graph) == {}


class Counting(MutableMapping[str, torch.Tensor]):
    """A store that makes its tensors when they are read, and counts how many of them are alive."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes, self.kept = shapes, dict[str, torch.Tensor]()
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most = 0

    def type_of(self, name: str) -> None:
        return None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.kept:
            return self.kept[name]
        tensor = torch.randn(self.shapes[name])
        self.alive.add(tensor)
        self.most = max(self.most, len(self.alive))
        return tensor

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self.kept[name] = tensor

    def __delitem__(self, name: str) -> None:
        (self.kept if name in self.kept else self.shapes).pop(name)

    def __contains__(self, name: object) -> bool:
        return name in self.kept or name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter([*self.kept, *self.shapes])

    def __len__(self) -> int:
        return len(self.kept) + len(self.shapes)


def test_one_original_is_in_memory_at_a_time() -> None:
    graph = Graph.parse(CHAIN)
    for step in TO_FUSED:
        step.run(graph)
    store = Counting({"blocks.0.w": (128, 128), "blocks.1.w": (128, 128)})
    graph.weights = store
    FoldConstants().run(graph)
    assert store.most == 1
    assert not store.shapes
    assert not list(store.alive)


def test_an_original_that_is_read_elsewhere_stays() -> None:
    column_sums = "%n = aten.sum.dim_IntList(%a, [0]) : f32[128]\n  %s = aten.mul.Tensor(%z, %n) : f32[3, 128]"
    graph, inputs, before = prepared(CHAIN.replace("return %z", f"{column_sums}\n  return %s"))
    FoldConstants().run(graph)
    graph.verify()
    assert "blocks.0.w" in graph.weights
    assert "blocks.1.w" not in graph.weights
    assert all(map(torch.equal, interpret(graph, inputs), before))


def test_the_store_of_another_graph_is_not_touched() -> None:
    graph, inputs, before = prepared(CHAIN)
    twin = graph.clone()
    FoldConstants().run(graph)
    assert all(map(torch.equal, interpret(twin, inputs), before))


def test_names_that_are_taken() -> None:
    taken = '  %t = core.param() {name = "blocks.0.w_q"} : f32[128]\n'
    text = CHAIN.replace("  %y =", f"{taken}  %y =").replace("(%x, %a)", "(%x, %a, %t)")
    graph, inputs, before = prepared(text)
    FoldConstants().run(graph)
    graph.verify()
    assert {"blocks.0.w_q", "blocks.0.w_q_1"} <= set(graph.weights)
    assert all(map(torch.equal, interpret(graph, inputs), before))


def test_a_weight_made_of_several_parameters() -> None:
    total = "  %c = aten.add.Tensor(%a, %b) : f32[128, 128]\n"
    text = CHAIN.replace("  %y = aten.linear(%x, %a)", f"{total}  %y = aten.linear(%x, %c)")
    graph, inputs, before = prepared(text)
    FoldConstants().run(graph)
    graph.verify()
    assert sorted(graph.weights) == ["blocks.1.w_q", "blocks.1.w_s", "c_q", "c_s"]
    assert all(map(torch.equal, interpret(graph, inputs), before))


def test_a_graph_without_weights_is_rewritten_alike() -> None:
    graph, _, _ = prepared(CHAIN)
    bare = graph.clone(weights=False)
    FoldConstants().run(graph)
    assert FoldConstants().run(bare)
    bare.verify()
    assert str(bare) == str(graph)
    assert not bare.weights


def test_literals_are_not_stored_in_a_graph_without_weights() -> None:
    graph = Graph.parse(
        "func @m(%x: f32[128]) -> (f32[1]) {\n  %o = aten.full([1, 128], 2.0) {dtype = f32} : f32[1, 128]\n"
        '  %q, %s = quant.quantize(%o) {block = [1, 128], dtype = f8e4m3fn, profile = "vllm"} : '
        "f8e4m3fn[1, 128], f32[1, 1]\n"
        "  %y = aten.view(%s, [1]) : f32[1]\n  return %y\n}"
    )
    assert not FoldConstants().run(graph)
