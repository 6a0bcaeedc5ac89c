"""fuse-norm-quantize and fuse-activation-quantize: one operation for a quantization and the arithmetic before it."""

import pytest
import torch

from passes.fusing.fuse_activation_quantize import FuseActivationQuantize
from passes.fusing.fuse_norm_quantize import FuseNormQuantize
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Op
from qcompiler.pass_manager.instruments import CheckChanged, Validate
from qcompiler.pass_manager.pipeline import Pass, Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.testing import random_inputs, verified

NORM, ACTIVATION = FuseNormQuantize(), FuseActivationQuantize()
FLAT = "bf16[6, 256]"
KINDS = {"%y_q": "f8e4m3fn[6, 256]", "%h3": "bf16[2, 3, 256]", "%y3": "bf16[2, 3, 256]", "%wide": "f32[6, 256]"}
Q = '{format = #fp8_tile<scale_layout = "col_major">}'
QUANTIZED = f"%y_q, %y_s = kernel.quantize(%y) {Q} : f8e4m3fn[6, 256], f32[6, 2]"


def model(lines: str, returned: str = "%y_q", quantized: str = QUANTIZED) -> Graph:
    """A graph of some lines and a quantization of %y, with inputs %x, %r, %x3 (of three dimensions), %v and %n."""
    kinds = ", ".join(KINDS.get(name, FLAT) for name in returned.split(", "))
    return verified(
        Graph.parse(f"""
func @m(%x: {FLAT}, %r: {FLAT}, %x3: bf16[2, 3, 256], %v: f32[256], %n: f32[6, 1]) -> ({kinds}) {{
  %w = core.param() {{name = "w"}} : bf16[256]
  %b = core.param() {{name = "b"}} : bf16[256]
  %state = core.buffer() {{name = "state"}} : {FLAT}
  {lines.strip()}
  {quantized}
  return {returned}
}}""")
    )


def fused(graph: Graph, *steps: Pass) -> list[Op]:
    """What a graph gets, whose numbers must stay the same to the bit, and which must change once only."""
    inputs, graph.weights = random_inputs(graph, 1)
    before = interpret(graph, inputs)
    run_pipeline(Pipeline(steps), graph, instruments=[Validate(), CheckChanged()], inputs=inputs)
    verified(graph)
    for got, want in zip(interpret(graph, inputs), before, strict=True):
        assert got.dtype is want.dtype and torch.equal(got.float(), want.float())
    text = str(graph)
    run_pipeline(Pipeline(steps), graph)
    assert str(graph) == text
    return graph.ops("kernel.fused_quantize")


def shown(op: Op) -> str:
    """The operands, the kept results and the body of an operation."""
    operands, kept = [str(value) for _, value in op.operands()], [str(value) for value in op.results[2:]]
    return f"{', '.join(operands)} -> {', '.join(kept) or '-'} | {op.attrs['body']}"


RMS = """
%f = aten._to_copy(%h) {dtype = f32} : f32[6, 256]
  %p = aten.pow.Tensor_Scalar(%f, 2) : f32[6, 256]
  %m = aten.mean.dim(%p, [-1], true) : f32[6, 1]
  %e = aten.add.Tensor(%m, 1e-06) : f32[6, 1]
  %t = aten.rsqrt(%e) : f32[6, 1]
  %a = aten.mul.Tensor(%f, %t) : f32[6, 256]
  %c = aten._to_copy(%a) {dtype = bf16} : bf16[6, 256]
  %y = aten.mul.Tensor(%w, %c) : bf16[6, 256]"""
SUM = f"%h = aten.add.Tensor(%x, %r) : {FLAT}"
LLAMA = "bf16(x0 + x1); bf16(x2 * bf16(h0 * rsqrt(mean(h0 * h0) + 1e-06)))"
Y_OF_H = f"%y = aten.relu(%h) : {FLAT}"


