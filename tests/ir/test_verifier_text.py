"""The verifier on graphs that parse and are illegal all the same: each line of the table breaks one rule."""

import pytest

import qcompiler.dialects  # noqa: F401
from qcompiler.errors import VerifyError
from qcompiler.ir import DType, Graph, TensorType, verifier
from qcompiler.testing import random_graph

SEEDS = range(8)

PIECE = """\
  %p.w = core.param() {name = "p.w"} : f32[2, 128]
  %p.b = core.buffer() {name = "p.b"} : f32[2, 128]
  %p.q, %p.s = quant.quantize(%p.x) {format = #fp8_tile<profile = "vllm">} : f8e4m3fn[2, 128], f32[2, 1]
  %p.v, %p.t = quant.quantize(%p.w) {format = #format<f8e4m3fn, block = [1, 64]>} : f8e4m3fn[2, 128], f32[2, 2]
  %p.y = quant.linear(%p.q, %p.s, %p.v, %p.t, None)
    {out_dtype = f32, w_format = #format<f8e4m3fn, block = [1, 64]>, x_format = #fp8_tile} : f32[2, 2]
  %p.i = aten.sym_size.int(%p.x, 0) : int(2)
  %p.z = aten.neg(%p.s) : bf16[2, 1]
  %p.d = quant.dequantize(%p.q, %p.s) {format = #fp8_tile, out_dtype = f32} : f32[2, 128]
  %p.n = aten.neg(%p.d) : f32[2, 128]
  core.update(%p.b, %p.n)
"""


def text_with_piece(seed: int) -> str:
    """A random legal graph that reads %p.x and computes the piece above before it returns."""
    graph = random_graph(seed, runnable=seed % 2 == 0)
    graph.add_input("p.x", TensorType(DType.f32, (2, 128)))
    body, end, rest = graph.text().rpartition("  return")
    return body + PIECE + end + rest


