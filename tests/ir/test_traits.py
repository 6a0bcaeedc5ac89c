"""What is known of operations by their names: named operands, roles, and declared effects."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import qcompiler.dialects  # noqa: F401  (fills the table)
from passes.cleanup.dead_code import DeadCode
from passes.quantizing.share_quantize import ShareQuantize
from qcompiler import DType, Graph
from qcompiler.interpreter import interpret
from qcompiler.ir import Effects, Role, op_table, traits
from qcompiler.ir.formats import FP8_TILE, INT8_ROW
from qcompiler.ir.op_table import OpDef, declare, declared
from qcompiler.ir.traits import UNKNOWN, traits_of
from qcompiler.ir.types import TensorType
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.schemes.pipelines import QuantizationSpec, assemble

ROWS = TensorType(DType.f32, (4, 8))


def counted(name: str, effects: Effects) -> list[int]:
    """Declares an operation `x -> x + 1` with these effects; the list has an entry for each time it ran."""
    runs: list[int] = []

    def meaning(x: Tensor) -> Tensor:
        runs.append(1)
        return x + 1

    declare(
        OpDef(name, "Test.", ("x",), types=lambda op: (op["x"].type,), meaning=meaning, role=Role.VIEW, effects=effects)
    )
    return runs


@pytest.fixture(scope="module", autouse=True)
def runs() -> Iterator[dict[str, list[int]]]:
    """For each kind of effect, an operation that is declared while these tests run, and an entry for each run."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((op_table, "_TABLE"), (op_table, "_DIALECTS"), (traits, "_KNOWN")):
            patch.setattr(module, name, getattr(module, name).copy())
        yield {kind: counted(f"test_traits.{kind.lower()}", effects) for kind, effects in KINDS.items()}


KINDS = {effect.name: effect for effect in Effects if effect.name is not None} | {"PURE": Effects.PURE}


# Named operands


def one(line: str) -> Graph:
    graph = Graph.parse(f"""
    func @f(%x: f32[4, 8], %w: f32[2, 8], %b: f32[2]) -> (f32[4, 2]) {{
      {line}
      return %y
    }}
    """)
    graph.verify()
    return graph


@pytest.mark.parametrize(
    ("line", "bias"),
    [
        ("%y = aten.linear(%x, %w) : f32[4, 2]", None),
        ("%y = aten.linear(%x, %w, None) : f32[4, 2]", None),
        ("%y = aten.linear(%x, %w, %b) : f32[4, 2]", "b"),
        ("%y = aten.linear(%x, %w) {bias = %b} : f32[4, 2]", "b"),
    ],
)
def test_operands_by_the_names_of_torchs_schema(line: str, bias: str | None) -> None:
    graph = one(line)
    op = graph["y"].op
    assert op["input"] is op["x"] is graph["x"] and op["weight"] is op["w"] is graph["w"]
    assert op.get("bias") is (None if bias is None else graph[bias]) is op.argument("bias")
    assert op.path("weight") == op.path("w") == (1,) and op.path("bias") == ((2,) if len(op.args) > 2 else ("bias",))


def test_the_matrices_of_an_addmm_are_called_as_those_of_any_matmul() -> None:
    graph = Graph.parse("""
    func @f(%x: f32[4, 8], %w: f32[8, 2], %b: f32[2]) -> (f32[4, 2]) {
      %y = aten.addmm(%b, %x, %w) : f32[4, 2]
      return %y
    }
    """)
    assert (graph["y"].op["x"], graph["y"].op["w"]) == (graph["x"], graph["w"])


def test_literals_and_defaults() -> None:
    graph = Graph.parse("""
    func @f(%x: f32[4, 8]) -> (f32[4, 2], f32[4, 8]) {
      %y = aten.slice.Tensor(%x, -1, 0, 2) : f32[4, 2]
      %z = aten.add.Tensor(%x, 1.0) {alpha = 2} : f32[4, 8]
      return %y, %z
    }
    """)
    cut, total = graph["y"].op, graph["z"].op
    assert [cut.argument(name) for name in ("dim", "start", "end", "step")] == [-1, 0, 2, 1]
    assert (total.argument("other"), total.argument("alpha"), total.get("other")) == (1.0, 2, None)
    with pytest.raises(TypeError, match=r"operand 'other' of aten\.add\.Tensor is 1\.0, not a value"):
        total["other"]


