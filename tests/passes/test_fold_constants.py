"""fold-constants: quantized weights and arithmetic on weights are stored, and unused originals are removed."""

import weakref
from collections.abc import Iterator, MutableMapping

import pytest
import torch

from passes.cleanup.fold_constants import FoldConstants, WeightArithmetic
from qcompiler import numerics
from qcompiler.interpreter import interpret
from qcompiler.ir import Derivation, Graph
from qcompiler.ir.dataflow import part_of
from qcompiler.pass_manager.pipeline import Pipeline
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
    """A graph up to fuse-linear, with weights and inputs, and its outputs."""
    graph = Graph.parse(text)
    inputs, graph.weights = random_inputs(graph, 2)
    for step in TO_FUSED:
        step.run(graph)
    return graph, inputs, interpret(graph, inputs)


def test_a_name_used_before_is_not_reused() -> None:
    """A weight may be removed from the graph while its derivation is kept: the next weight must not replace it."""
    graph, _, _ = prepared(CHAIN)
    (first, _), _ = (op.results for op in graph.ops("quant.quantize") if graph.is_constant(op["x"]))
    kept = Derivation(part_of(first.op), 0)
    graph.derivations["blocks.0.w_q"] = kept
    FoldConstants().run(graph)
    assert graph.derivations["blocks.0.w_q"] is kept and "blocks.0.w_q_1" in graph.weights


def test_a_weight_may_have_any_name() -> None:
    """torch allows any name; the value gets one that the text form can spell, and the weight keeps its name."""
    text = CHAIN.replace('"blocks.0.w"', '"my weight"').replace('"blocks.1.w"', '"my@weight"')
    graph, inputs, before = prepared(text)
    FoldConstants().run(graph)
    graph.verify()
    assert all(map(torch.equal, interpret(graph, inputs), before))
    assert sorted(graph.weights) == ["my weight_q", "my weight_s", "my@weight_q", "my@weight_s"]
    made = {str(op.attrs["name"]): op.result.name for op in graph.ops("core.param")}
    assert (made["my weight_q"], made["my@weight_q"]) == ("my_weight_q", "my_weight_q_1")
    assert str(Graph.parse(str(graph))) == str(graph)


def test_equal_bits_and_originals_are_removed() -> None:
    graph, inputs, before = prepared(CHAIN)
    original = graph.weights["blocks.1.w"]
    assert FoldConstants().run(graph)
    graph.verify()
    assert all(map(torch.equal, interpret(graph, inputs), before))
    assert sorted(graph.weights) == ["blocks.0.w_q", "blocks.0.w_s", "blocks.1.w_q", "blocks.1.w_s"]
    q, s = numerics.quantize(original.t(), numerics.format_of((128, 128)))
    assert torch.equal(graph.weights["blocks.1.w_q"].float(), q.float())
    assert torch.equal(graph.weights["blocks.1.w_s"], s)
    assert str(graph["blocks.1.w_q"].op.loc) == 'loc("m.py":5 by "fold-constants")'
    assert not FoldConstants().run(graph)
    assert FoldConstants().explain(graph) == {}


class Counting(MutableMapping[str, torch.Tensor]):
    """A store that creates its tensors on access and counts how many are alive."""

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


def test_an_original_with_other_users_stays() -> None:
    column_sums = "%n = aten.sum.dim_IntList(%a, [0]) : f32[128]\n  %s = aten.mul.Tensor(%z, %n) : f32[3, 128]"
    graph, inputs, before = prepared(CHAIN.replace("return %z", f"{column_sums}\n  return %s"))
    FoldConstants().run(graph)
    graph.verify()
    assert "blocks.0.w" in graph.weights
    assert "blocks.1.w" not in graph.weights
    assert all(map(torch.equal, interpret(graph, inputs), before))


def test_the_store_of_another_graph_is_not_modified() -> None:
    graph, inputs, before = prepared(CHAIN)
    twin = graph.clone()
    FoldConstants().run(graph)
    assert all(map(torch.equal, interpret(twin, inputs), before))


def test_names_that_are_already_used() -> None:
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
    assert sorted(graph.weights) == ["blocks.0.w_q", "blocks.0.w_s", "blocks.1.w_q", "blocks.1.w_s"]
    assert all(map(torch.equal, interpret(graph, inputs), before))


def test_a_graph_without_weight_data_is_rewritten_in_the_same_way() -> None:
    graph, _, _ = prepared(CHAIN)
    bare = graph.clone(weights=False)
    FoldConstants().run(graph)
    assert FoldConstants().run(bare)
    bare.verify()
    assert str(bare) == str(graph)
    assert not bare.weights