# The rule, what is replaced and by what, the operation that is named, what the caret marks, and the sentence.
TABLE: list[tuple[int, str, str, str, str, str]] = [
    (6, "(%p.q, %p.s, %p.v, %p.t, None)", "(%p.q, %p.s, %p.v)", "%p.y", "",
     "quant.linear takes 4 to 9 arguments (x, x_scale, w, w_scale, bias?, x_tensor_scale?, w_tensor_sc"),
    (6, "(%p.x) {format", "(%p.x, 1) {format", "%p.q", "1",
     "argument 'prescale?' of quant.quantize must be a value, but is 1"),
    (6, "(%p.x) {format", "(%p.x, None, None) {format", "%p.q", "",
     "quant.quantize takes 1 to 2 arguments (x, prescale?), but got 3"),
    (7, "(%p.x) {format", "(%p.x, %p.w) {format", "%p.q", "%p.w",
     "the prescale is f32[2, 128], but f32[2, 128] needs one number for each channel"),
    (6, "(%p.q, %p.s, %p.v", "(%p.q, None, %p.v", "%p.y", "None",
     "argument 'x_scale' of quant.linear must be a value, but is None"),
    (6, "(%p.x) {format", "([%p.x]) {format", "%p.q", "[%p.x]",
     "argument 'x' of quant.quantize must be a value, but is [%p.x]"),
    (6, '(%p.x) {format = #fp8_tile<profile = "vllm">}', "(%p.x)", "%p.q", "",
     "attribute 'format' is missing; it must be a format such as #fp8_tile"),
    (6, '(%p.x) {format = #fp8_tile<profile = "vllm">', "(%p.x) {format = #fp8_tile, formt = 1", "%p.q", "",
     "quant.quantize has no attribute 'formt'. Did you mean 'format'?"),
    (6, '(%p.x) {format = #fp8_tile<profile = "vllm">', "(%p.x) {format = [1, 128]", "%p.q", "",
     "attribute 'format' is [1, 128], but quant.quantize expects a format such as #fp8_tile"),
    (6, '(%p.x) {format = #fp8_tile<profile = "vllm">', "(%p.x) {format = #fp8_tiel", "%p.q", "",
     "attribute 'format' is #fp8_tiel, but quant.quantize expects a format such as #fp8_tile"),
    (6, '(%p.x) {format = #fp8_tile<profile = "vllm">', "(%p.x) {format = f8e4m3fn", "%p.q", "",
     "attribute 'format' is f8e4m3fn, but quant.quantize expects a format such as #fp8_tile"),
    (6, '{name = "p.w"}', "{name = 3}", "%p.w", "", "attribute 'name' is 3, but core.param expects a string"),
    (6, '{name = "p.w"}', "", "%p.w", "", "attribute 'name' is missing; it must be a string"),
    (7, "x_format = #fp8_tile} : f32[2, 2]", "x_format = #fp8_tile} : bf16[2, 2]", "%p.y", "bf16[2, 2]",
     "the result types are bf16[2, 2], but the type rule requires f32[2, 2]"),
    (7, "f8e4m3fn[2, 128], f32[2, 1]", "f8e4m3fn[2, 128], f32[2, 2]", "%p.q", "f8e4m3fn[2, 128], f32[2, 2]",
     "the result types are f8e4m3fn[2, 128], f32[2, 2], but the type rule requires f8e4m3fn[2, 128], f32[2, 1]"),
    (7, "(%p.q, %p.s, %p.v", "(%p.q, %p.t, %p.v", "%p.y", "%p.t",
     "the scale is f32[2, 2], but x_format #fp8_tile over f8e4m3fn[2, 128] needs f32[2, 1]"),
    (7, "(%p.q, %p.s) {", "(%p.q, %p.z) {", "%p.d", "%p.z",
     "the scale is bf16[2, 1], but format #fp8_tile over f8e4m3fn[2, 128] needs f32[2, 1]"),
    (7, "w_format = #format<f8e4m3fn, block = [1, 64]>", "w_format = #fp8_tile", "%p.y", "%p.t",
     "the scale is f32[2, 2], but w_format #fp8_tile over f8e4m3fn[2, 128] needs f32[2, 1]"),
    (7, "%p.t, None)", "%p.t, %p.x)", "%p.y", "%p.x",
     "the bias is f32[2, 128], but the weight f8e4m3fn[2, 128] needs 2 elements"),
    (7, "(%p.q, %p.s) {", "(%p.i, %p.s) {", "%p.d", "",
     "the type rule failed for these operands: %p.i: int(2) is not a tensor"),
    (11, '  %p.b = core.buffer() {name = "p.b"}', '  %p.b = core.param() {name = "p.w"}', "%p.b", '"p.w"',
     'the weight "p.w" is already read by %p.w (core.param)'),
    (11, '{name = "p.b"}', '{name = "p.w"}', "%p.b", '"p.w"', 'the weight "p.w" is already read by %p.w (core.param)'),
    (11, '  %p.b = core.buffer() {name = "p.b"} :', '  %p.b, %p.c = core.buffer() {name = "p.b"} : i8[],', "%p.b", "",
     "a parameter or buffer has one result, not 2"),
    (12, "(%p.b, %p.n)", "(%p.d, %p.n)", "core.update", "%p.d", "%p.d comes from quant.dequantize, not from a buffer"),
    (12, "(%p.b, %p.n)", "(%p.w, %p.n)", "core.update", "%p.w", "%p.w comes from core.param, not from a buffer"),
    (12, "(%p.b, %p.n)", "(%p.b, %p.s)", "core.update", "%p.s", "%p.b is f32[2, 128], but its new value is f32[2, 1]"),
    (12, "(%p.b, %p.n)", "(%p.x, %p.n)\n  core.update(%p.x, %p.b)", "core.update", "%p.x", "%p.x is updated twice"),
    (7, "core.update(%p.b, %p.n)", "%p.u = core.update(%p.b, %p.n) : i8[]", "%p.u", "i8[]",
     "the result types are i8[], but the type rule requires nothing"),
    (13, ": bf16[2, 1]", ": bf16[q9, 1]", "%p.z", "bf16[q9, 1]",
     "%p.z is bf16[q9, 1], but no input has the symbol q9"),
    (13, ": int(2)", ": int(q9 + 1)", "%p.i", "int(q9 + 1)", "%p.i is int(q9 + 1), but no input has the symbol q9"),
    (14, ": bf16[2, 1]", ": bf16[-2, 1]", "%p.z", "bf16[-2, 1]", "which has a negative size"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "old", "new", "named", "culprit", "sentence"), TABLE)