@pytest.mark.parametrize(
    ("lines", "returned", "result"),
    [
        (f"{SUM}{RMS}", "%y_q, %h", f"%x, %r, %w -> %h | h0 = {LLAMA}"),
        (f"{SUM}{RMS}", "%y_q", f"%x, %r, %w -> - | t0 = {LLAMA.replace('h0', 't0')}"),
        (f"{SUM}{RMS}", "%h, %y, %y_q", "%x, %r, %w -> %h, %y | h0 = " + LLAMA.replace("; ", "; h1 = ") + "; h1"),
        (  # what is only widened is its source for everybody else
            f"{SUM}{RMS}".replace("%f", "%wide"), "%y_q, %wide", f"%x, %r, %w -> %h | h0 = {LLAMA}",
        ),
        (  # T5 multiplies the narrow value
            f"{SUM}{RMS}".replace("mul.Tensor(%f, %t)", "mul.Tensor(%h, %t)"), "%y_q, %h",
            f"%x, %r, %w -> %h | h0 = {LLAMA}",
        ),
        (  # a number for each row that others read: what is computed from it is an operand
            f"{SUM}{RMS}\n  %o = aten.mul.Tensor(%x, %t) : f32[6, 256]\n  %wide = aten.neg(%o) : f32[6, 256]",
            "%y_q, %wide", "%a, %w -> - | bf16(x1 * bf16(x0))",
        ),
        (
            f"%y = aten.layer_norm(%x, [256], %w, %b, 1e-12, false) : {FLAT}", "%y_q, %y",
            "%x, %w, %b -> %y | h0 = bf16(standardize(x0, 1e-12) * x1 + x2); h0",
        ),
        (f"%y = aten.layer_norm(%x, [256]) : {FLAT}", "%y_q", "%x -> - | bf16(standardize(x0, 1e-05))"),
        (
            f"%y = aten.rms_norm(%x, [256]) : {FLAT}", "%y_q",
            "%x -> - | bf16(x0 * rsqrt(mean(x0 * x0) + 1.1920928955078125e-07))",
        ),
        (  # two reductions, as in Gemma, whose second is of what the first has given
            f"""%i = aten.rms_norm(%r, [256], %w, 1e-06) : {FLAT}
            %h = aten.add.Tensor(%x, %i) : {FLAT}
            %y = aten.rms_norm(%h, [256], %b, 1e-06) : {FLAT}""",
            "%y_q, %h",
            "%x, %r, %w, %b -> %h | h0 = bf16(x0 + bf16(x1 * rsqrt(mean(x1 * x1) + 1e-06) * x2)); "
            "bf16(h0 * rsqrt(mean(h0 * h0) + 1e-06) * x3)",
        ),
    ],
)  # fmt: skip
def test_norms(lines: str, returned: str, result: str) -> None:
    steps = (ACTIVATION,) if "mean" not in result and "standardize" not in result else (NORM,)
    (op,) = fused(model(lines, returned), *steps)
    assert shown(op) == result