@pytest.mark.parametrize("read", ["argument", "path", "__getitem__"])
def test_a_parameter_that_does_not_exist(read: str) -> None:
    op = one("%y = aten.linear(%x, %w, %b) : f32[4, 2]")["y"].op
    with pytest.raises(KeyError, match=r"aten\.linear has no parameter 'weigth'\. Did you mean 'weight'\?"):
        getattr(op, read)("weigth")
    assert op.get("weigth") is None


def test_operands_of_ours_and_the_rest() -> None:
    graph = Graph.parse("""
    func @f(%x: f32[4, 128], %y: f32[4, 128], %z: f32[128]) -> (f8e4m3fn[4, 128]) {
      %q, %s = kernel.fused_quantize(%x, %y, %z) {expression = "bf16(x0 * x1 + x2)", format = #fp8_tile,
        keep = []} : f8e4m3fn[4, 128], f32[4, 1]
      return %q
    }
    """)
    graph.verify()
    op = graph["q"].op
    assert op["x"] is graph["x"] and op.rest == (graph["y"], graph["z"])
    assert op.argument("format") == FP8_TILE and graph["x"].op.rest == ()
    assert graph.return_op.rest == graph.outputs


# Roles


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("core.param", Role.STATE), ("core.buffer", Role.STATE), ("core.input", None), ("core.add", None),
        ("quant.linear", Role.QUANTIZED_MATMUL), ("kernel.fused_linear", Role.QUANTIZED_MATMUL),
        ("kernel.grouped_linear", Role.QUANTIZED_MATMUL), ("quant.quantize_static", Role.QUANTIZE),
        ("kernel.fused_quantize", Role.QUANTIZE), ("quant.dequantize", Role.DEQUANTIZE), ("aten.mm", Role.MATMUL),
        ("aten.einsum", Role.MATMUL), ("aten._to_copy", Role.CAST), ("aten.to.dtype", Role.CAST),
        ("aten.split_with_sizes", Role.VIEW), ("aten.view", Role.VIEW), ("aten._unsafe_view", Role.VIEW),
        ("aten.relu", None), ("aten.relu_", None), ("aten.broadcast_tensors", None), ("aten.nowhere", None),
    ],
)  # fmt: skip
def test_roles(name: str, role: Role | None) -> None:
    assert traits_of(name).role is role


def test_every_operation_of_a_role_has_the_operands_of_the_role() -> None:
    operands = {
        Role.QUANTIZE: {"x"},
        Role.DEQUANTIZE: {"data", "scale"},
        Role.QUANTIZED_MATMUL: {"x", "x_scale", "w", "w_scale"},
    }
    for role, names in operands.items():
        found = [definition for definition in declared(role)]
        assert found and all(names <= {*definition.named} for definition in found)


# Effects


@pytest.mark.parametrize(
    ("name", "effects"),
    [
        ("aten.linear", Effects.PURE), ("quant.quantize", Effects.PURE), ("core.param", Effects.PURE),
        ("core.add", Effects.PURE), ("core.buffer", Effects.READS), ("core.update", Effects.WRITES),
        ("core.input", Effects.CONTROLS), ("core.return", Effects.CONTROLS), ("aten.relu_", Effects.WRITES),
        ("aten.add.out", Effects.WRITES), ("aten.rand_like", Effects.RANDOM), ("aten.dropout", Effects.RANDOM),
        ("aten.bernoulli_.float", Effects.RANDOM | Effects.WRITES), ("aten._assert_async.msg", Effects.CONTROLS),
        ("aten.empty_like", Effects.UNDEFINED), ("aten.new_empty", Effects.UNDEFINED),
        ("aten.zeros_like", Effects.PURE),
        ("_c10d_functional.all_reduce", Effects.COMMUNICATES), ("_c10d_functional.wait_tensor", Effects.COMMUNICATES),
        ("_c10d_functional.all_reduce_", Effects.COMMUNICATES | Effects.WRITES),
        ("symm_mem.one_shot_all_reduce", Effects.COMMUNICATES),
    ],
)  # fmt: skip
def test_effects(name: str, effects: Effects) -> None:
    assert traits_of(name).effects is effects