def test_a_broken_text_is_reported(rule: int, old: str, new: str, named: str, culprit: str, sentence: str) -> None:
    for seed in SEEDS:
        text = text_with_piece(seed)
        Graph.parse(text).verify()
        assert text.count(old) == 1
        graph = Graph.parse(text.replace(old, new))
        with pytest.raises(VerifyError) as caught:
            graph.verify(after="some-pass")
        head, *rows = str(caught.value).split("\n")
        assert head.startswith(f"after pass 'some-pass', in @{graph.name}: rule V{rule}: ")
        assert sentence in head
        (at,) = [index for index, row in enumerate(rows) if row.startswith("  > ")]
        assert rows[at][4:].startswith(named)
        start, end = rows[at + 1].index("^"), len(rows[at + 1])
        assert rows[at + 1] == " " * start + "^" * (end - start)
        assert rows[at][start:end] == (culprit or rows[at][4:])
        assert len(rows) <= 2 * verifier.WINDOW + 3


def test_unbacked_symbols_need_no_input() -> None:
    Graph.parse(text_with_piece(0).replace(": bf16[2, 1]", ": bf16[2*u3, 1]")).verify()


def test_the_message_in_full() -> None:
    graph = Graph.parse("""\
func @mlp(%x: bf16[64, 256]) -> (bf16[64, 512]) {
  %w_q = core.param() {name = "fc1.weight_q"} : f8e4m3fn[512, 256]
  %w_s = core.param() {name = "fc1.weight_s"} : f32[4, 2]
  %x_q, %x_s = quant.quantize(%x) {format = #fp8_tile<profile = "vllm">} : f8e4m3fn[64, 256], f32[64, 2]
  %linear = quant.linear(%x_q, %w_s, %w_q, %w_s)
    {out_dtype = bf16, w_format = #fp8_block, x_format = #fp8_tile} : bf16[64, 512] loc("mlp.py":9 in "fc1")
  %silu = aten.silu(%linear) : bf16[64, 512]
  return %silu
}""")
    with pytest.raises(VerifyError) as caught:
        graph.verify(after="fp8-tile")
    assert str(caught.value) == (
        "after pass 'fp8-tile', in @mlp: rule V7: quant.linear: "
        "the scale is f32[4, 2], but x_format #fp8_tile over f8e4m3fn[64, 256] needs f32[64, 2]\n"
        '    %w_s = core.param() {name = "fc1.weight_s"} : f32[4, 2]\n'
        '    %x_q, %x_s = quant.quantize(%x) {format = #fp8_tile<profile = "vllm">}'
        " : f8e4m3fn[64, 256], f32[64, 2]\n"
        "  > %linear = quant.linear(%x_q, %w_s, %w_q, %w_s)"
        " {out_dtype = bf16, w_format = #fp8_block, x_format = #fp8_tile} : bf16[64, 512]\n"
        "                                 ^^^^\n"
        "    %silu = aten.silu(%linear) : bf16[64, 512]\n"
        "    return %silu\n"
        "  source: mlp.py:9"
    )


def test_without_a_pass_the_message_begins_with_the_graph() -> None:
    with pytest.raises(VerifyError, match=r"^in @main: rule V14: aten\.neg: %p\.z is bf16\[-2, 1\], "):
        Graph.parse(text_with_piece(0).replace(": bf16[2, 1]", ": bf16[-2, 1]")).verify()


def long_graph(length: int) -> Graph:
    graph = Graph("long")
    value = graph.add_input("x", TensorType(DType.f32, (2, 128)))
    for _ in range(length):
        value = graph.append("aten.neg", value, types=[value.type]).result
    graph.set_outputs([value])
    return graph


def test_an_error_on_a_long_graph_stays_short() -> None:
    graph = long_graph(2000)
    graph["neg_999"].type = TensorType(DType.f32, (-1,))
    with pytest.raises(VerifyError) as caught:
        graph.verify()
    assert len(str(caught.value)) < 600
    assert "%neg_1001 =" in str(caught.value)
    assert "%neg_1002 =" not in str(caught.value)


def test_a_long_cycle_is_cut_short() -> None:
    graph = long_graph(2000)
    graph.set_args(graph["neg"].op, (graph["neg_1500"],))
    with pytest.raises(VerifyError, match=r"through (%neg[_0-9]* -> ){6}… -> %neg") as caught:
        graph.verify()
    assert len(str(caught.value)) < 900