@pytest.mark.parametrize(
    ("lines", "returned", "result"),
    [
        (
            f"%s = aten.silu(%x) : {FLAT}\n  %y = aten.mul.Tensor(%s, %r) : {FLAT}", "%y_q",
            "%x, %r -> - | bf16(bf16(silu(x0)) * x1)",
        ),
        (f"%y = aten.gelu(%x) : {FLAT}", "%y_q", "%x -> - | bf16(gelu(x0))"),
        (f'%y = aten.gelu(%x) {{approximate = "tanh"}} : {FLAT}', "%y_q", "%x -> - | bf16(gelu_tanh(x0))"),
        (f"%y = aten.add.Tensor(%x, %r) {{alpha = -1}} : {FLAT}", "%y_q", "%x, %r -> - | bf16(x0 - x1)"),
        (f"%y = aten.sub.Tensor(%x, %r) {{alpha = -1}} : {FLAT}", "%y_q", "%x, %r -> - | bf16(x0 + x1)"),
        (f"%y = aten.rsub.Scalar(%x, 2) : {FLAT}", "%y_q", "%x -> - | bf16(2.0 - x0)"),
        (f"%y = aten.div.Tensor(%x, 0.3) : {FLAT}", "%y_q", "%x -> - | bf16(x0 / 0.3)"),
        (f"%y = aten.mul.Scalar(%x, -0.7) : {FLAT}", "%y_q", "%x -> - | bf16(x0 * -0.7)"),
        (f"%y = aten.pow.Tensor_Scalar(%x, 3.0) : {FLAT}", "%y_q", "%x -> - | bf16(bf16(x0 * x0) * x0)"),
        (  # tensors come first, then vectors
            f"%c = aten._to_copy(%v) {{dtype = bf16}} : bf16[256]\n  %u = aten.relu(%r) : {FLAT}\n"
            f"  %y = aten.add.Tensor(%c, %u) : {FLAT}", "%y_q", "%r, %v -> - | bf16(bf16(x1) + bf16(relu(x0)))",
        ),
        (  # in FP32 nothing is rounded, and a vector in FP32 makes it so
            f"%h = aten.sigmoid(%x) : {FLAT}\n  %y = aten.mul.Tensor(%h, %v) : f32[6, 256]", "%y_q",
            "%x, %v -> - | bf16(sigmoid(x0)) * x1",
        ),
        (  # what is kept is named, and so is what is read twice
            f"%t = aten.tanh(%x) : {FLAT}\n  %h = aten.add.Tensor(%t, %t) : {FLAT}\n  {Y_OF_H}", "%y_q, %h",
            "%x -> %h | t0 = bf16(tanh(x0)); h0 = bf16(t0 + t0); bf16(relu(h0))",
        ),
        (  # a value that is written to a buffer is kept for that
            f"{SUM}\n  {Y_OF_H}\n  core.update(%state, %h)", "%y_q",
            "%x, %r -> %h | h0 = bf16(x0 + x1); bf16(relu(h0))",
        ),
        (  # and a buffer is read as it was before
            f"%h = aten.add.Tensor(%state, %r) : {FLAT}\n  {Y_OF_H}\n  core.update(%state, %h)", "%y_q",
            "%state, %r -> %h | h0 = bf16(x0 + x1); bf16(relu(h0))",
        ),
    ],
)  # fmt: skip
def test_activations(lines: str, returned: str, result: str) -> None:
    (op,) = fused(model(lines, returned), NORM, ACTIVATION)
    assert shown(op) == result


def test_a_prescale_is_the_last_factor() -> None:
    prescaled = QUANTIZED.replace("(%y)", "(%y, %v)")
    (op,) = fused(model(f"{SUM}\n  {Y_OF_H}", quantized=prescaled), ACTIVATION)
    assert shown(op) == "%x, %r, %v -> - | bf16(relu(bf16(x0 + x1))) * x2"


def test_rows_that_are_arranged_otherwise_are_arranged_for_it() -> None:
    lines = f"""%h3 = aten.add.Tensor(%x3, %x3) : bf16[2, 3, 256]
      %g3 = aten.relu(%h3) : bf16[2, 3, 256]
      %g = aten.view(%g3, [-1, 256]) : {FLAT}
      %y = aten.add.Tensor(%g, %r) : {FLAT}"""
    graph = model(lines, "%y_q, %h3")
    (op,) = fused(graph, ACTIVATION)
    assert op.attrs["body"] == "h0 = bf16(x0 + x0); bf16(bf16(relu(h0)) + x1)"
    assert op["x"].op.name == "aten.reshape" and op["x"].op["x"] is graph["x3"]
    assert graph["h3"].op.name == "aten.view_as" and graph["h3"].op.args == (op.results[2], graph["x3"])


