"""fuse-prescale: a multiplication before a quantization is fused into it if its factors are constants per channel."""

import pytest
import torch
from torch import Tensor

from passes.fusing.fuse_prescale import FusePrescale, MulThenQuantize
from qcompiler import numerics
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Missed
from qcompiler.pass_manager.instruments import CheckChanged, Validate
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline

HEAD = """
func @m(%x: {x}[4, 40], %v: f32[40], %s: f32[1, 1]) -> ({outputs}) {{
  %f = core.param() {{name = "f"}} : {f}
"""
Q = "{format = #int8_row} : i8[4, 40], f32[4, 1]"
STATIC = "{format = #int8_tensor} : i8[4, 40]"
CODES = "i8[4, 40]"


def model(expression: str, factors: Tensor, x: str = "f32", outputs: str = CODES, returned: str = "%q") -> Graph:
    kind = f"{ {torch.float32: 'f32', torch.bfloat16: 'bf16', torch.float64: 'f64'}[factors.dtype] }"
    graph = Graph.parse(
        HEAD.format(x=x, f=f"{kind}{list(factors.shape)}", outputs=outputs) + f"{expression}  return {returned}\n}}"
    )
    graph.verify()
    graph.weights = {"f": factors}
    return graph


def inputs(x: str = "f32") -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}[x]
    return [torch.randn(4, 40, generator=rng).to(dtype), torch.rand(40, generator=rng), torch.full((1, 1), 0.01)]


PLAIN = torch.linspace(0.3, 3, 40)
POWERS = 2.0 ** torch.arange(-20, 20)
WIDE = "  %p = aten.mul.Tensor(%x, %f) : f32[4, 40]\n"
CAST = "  %c = aten._to_copy(%p) {{dtype = {x}}} : {x}[4, 40]\n"


@pytest.mark.parametrize("x", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("swapped", [False, True])
def test_an_fp32_multiplication_is_fused_with_equal_bits(x: str, swapped: bool) -> None:
    expression = WIDE.replace("%x, %f", "%f, %x") if swapped else WIDE
    graph = model(f"{expression}  %q, %t = quant.quantize(%p) {Q}\n", PLAIN, x)
    before = interpret(graph, inputs(x))
    run_pipeline(Pipeline((FusePrescale(),)), graph, instruments=[Validate(), CheckChanged()], inputs=inputs(x))
    assert graph["q"].op.args == (graph["x"], graph["f"])
    assert not graph.ops("aten.mul.Tensor")
    assert torch.equal(interpret(graph, inputs(x))[0], before[0])
    want = numerics.quantize(inputs(x)[0], numerics.format_of((1, -1), torch.int8), prescale=PLAIN)[0]
    assert torch.equal(before[0], want)
    assert not FusePrescale().run(graph) and FusePrescale().explain(graph) == {}


@pytest.mark.parametrize(("factors", "exact"), [(POWERS, True), (PLAIN, False)])
def test_a_cast_between_them_is_fused_too(factors: Tensor, exact: bool) -> None:
    graph = model(WIDE + CAST.format(x="bf16") + f"  %q, %t = quant.quantize(%c) {Q}\n", factors, "bf16")
    (before,) = interpret(graph, inputs("bf16"))
    assert FusePrescale().run(graph)
    graph.verify()
    assert [op.name for op in graph.ops()] == ["core.param", "quant.quantize"]
    (after,) = interpret(graph, inputs("bf16"))
    assert torch.equal(after, before) == exact
    assert int((after.int() - before.int()).abs().max()) <= (0 if exact else 1)


def test_a_static_quantization() -> None:
    graph = model(f"{WIDE}  %q = quant.quantize_static(%p, %s) {STATIC}\n", PLAIN)
    (before,) = interpret(graph, inputs())
    assert FusePrescale().run(graph)
    graph.verify()
    assert graph["q"].op.args == (graph["x"], graph["s"], graph["f"])
    assert torch.equal(interpret(graph, inputs())[0], before)


def test_a_multiplication_with_other_users_stays_for_them() -> None:
    expression = f"{WIDE}  %q, %t = quant.quantize(%p) {Q}\n  %r = quant.quantize_static(%p, %s) {STATIC}\n"
    graph = model(expression, PLAIN, outputs=f"{CODES}, {CODES}, f32[4, 40]", returned="%q, %r, %p")
    before = interpret(graph, inputs())
    assert FusePrescale().run(graph)
    graph.verify()
    assert graph["q"].op["prescale"] is graph["r"].op["prescale"] is graph["f"]
    assert graph["p"] in graph.outputs
    assert all(map(torch.equal, interpret(graph, inputs()), before))


def test_of_two_multiplications_the_last_one_is_fused() -> None:
    twice = "  %h = aten.mul.Tensor(%x, %f) : f32[4, 40]\n  %p = aten.mul.Tensor(%h, %f) : f32[4, 40]\n"
    graph = model(f"{twice}  %q, %t = quant.quantize(%p) {Q}\n", PLAIN)
    (before,) = interpret(graph, inputs())
    assert FusePrescale().run(graph)
    assert graph["q"].op.args == (graph["h"], graph["f"])
    assert torch.equal(interpret(graph, inputs())[0], before)
    op = graph["q"].op
    assert str(MulThenQuantize().match(op, graph)) == "it already has a prescale" and not FusePrescale().run(graph)


NO_VECTOR = "its input is not an activation times a constant FP32 vector (%p)"


@pytest.mark.parametrize(
    ("expression", "factors", "x", "reason"),
    [
        (WIDE.replace(": f32", ": f64"), PLAIN, "f64", NO_VECTOR),
        (WIDE.replace(": f32", ": f64"), PLAIN.double(), "f32", NO_VECTOR),
        (WIDE.replace(": f32", ": bf16"), PLAIN.bfloat16(), "bf16", NO_VECTOR),  # multiplied, then rounded to bf16
        (WIDE.replace("%f", "%v"), PLAIN, "f32", NO_VECTOR),
        (WIDE, torch.ones(4, 1), "f32", NO_VECTOR),
        (WIDE, torch.ones(4, 40), "f32", NO_VECTOR),
        (WIDE, torch.ones(1), "f32", NO_VECTOR),
        (WIDE.replace("%f", "2.0"), PLAIN, "f32", "its input is not a multiplication (%p)"),
        (WIDE.replace("mul", "add"), PLAIN, "f32", "its input is not a multiplication (%p)"),
    ],
)
def test_multiplications_that_are_not_fused(expression: str, factors: Tensor, x: str, reason: str) -> None:
    graph = model(f"{expression}  %q, %t = quant.quantize(%p) {Q}\n", factors, x)
    text = str(graph)
    missed = MulThenQuantize().match(graph["q"].op, graph)
    assert isinstance(missed, Missed) and str(missed) == reason
    assert not FusePrescale().run(graph) and str(graph) == text


def test_a_weight_is_not_prescaled() -> None:
    expression = (
        '  %w = core.param() {name = "w"} : f32[4, 40]\n  %p = aten.mul.Tensor(%w, %f) : f32[4, 40]\n'
        f"  %q, %t = quant.quantize(%p) {Q}\n"
    )
    assert not FusePrescale().run(model(expression, PLAIN))


def test_a_cast_with_other_effects_stays() -> None:
    cast = "  %c = aten._to_copy(%p) {dtype = bf16, memory_format = #contiguous_format} : bf16[4, 40]\n"
    graph = model(f"{WIDE}{cast}  %q, %t = quant.quantize(%c) {Q}\n", PLAIN)
    assert str(MulThenQuantize().match(graph["q"].op, graph)) == "its input is not a multiplication (%c)"