def test_literals_are_not_stored_in_a_graph_without_weight_data() -> None:
    graph = Graph.parse(
        "func @m(%x: f32[128]) -> (f32[1]) {\n  %o = aten.full([1, 128], 2.0) {dtype = f32} : f32[1, 128]\n"
        '  %q, %s = quant.quantize(%o) {format = #fp8_tile<profile = "vllm">} : '
        "f8e4m3fn[1, 128], f32[1, 1]\n"
        "  %y = aten.view(%s, [1]) : f32[1]\n  return %y\n}"
    )
    assert not FoldConstants().run(graph)


ARITHMETIC = """
func @m(%x: f32[3, 64]) -> ({outputs}) {{
  %g = core.param() {{name = "norm.weight"}} : bf16[64]
  %s = core.param() {{name = "smooth"}} : f32[64]
  %w = core.param() {{name = "fc.weight"}} : bf16[32, 64]
  %v = core.param() {{name = "table"}} : f32[32, 64]
  %b = core.buffer() {{name = "state"}} : f32[64]
{expression}
  return {names}
}}
"""


def folded(expression: str, outputs: str = "f32[3, 64]", names: str = "%y") -> tuple[Graph, list[torch.Tensor], Graph]:
    """A graph before and after fold-constants, and its inputs; checks that both compute the same bits."""
    graph = Graph.parse(ARITHMETIC.format(outputs=outputs, expression=expression, names=names))
    graph.verify()
    inputs, graph.weights = random_inputs(graph, 4)
    before = graph.clone()
    results = interpret(before, inputs)
    changed = FoldConstants().run(graph)
    graph.verify()
    assert changed == (str(graph) != str(before)) and not FoldConstants().run(graph)
    assert all(map(torch.equal, interpret(graph, inputs), results))
    return graph, inputs, before


def params(graph: Graph) -> list[str]:
    return [str(op.attrs["name"]) for op in graph.ops("core.param")]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("aten.mul.Tensor(%g, %s)", "f32[64]"), ("aten.mul.Scalar(%g, 2)", "bf16[64]"),
        ("aten.div.Tensor(%g, %s)", "f32[64]"), ("aten.add.Tensor(%g, %s) {alpha = 2}", "f32[64]"),
        ("aten.add.Scalar(%g, 1)", "bf16[64]"), ("aten.sub.Tensor(%g, %s)", "f32[64]"),
        ("aten.rsub.Scalar(%g, 1)", "bf16[64]"), ("aten.neg(%g)", "bf16[64]"),
        ("aten._to_copy(%g) {dtype = f32}", "f32[64]"), ("aten.to.dtype(%g, f16)", "f16[64]"),
        ("aten.to.dtype(%g, bf16)", "bf16[64]"),
    ],
)  # fmt: skip
def test_arithmetic_on_weights_is_computed_once(line: str, kind: str) -> None:
    graph, _, before = folded(f"  %f = {line} : {kind}\n  %y = aten.mul.Tensor(%x, %f) : f32[3, 64]")
    unread = [] if "%s" in line else ["smooth"]
    assert params(graph) == [*unread, "fc.weight", "table", "norm.weight_folded"]
    assert "norm.weight" not in graph.weights and str(graph["norm.weight_folded"].type) == kind
    assert torch.equal(graph.weights["norm.weight_folded"], interpret(part_of(before["f"].op), [], before.weights)[0])
    assert "norm.weight" in before.weights  # the store of the cloned graph is a different one


def test_a_chain_is_folded_at_its_end() -> None:
    graph, _, _ = folded(
        "  %a = aten.mul.Tensor(%w, %s) : f32[32, 64]\n  %c = aten._to_copy(%a) {dtype = bf16} : bf16[32, 64]\n"
        "  %h = aten._to_copy(%x) {dtype = bf16} : bf16[3, 64]\n  %y = aten.linear(%h, %c) : bf16[3, 32]",
        "bf16[3, 32]",
    )
    assert params(graph) == ["norm.weight", "table", "fc.weight_folded"]
    assert graph["y"].op["weight"] is graph["fc.weight_folded"]


def test_factors_shared_by_several_weights() -> None:
    graph, _, _ = folded(
        "  %a = aten.mul.Tensor(%w, %s) : f32[32, 64]\n  %d = aten._to_copy(%a) {dtype = bf16} : bf16[32, 64]\n"
        "  %c = aten.mul.Tensor(%v, %s) : f32[32, 64]\n  %h = aten._to_copy(%x) {dtype = bf16} : bf16[3, 64]\n"
        "  %y = aten.linear(%h, %d) : bf16[3, 32]\n  %z = aten.linear(%x, %c) : f32[3, 32]",
        "bf16[3, 32], f32[3, 32]",
        "%y, %z",
    )
    assert params(graph) == ["norm.weight", "fc.weight_folded", "table_folded"]
    assert {"smooth", "fc.weight", "table"}.isdisjoint(graph.weights)