def test_an_operation_that_nothing_declares_may_do_anything() -> None:
    assert traits_of("unknown.op") is UNKNOWN
    assert UNKNOWN.effects.ordered and not UNKNOWN.effects.repeatable


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_unused_goes_unless_it_must_happen(kind: str) -> None:
    graph = Graph()
    x = graph.add_input("x", ROWS)
    graph.append(f"test_traits.{kind.lower()}", x)
    graph.set_outputs([x])
    goes = kind in ("PURE", "READS", "UNDEFINED")
    assert DeadCode().run(graph) == goes and len(graph.ops()) == (not goes)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_pure_is_constant_and_shared(kind: str) -> None:
    graph = Graph()
    w = graph.append("core.param", attrs={"name": "w"}, types=[ROWS]).result
    twins = [graph.append(f"test_traits.{kind.lower()}", w).result for _ in range(2)]
    graph.set_outputs([graph.append("aten.add.Tensor", *twins, types=[ROWS]).result])
    assert graph.is_constant(twins[0]) == (kind == "PURE")
    assert ShareQuantize().run(graph) == (kind == "PURE")


COLLECTIVES = """
func @f(%x: f32[s0, 256]) -> (f32[s0, 128]) {
  %w = core.param() {name = "w"} : f32[128, 256]
  %r = _c10d_functional.all_reduce(%w, "sum", "0") : f32[128, 256]
  %again = _c10d_functional.all_reduce(%w, "sum", "0") : f32[128, 256]
  %w1 = _c10d_functional.wait_tensor(%r) : f32[128, 256]
  %w2 = _c10d_functional.wait_tensor(%again) : f32[128, 256]
  %w3 = aten.add.Tensor(%w1, %w2) : f32[128, 256]
  %barrier = _c10d_functional.all_reduce(%x, "sum", "0") : f32[s0, 256]
  %y = aten.linear(%x, %w3) : f32[s0, 128]
  return %y
}
"""


@pytest.mark.parametrize("spec", [QuantizationSpec(), QuantizationSpec(INT8_ROW, INT8_ROW)])
def test_a_collective_survives_the_pipeline_and_is_not_evaluated(
    spec: QuantizationSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = Graph.parse(COLLECTIVES)
    graph.verify()
    graph.weights["w"] = torch.randn(128, 256)
    before = [str(op) for op in graph.ops() if op.name.startswith("_c10d")]
    run_pipeline(assemble({spec: ("*",)}), graph)
    assert [str(op) for op in graph.ops() if op.name.startswith("_c10d")] == before
    assert not graph.is_constant(graph["w3"]) and graph["y"].op.name == "aten.linear"


@pytest.mark.parametrize("kind", ["PURE", "COMMUNICATES"])
def test_what_is_computed_when_compiling_and_in_a_call(kind: str, runs: dict[str, list[int]]) -> None:
    name, ran = f"test_traits.{kind.lower()}", runs[kind]
    graph = Graph()
    x = graph.add_input("x", TensorType(DType.f32, (4, 256)))
    w = graph.append("core.param", attrs={"name": "w"}, types=[TensorType(DType.f32, (128, 256))]).result
    made = graph.append(name, w).result
    graph.set_outputs([graph.append("aten.linear", x, made, types=[TensorType(DType.f32, (4, 128))]).result])
    graph.weights["w"] = torch.randn(128, 256)
    ran.clear()
    run_pipeline(assemble({QuantizationSpec(): ("*",)}), graph)
    assert bool(ran) == (kind == "PURE")
    ran.clear()
    interpret(graph, [torch.randn(4, 256)])
    assert bool(ran) == (kind == "COMMUNICATES")