def test_a_view_of_what_is_kept_is_the_result_itself() -> None:
    lines = f"""%y3 = aten.silu(%x3) : bf16[2, 3, 256]
      %y = aten.view(%y3, [-1, 256]) : {FLAT}
      %h = aten.neg(%y) : {FLAT}"""
    graph = model(lines, "%y_q, %h")
    (op,) = fused(graph, ACTIVATION)
    assert op.results[2] is graph["y"] and graph["h"].op.args == (graph["y"],)
    assert [op.name for op in graph.ops() if not op.name.startswith("core.")] == [
        "aten.reshape", "kernel.fused_quantize", "aten.neg",
    ]  # fmt: skip


def test_it_moves_up_to_the_first_reader_of_what_it_keeps() -> None:
    lines = f"""{SUM}
      %early = aten.tanh(%h) : {FLAT}
      %late = aten.sigmoid(%r) : {FLAT}
      %z = aten.topk(%late, 256) : {FLAT}, i64[6, 256]
      %y = aten.mul.Tensor(%h, %z) : {FLAT}""".replace("%z = aten.topk", "%z, %i = aten.topk")
    graph = model(lines, "%y_q, %early")
    (op,) = fused(graph, ACTIVATION)
    assert shown(op) == "%x, %r, %z -> %h | h0 = bf16(x0 + x1); bf16(h0 * x2)"
    names = [op.name for op in graph.ops() if op.name.startswith(("aten", "kernel"))]
    assert names == ["aten.sigmoid", "aten.topk", "kernel.fused_quantize", "aten.tanh"]


def test_two_quantizations_of_one_norm() -> None:
    second = QUANTIZED.replace("%y_", "%z_").replace(Q, "{format = #fp8_row}").replace("f32[6, 2]", "f32[6, 1]")
    graph = model(f"%y = aten.rms_norm(%x, [256]) : {FLAT}", quantized=f"{QUANTIZED}\n  {second}")
    (op,) = fused(graph, NORM, ACTIVATION)
    assert graph["z_q"].op.args == (op.results[2],) == (graph["y"],)
    reason = "what computes it is no arithmetic on rows: kernel.fused_quantize (%y)"
    assert NORM.explain(graph) == ACTIVATION.explain(graph) == {"z_q": reason}


def test_a_region_shrinks_until_it_fits() -> None:
    lines = "\n".join(f"%a{i} = aten.add.Tensor(%a{i - 1}, %g{i}) : {FLAT}" for i in range(1, 8))
    lines = (
        "\n".join(f"%g{i}, %i{i} = aten.sort(%r, {i % 2}) : {FLAT}, i64[6, 256]" for i in range(1, 8)) + "\n" + lines
    )
    graph = model(lines.replace("%a0", "%x").replace("%a7", "%y"))
    (op,) = fused(graph, ACTIVATION)
    assert [str(value) for value in op.args] == ["%a2", *(f"%g{i}" for i in range(3, 8))]
    assert op.attrs["keep"] == ()


def test_of_three_values_that_others_read_two_are_kept() -> None:
    lines = f"""%h = aten.add.Tensor(%x, %r) : {FLAT}
      %i = aten.relu(%h) : {FLAT}
      %j = aten.neg(%i) : {FLAT}
      %y = aten.mul.Tensor(%j, %r) : {FLAT}"""
    (op,) = fused(model(lines, "%y_q, %h, %i, %j"), ACTIVATION)
    assert shown(op) == "%h, %r -> %i, %j | h0 = bf16(relu(x0)); h1 = bf16(neg(h0)); bf16(h1 * x1)"


ROWS = '{format = #fp8_row<profile = "vllm">}'
LONG = f"""func @m(%x: bf16[3, K]) -> (f8e4m3fn[3, K]) {{
  %h = aten.silu(%x) : bf16[3, K]
  %y = aten.rms_norm(%h, [K]) : bf16[3, K]
  %y_q, %y_s = kernel.quantize(%y) {ROWS} : f8e4m3fn[3, K], f32[3, 1]
  return %y_q
}}"""


def test_long_rows_are_not_reduced() -> None:
    assert fused(Graph.parse(LONG.replace("K", "16384")), NORM)
    graph = Graph.parse(LONG.replace("K", "16400"))
    assert not fused(graph, NORM, ACTIVATION)
    why = "its rows have 16400 columns, and those of a reduction 16384 at most"
    assert NORM.explain(graph) == {"y_q": why}