MISSED = [
    ("  %y = aten.neg(%x) : f32[3, 64]", "y", "it is computed from the inputs"),
    ("  %f = aten.add.Tensor(%b, %s) : f32[64]\n  %y = aten.mul.Tensor(%x, %f) : f32[3, 64]", "f",
     "it is computed from the inputs"),  # a buffer may change
    ("  %f = aten.neg(%g) : bf16[64]\n  %h = aten.exp(%f) : bf16[64]\n  %y = aten.mul.Tensor(%x, %h) : f32[3, 64]", "f",
     "it feeds only other constants"),
    ("  %f = aten.neg(%s) : f32[64]\n  %y = aten.view(%f, [1, 64]) : f32[1, 64]", "f",
     "it feeds only other constants"),
    ("  %y = aten.neg(%s) : f32[64]", "y", "it is an output of the graph, and a weight must not be"),
    ("  %y = aten.neg(%s) : f32[64]\n  core.update(%b, %y)", "y",
     "it is an output of the graph, and a weight must not be"),
    ("  %f = aten.neg(%s) : f32[64]\n  %y = aten.view(%f, [64]) : f32[64]\n  %h = aten.mul.Tensor(%x, %f) : f32[3, 64]",
     "f", "it is an output of the graph, and a weight must not be"),
    ('  %q, %t = quant.quantize(%w) {format = #int8_row<profile = "vllm">} : i8[32, 64], f32[32, 1]\n'
     "  %d = quant.dequantize(%q, %t) {format = #int8_row, out_dtype = f32} : f32[32, 64]\n"
     "  %f = aten._to_copy(%d) {dtype = bf16} : bf16[32, 64]\n  %h = aten._to_copy(%x) {dtype = bf16} : bf16[3, 64]\n"
     "  %y = aten.linear(%h, %f) : bf16[3, 32]", "f", "it would undo a quantization"),
    ("  %o = aten.full([64], 2.0) {dtype = f32} : f32[64]\n  %f = aten.neg(%o) : f32[64]\n"
     "  %y = aten.mul.Tensor(%x, %f) : f32[3, 64]", "f", "it reads no weights"),
    ("  %f = aten.mul.Tensor(%v, %s) : f32[32, 64]\n  %h = aten.linear(%x, %f) : f32[3, 32]\n"
     "  %y = aten.mm(%h, %v) : f32[3, 64]", "f",
     "one of its weights has other users, so both copies would be stored (%v)"),
    ("  %f = aten._to_copy(%w) {dtype = f32} : f32[32, 64]\n  %y = aten.linear(%x, %f) : f32[3, 32]", "f",
     "it takes more memory than its weights (%f)"),
]  # fmt: skip


@pytest.mark.parametrize(("expression", "name", "reason"), MISSED)
def test_values_that_are_not_folded(expression: str, name: str, reason: str) -> None:
    output = next(line for line in expression.splitlines() if line.startswith("  %y")).rpartition(" : ")[2]
    graph = Graph.parse(ARITHMETIC.format(outputs=output, expression=expression, names="%y"))
    graph.verify()
    assert str(WeightArithmetic().match(graph[name].op, graph)) == reason
    graph, _, _ = folded(expression, output)
    assert name in str(graph) and not [param for param in params(graph) if param.endswith("_folded")]


def test_a_vector_with_other_users_is_still_folded() -> None:
    graph, _, _ = folded(
        "  %f = aten.mul.Tensor(%g, %s) : f32[64]\n  %h = aten.mul.Tensor(%x, %f) : f32[3, 64]\n"
        "  %y = aten.mul.Tensor(%h, %s) : f32[3, 64]"
    )
    assert "norm.weight_folded" in params(graph) and "smooth" in params(graph)


def test_outputs_never_share_memory_with_weights() -> None:
    expression = "  %f = aten.to.dtype(%s, f32) : f32[64]\n  %h = aten.mul.Tensor(%x, %f) : f32[3, 64]"
    graph, inputs, _ = folded(f"{expression}\n  %y = aten.add.Tensor(%h, %f) : f32[3, 64]")
    (y,) = interpret(graph, inputs)
    assert y.data_ptr() not in {tensor.data_ptr() for tensor in graph.weights.values()}
    graph, inputs, _ = folded("  %f = aten._to_copy(%s) {dtype = f32} : f32[64]", "f32[64]", "%f")
    (out,) = interpret(graph, inputs)
    assert out.data_ptr() != graph.weights["smooth"].data_ptr()


def test_both_rules_without_weight_data() -> None:
    text = ARITHMETIC.format(
        outputs="f32[3, 64]",
        expression="  %f = aten.div.Tensor(%g, %s) : f32[64]\n  %y = aten.mul.Tensor(%x, %f) : f32[3, 64]",
        names="%y",
    )
    bare = Graph.parse(text)
    assert FoldConstants().run(bare)
    bare.verify()
    assert not bare.weights and params(bare) == ["fc.weight", "table", "norm.weight_folded"]