def test_rows_without_a_fixed_length_are_left_alone() -> None:
    text = LONG.replace("rms_norm(%h, [K])", "relu(%h)").replace("3, K", "3, s0")
    graph = Graph.parse(text.replace("{\n", "where s0 in 1.. {\n", 1))
    assert NORM.explain(graph) == {"y_q": "the length of its rows is not fixed (s0) (%y)"}
    assert not NORM.run(graph) and not ACTIVATION.run(graph)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (f"%y = aten.add.Tensor(%x, 0.3) : {FLAT}", "aten.add.Tensor"),  # torch rounds 0.3 to bf16 on a CPU
        (f"%y = aten.add.Tensor(%x, %r) {{alpha = 2}} : {FLAT}", "aten.add.Tensor"),
        (f"%y = aten.mul.Tensor(%x, inf) : {FLAT}", "aten.mul.Tensor"),
        (f'%y = aten.div.Tensor_mode(%x, %r) {{rounding_mode = "floor"}} : {FLAT}', "aten.div.Tensor_mode"),
        (f"%y = aten.pow.Tensor_Scalar(%x, -2) : {FLAT}", "aten.pow.Tensor_Scalar"),
        ("%y = aten.mul.Tensor(%x, %n) : f32[6, 256]", None),
        (f"%y = aten.view(%x3, [6, 256]) : {FLAT}", "core.input"),
        (f"%m = aten.mean.dim(%x, [-1], true) : bf16[6, 1]\n  %y = aten.sub.Tensor(%x, %m) : {FLAT}", None),
        ("%m = aten.mean.dim(%v, [-1], true) {dtype = f64} : f64[1]\n  %y = aten.sub.Tensor(%x, %m) : f64[6, 256]",
         "aten.sub.Tensor"),
    ],
)  # fmt: skip
def test_what_a_body_cannot_say(lines: str, why: str | None) -> None:
    graph = model(lines)
    expected = f"what computes it is no arithmetic on rows: {why}"
    if why is None:
        expected = "one number a row can be no operand"
    (reason,) = ACTIVATION.explain(graph).values()
    assert reason.partition(" (%")[0] == expected
    assert not ACTIVATION.run(graph)


def test_only_quantizations_of_rows() -> None:
    tensor = QUANTIZED.replace(Q, "{format = #fp8_tensor}").replace("f32[6, 2]", "f32[1, 1]")
    graph = model(f"{SUM}\n  {Y_OF_H}", quantized=tensor)
    assert ACTIVATION.explain(graph) == {"y_q": "one scale is for several rows (%y_s)"}
    assert not ACTIVATION.run(graph)


def test_what_depends_on_a_value_that_it_would_keep() -> None:
    lines = f"""{SUM}
      %i, %j = aten.sort(%h) : {FLAT}, i64[6, 256]
      %t = aten.mul.Tensor(%h, %i) : {FLAT}
      %y = aten.relu(%t) : {FLAT}"""
    (op,) = fused(model(lines, "%y_q, %h"), ACTIVATION)
    assert shown(op) == "%h, %i -> - | bf16(relu(bf16(x0 * x1)))"


@pytest.mark.parametrize("ordered", ["aten.dropout(%r, 0.5, true)", '_c10d_functional.all_reduce(%r, "sum", "0")'])
def test_what_must_happen_in_order_is_not_moved(ordered: str) -> None:
    lines = f"""{SUM}
      %early = aten.tanh(%h) : {FLAT}
      %d = {ordered} : {FLAT}
      %y = aten.mul.Tensor(%h, %d) : {FLAT}"""
    graph = model(lines, "%y_q, %early")
    assert ACTIVATION.run(graph)
    (op,) = verified(graph).ops("kernel.fused_quantize")
    assert shown(op) == "%h, %d -> - | bf16(x0 * x1)"
