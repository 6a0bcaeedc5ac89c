"""The table of operations that commute with a scale: each row is checked numerically, with cases that it refuses."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from passes.analyses.channel_labels import runs
from passes.analyses.channel_rules import RULES
from passes.analyses.channel_scale import ScaleRegion, solve
from passes.smoothing.scale_fold import fold
from qcompiler.dialects.aten import overload_of
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Missed, Op, parse_size
from qcompiler.ir.sizes import Size, evaluate
from qcompiler.ir.traits import traits_of

HEAD = """
func @m(%a: f32[s0, 8], %b: f32[s0, 8], %c: f32[4, 8], %q: f32[1, 3, 4], %k: f32[1, 4, 4], %m: b8[s0, 8], %i: i64[3],
        %j: i64[2, 8]) -> (f32[]) where s0 in 2.. {
  %w = core.param() {name = "w"} : f32[8, 8]
  %o = core.param() {name = "o"} : f32[5, 8]
  %half = core.param() {name = "half"} : f32[5, 4]
  %twice = core.param() {name = "twice"} : f32[5, 16]
  %gain = core.param() {name = "gain"} : f32[8]
  %v = aten.linear(%a, %w) : f32[s0, 8]
  %u = aten.linear(%c, %w) : f32[4, 8]
"""
V2 = "%h = aten.view(%v, [-1, 2, 4]) : f32[s0, 2, 4]\n"
FLAT = "%r = aten.view(%g, [-1, 8]) : f32[s0, 8]\n"
SWAPPED = "%r = aten.cat([%h.1, %h.0], -1) : f32[s0, 8]\n"
BATCH = "%h = aten.unsqueeze(%u, 0) : f32[1, 4, 8]\n"

LEGAL: dict[str, str] = {
    "aten.clone": "%r = aten.clone(%v) : f32[s0, 8]",
    "aten.contiguous": "%r = aten.contiguous(%v) : f32[s0, 8]",
    "aten.alias": "%r = aten.alias(%v) : f32[s0, 8]",
    "aten.detach": "%r = aten.detach(%v) : f32[s0, 8]",
    "aten.dropout": "%r = aten.dropout(%v, 0.5, false) : f32[s0, 8]",
    "aten._to_copy": "%h = aten._to_copy(%v) {dtype = bf16} : bf16[s0, 8]\n"
    "%r = aten._to_copy(%h) {dtype = f32} : f32[s0, 8]",
    "aten.to.dtype": "%h = aten.to.dtype(%v, bf16) : bf16[s0, 8]\n%r = aten.to.dtype(%h, f32) : f32[s0, 8]",
    "aten.neg": "%r = aten.neg(%v) : f32[s0, 8]",
    "aten.relu": "%r = aten.relu(%v) : f32[s0, 8]",
    "aten.leaky_relu": "%r = aten.leaky_relu(%v, 0.1) : f32[s0, 8]",
    "aten.abs": "%r = aten.abs(%v) : f32[s0, 8]",
    "aten.add.Tensor": "%h = aten.add.Tensor(%v, %gain) {alpha = -2} : f32[s0, 8]\n"
    "%r = aten.add.Tensor(%h, 0) : f32[s0, 8]",
    "aten.sub.Tensor": "%g = aten.relu(%v) : f32[s0, 8]\n%r = aten.sub.Tensor(%v, %g) : f32[s0, 8]",
    "aten.mul.Tensor": "%g = aten.mul.Tensor(%b, %v) : f32[s0, 8]\n%h = aten.mul.Tensor(%g, 3) : f32[s0, 8]\n"
    "%r = aten.mul.Tensor(%h, %m) : f32[s0, 8]",
    "aten.mul.Scalar": "%r = aten.mul.Scalar(%v, -0.3) : f32[s0, 8]",
    "aten.div.Tensor": "%h = aten.div.Tensor(%v, %b) : f32[s0, 8]\n%r = aten.div.Tensor(%h, 3.0) : f32[s0, 8]",
    "aten.div.Scalar": "%r = aten.div.Scalar(%v, 3.0) : f32[s0, 8]",
    "aten.where.self": "%g = aten.neg(%v) : f32[s0, 8]\n%r = aten.where.self(%m, %v, %g) : f32[s0, 8]",
    "aten.masked_fill.Scalar": "%r = aten.masked_fill.Scalar(%v, %m, 0) : f32[s0, 8]",
    "aten.view": V2 + "%g = aten.relu(%h) : f32[s0, 2, 4]\n" + FLAT,
    "aten.reshape": "%h = aten.reshape(%v, [-1, 2, 4]) : f32[s0, 2, 4]\n%r = aten.reshape(%h, [-1, 8]) : f32[s0, 8]",
    "aten._unsafe_view": V2 + "%r = aten._unsafe_view(%h, [-1, 1, 8]) : f32[s0, 1, 8]",
    "aten.flatten.using_ints": V2 + "%r = aten.flatten.using_ints(%h, 1) : f32[s0, 8]",
    "aten.unflatten.int": "%g = aten.unflatten.int(%v, 1, [2, 4]) : f32[s0, 2, 4]\n" + FLAT,
    "aten.unsqueeze": "%r = aten.unsqueeze(%v, 1) : f32[s0, 1, 8]",
    "aten.squeeze": "%h = aten.unsqueeze(%v, 1) : f32[s0, 1, 8]\n%r = aten.squeeze(%h) : f32[s0, 8]",
    "aten.squeeze.dim": "%h = aten.unsqueeze(%v, 1) : f32[s0, 1, 8]\n%r = aten.squeeze.dim(%h, 1) : f32[s0, 8]",
    "aten.squeeze.dims": "%h = aten.unsqueeze(%v, 0) : f32[1, s0, 8]\n%r = aten.squeeze.dims(%h, [0]) : f32[s0, 8]",
    "aten.t": "%h = aten.t(%v) : f32[8, s0]\n%r = aten.t(%h) : f32[s0, 8]",
    "aten.transpose.int": V2 + "%g = aten.transpose.int(%h, 1, -1) : f32[s0, 4, 2]\n"
    "%r = aten.reshape(%g, [-1, 8]) : f32[s0, 8]",
    "aten.permute": V2 + "%p = aten.permute(%h, [1, 0, 2]) : f32[2, s0, 4]\n"
    "%g = aten.permute(%p, [1, 2, 0]) : f32[s0, 4, 2]\n%r = aten.reshape(%g, [-1, 8]) : f32[s0, 8]",
    "aten.flip": "%r = aten.flip(%v, [0, 1]) : f32[s0, 8]",
    "aten.roll": "%r = aten.roll(%v, [1, 3], [0, 1]) : f32[s0, 8]",
    "aten.expand": V2 + "%n = aten.slice.Tensor(%h, 1, 0, 1) : f32[s0, 1, 4]\n"
    "%e = aten.expand(%n, [-1, 2, 4]) : f32[s0, 2, 4]\n%r = aten.reshape(%e, [-1, 8]) : f32[s0, 8]",
    "aten.repeat": "%r = aten.repeat(%v, [2, 2]) : f32[2*s0, 16]",
    "aten.repeat_interleave.self_int": "%r = aten.repeat_interleave.self_int(%v, 2, 1) : f32[s0, 16]",
    "aten.slice.Tensor": "%h = aten.slice.Tensor(%v, 0, -1) : f32[1, 8]\n"
    "%r = aten.slice.Tensor(%h, 1, 1, 9223372036854775807, 2) : f32[1, 4]",
    "aten.select.int": V2 + "%r = aten.select.int(%h, 1, -1) : f32[s0, 4]",
    "aten.split.Tensor": "%h.0, %h.1 = aten.split.Tensor(%v, 5, -1) : f32[s0, 5], f32[s0, 3]\n" + SWAPPED,
    "aten.split_with_sizes": "%h.0, %h.1 = aten.split_with_sizes(%v, [2, 6], 1) : f32[s0, 2], f32[s0, 6]\n" + SWAPPED,
    "aten.chunk": "%h.0, %h.1 = aten.chunk(%v, 2, 1) : f32[s0, 4], f32[s0, 4]\n" + SWAPPED,
    "aten.unbind.int": V2 + "%h.0, %h.1 = aten.unbind.int(%h, 1) : f32[s0, 4], f32[s0, 4]\n" + SWAPPED,
    "aten.cat": "%g = aten.relu(%v) : f32[s0, 8]\n%r = aten.cat([%g, %v], 1) : f32[s0, 16]",
    "aten.stack": "%g = aten.relu(%v) : f32[s0, 8]\n%h = aten.stack([%g, %v], -1) : f32[s0, 8, 2]\n"
    "%r = aten.reshape(%h, [-1, 16]) : f32[s0, 16]",
    "aten.index_select": "%r = aten.index_select(%u, 0, %i) : f32[3, 8]",
    "aten.index.Tensor": "%n = aten.unsqueeze(%u, 1) : f32[4, 1, 8]\n"
    "%h = aten.index.Tensor(%n, [%j]) : f32[2, 8, 1, 8]\n%t = aten.transpose.int(%h, 1, 2) : f32[2, 1, 8, 8]\n"
    "%r = aten.index.Tensor(%t, [%j, None, %j]) : f32[2, 8, 1, 8]",
    "aten.gather": "%r = aten.gather(%u, 0, %j) : f32[2, 8]",
    "aten.sum.dim_IntList": V2 + "%n = aten.unsqueeze(%h, 1) : f32[s0, 1, 2, 4]\n"
    "%g = aten.sum.dim_IntList(%n, [0, 1]) : f32[2, 4]\n%r = aten.reshape(%g, [1, 8]) : f32[1, 8]",
    "aten.mean.dim": "%r = aten.mean.dim(%u, [0], true) : f32[1, 8]",
    "aten.mm": "%h = aten.select.int(%q, 0, 0) : f32[3, 4]\n%r = aten.mm(%h, %u) : f32[3, 8]",
    "aten.bmm": BATCH + "%r = aten.bmm(%q, %h) : f32[1, 3, 8]",
    "aten.matmul": "%r = aten.matmul(%q, %u) : f32[1, 3, 8]",
    "aten.scaled_dot_product_attention": BATCH + "%r = aten.scaled_dot_product_attention(%q, %k, %h) : f32[1, 3, 8]",
    "attention.causal": "%h = aten.view(%u, [1, 1, 4, 8]) : f32[1, 1, 4, 8]\n"
    "%n = aten.unsqueeze(%k, 0) : f32[1, 1, 4, 4]\n"
    "%g = aten.expand(%n, [1, 2, 4, 4]) : f32[1, 2, 4, 4]\n"
    "%r = attention.causal(%g, %n, %h) {scale = 0.5} : f32[1, 2, 4, 8]",
}
"""Operation -> from %v or %u to %r: a scale of either passes through to the other."""

ROWS = "%z = aten.linear(%h, %half) : f32[8, 5]"
PICKED = "picks along an axis along which the factor varies"
SUMMED = "sums over an axis along which the factor varies"
INPUT = "a graph input cannot absorb a scale"
ALONG = "the factor varies along more than its last axis"
SYMBOLIC = "the channels with an axis of symbolic size"

REFUSED: dict[str, tuple[str, str]] = {
    **{
        f"aten.{name}": (f"%r = aten.{name}(%a{args}) : f32[s0, 8]", INPUT)
        for name, args in {
            "clone": "", "contiguous": "", "alias": "", "detach": "", "neg": "", "relu": "", "leaky_relu": "",
            "abs": "", "mul.Scalar": ", 2", "div.Scalar": ", 2",
        }.items()
    },
    "aten.dropout": ("%r = aten.dropout(%v, 0.5, true) : f32[s0, 8]", "aten.dropout is in training mode"),
    "aten._to_copy": (
        "%h = aten._to_copy(%v) {dtype = i64} : i64[s0, 8]\n%r = aten.relu(%v) : f32[s0, 8]",
        "would not be a floating-point tensor, reached through %r (%h)",
    ),
    "aten.to.dtype": (
        "%h = aten.to.dtype(%v, f8e4m3fn) : f8e4m3fn[s0, 8]\n%r = aten.relu(%v) : f32[s0, 8]",
        "would not be a floating-point tensor, reached through %r (%h)",
    ),
    "aten.add.Tensor": ("%r = aten.add.Tensor(%v, 1.0) : f32[s0, 8]", "aten.add.Tensor adds 1.0, which has no factor"),
    "aten.sub.Tensor": ("%r = aten.sub.Tensor(%v, %b) : f32[s0, 8]", INPUT + ", reached through %r (%b)"),
    "aten.mul.Tensor": (
        "%r = aten.mul.Tensor(%v, %v) : f32[s0, 8]", "both operands of aten.mul.Tensor would be scaled"
    ),
    "aten.div.Tensor": (
        "%h = aten.div.Tensor(%b, %v) : f32[s0, 8]\n%r = aten.relu(%v) : f32[s0, 8]",
        "aten.div.Tensor does not commute with a scale of its 'other', reached through %r (%h)",
    ),
    "aten.where.self": ("%r = aten.where.self(%m, %v, %b) : f32[s0, 8]", INPUT + ", reached through %r (%b)"),
    "aten.masked_fill.Scalar": (
        "%r = aten.masked_fill.Scalar(%v, %m, 1.0) : f32[s0, 8]", "fills in 1.0, which has no factor",
    ),
    "aten.view": ("%h = aten.view(%v, [-1, 4]) : f32[2*s0, 4]\n%z = aten.linear(%h, %half) : f32[2*s0, 5]", SYMBOLIC),
    "aten.reshape": ("%h = aten.reshape(%v, [8, -1]) : f32[8, s0]\n", SYMBOLIC),
    "aten._unsafe_view": ("%h = aten._unsafe_view(%v, [8, -1]) : f32[8, s0]\n", SYMBOLIC),
    "aten.flatten.using_ints": ("%h = aten.flatten.using_ints(%v, 0) : f32[8*s0]\n", SYMBOLIC),
    "aten.unflatten.int": (
        "%h = aten.unflatten.int(%u, 0, [2, 2]) : f32[2, 2, 8]\n%z = aten.gelu(%h) : f32[2, 2, 8]", "aten.gelu",
    ),
    "aten.unsqueeze": (
        '%one = core.param() {name = "one"} : f32[1, 1]\n%n = aten.unsqueeze(%v, 2) : f32[s0, 8, 1]\n'
        "%z = aten.linear(%n, %one) : f32[s0, 8, 1]", ALONG,
    ),
    "aten.squeeze": ("%h = aten.squeeze(%v) : f32[s0, 8]\n%z = aten.exp(%h) : f32[s0, 8]", "aten.exp"),
    "aten.squeeze.dim": ("%h = aten.squeeze.dim(%v, 1) : f32[s0, 8]\n%z = aten.tanh(%h) : f32[s0, 8]", "aten.tanh"),
    "aten.squeeze.dims": ("%h = aten.squeeze.dims(%v, [1]) : f32[s0, 8]\n%z = aten.sin(%h) : f32[s0, 8]", "aten.sin"),
    "aten.t": ("%h = aten.t(%u) : f32[8, 4]\n" + ROWS, ALONG),
    "aten.transpose.int": ("%h = aten.transpose.int(%u, 0, 1) : f32[8, 4]\n" + ROWS, ALONG),
    "aten.permute": ("%h = aten.permute(%u, [1, 0]) : f32[8, 4]\n" + ROWS, ALONG),
    "aten.flip": ("%n = aten.flip(%c, [0]) : f32[4, 8]\n%r = aten.add.Tensor(%n, %u) : f32[4, 8]", INPUT),
    "aten.roll": ("%h = aten.roll(%u, [3]) : f32[4, 8]\n", "aten.roll without dims rolls the flattened tensor"),
    "aten.expand": (
        "%e = aten.expand(%u, [2, 4, 8]) : f32[2, 4, 8]\n"
        "%z = aten.softmax.int(%e, -1) : f32[2, 4, 8]", "aten.softmax.int",
    ),
    "aten.repeat": ("%h = aten.repeat(%u, [1, %count]) : f32[4, 8*s0]", "by an amount that is not fixed"),
    "aten.repeat_interleave.self_int": ("%h = aten.repeat_interleave.self_int(%u, 2) : f32[64]", "is not fixed"),
    "aten.slice.Tensor": ("%h = aten.slice.Tensor(%v, 1, 0, %count) : f32[s0, s0]", "by an amount that is not fixed"),
    "aten.select.int": ("%h = aten.select.int(%v, 1, %count) : f32[s0]", "aten.select.int moves channels by an amount"),
    "aten.split.Tensor": (
        "%h.0, %h.1 = aten.split.Tensor(%v, 4, 1) : f32[s0, 4], f32[s0, 4]\n"
        "%z = aten.mul.Tensor(%h.0, %h.1) : f32[s0, 4]", "both operands",
    ),
    "aten.split_with_sizes": (
        "%h.0, %h.1 = aten.split_with_sizes(%v, [4, 4], 1) : f32[s0, 4], f32[s0, 4]\n"
        "%z = aten.sigmoid(%h.1) : f32[s0, 4]", "aten.sigmoid",
    ),
    "aten.chunk": (
        "%h.0, %h.1 = aten.chunk(%v, 2, 1) : f32[s0, 4], f32[s0, 4]\n%z = aten.silu(%h.0) : f32[s0, 4]", "aten.silu",
    ),
    "aten.unbind.int": (
        V2 + "%h.0, %h.1 = aten.unbind.int(%h, 1) : f32[s0, 4], f32[s0, 4]\n"
        "%z = aten.mul.Tensor(%h.0, %h.1) : f32[s0, 4]", "both operands",
    ),
    "aten.cat": ("%h = aten.cat([%v, %b], 0) : f32[2*s0, 8]", INPUT + ", reached through %h (%b)"),
    "aten.stack": ("%h = aten.stack([%v, %b], 2) : f32[s0, 8, 2]\n%z = aten.exp(%h) : f32[s0, 8, 2]", "aten.exp"),
    "aten.index_select": ("%h = aten.index_select(%u, 1, %i) : f32[4, 3]", PICKED),
    "aten.index.Tensor": ("%h = aten.index.Tensor(%u, [None, %i]) : f32[4, 3]", PICKED),
    "aten.gather": ("%h = aten.gather(%u, 1, %j) : f32[2, 8]", PICKED),
    "aten.sum.dim_IntList": ("%h = aten.sum.dim_IntList(%v, [1]) : f32[s0]", SUMMED),
    "aten.mean.dim": ("%h = aten.mean.dim(%v, [0, -1], true) : f32[1, 1]", SUMMED),
    "aten.mm": (
        "%n = aten.transpose.int(%w, 0, 1) : f32[8, 8]\n%h = aten.mm(%u, %n) : f32[4, 8]", SUMMED,
    ),
    "aten.bmm": (
        BATCH + "%n = aten.transpose.int(%h, 1, 2) : f32[1, 8, 4]\n%z = aten.bmm(%h, %n) : f32[1, 4, 4]", SUMMED,
    ),
    "aten.matmul": ("%n = aten.t(%c) : f32[8, 4]\n%h = aten.matmul(%u, %n) : f32[4, 4]", SUMMED),
    "aten.scaled_dot_product_attention": (
        "%n = aten.unsqueeze(%c, 0) : f32[1, 4, 8]\n" + BATCH
        + "%z = aten.scaled_dot_product_attention(%n, %h, %n) : f32[1, 4, 8]", "of its 'key'",
    ),
    "attention.causal": (
        "%n = aten.view(%c, [1, 1, 4, 8]) : f32[1, 1, 4, 8]\n%h = aten.view(%u, [1, 1, 4, 8]) : f32[1, 1, 4, 8]\n"
        "%z = attention.causal(%n, %h, %n) {scale = 0.5} : f32[1, 1, 4, 8]", "of its 'key'",
    ),
}  # fmt: skip
"""Operation -> a case in which %r (or %u or %v, without a %r) must not be scaled, and why."""

UNKNOWN = (
    "aten.gelu", "aten.silu", "aten.sigmoid", "aten.tanh", "aten.exp", "aten.softmax.int", "aten._softmax",
    "aten.hardtanh", "aten.clamp", "aten.layer_norm", "aten.rms_norm", "aten.pow.Tensor_Scalar", "aten.rsqrt",
    "aten.cumsum", "aten.sort", "aten.topk", "aten.conv1d", "aten.conv2d", "aten.add.Scalar", "aten.reciprocal",
)  # fmt: skip


def case(expression: str) -> Graph:
    """The lines between the weights and a linear that uses %r, if it exists; the output is a single number."""
    text = HEAD
    if "%count" in expression:
        text += "  %count = aten.sym_size.int(%a, 0) : int(s0)\n"
    text += expression + "\n"
    found = re.findall(r"%r = .* : f32\[(.*)\]", expression)
    if found:
        *lead, last = found[0].split(", ")
        weight = {"8": "%o", "4": "%half", "16": "%twice"}[last]
        text += f"  %y = aten.linear(%r, {weight}) : f32[{', '.join([*lead, '5'])}]\n"
    return Graph.parse(text + f"  %end = aten.sum({'%y' if found else '%c'}) : f32[]\n  return %end\n}}")


def start(expression: str) -> str:
    """The value whose data a case moves."""
    return "u" if "%u" in expression else "v"


def inputs(rows: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    floats = [torch.randn(*shape) for shape in ((rows, 8), (rows, 8), (4, 8), (1, 3, 4), (1, 4, 4))]
    return [*floats, torch.rand(rows, 8) < 0.5, torch.tensor([2, 0, 1]), torch.randint(0, 2, (2, 8))]


def run(graph: Graph, rows: int = 3) -> torch.Tensor:
    """The type of %y; checks the types in the text against torch."""
    kept: dict[str, torch.Tensor] = {}

    def observe(op: Op, results: tuple[object, ...]) -> None:
        for value, result in zip(op.results, results, strict=True):
            if isinstance(result, torch.Tensor):
                shape = tuple(evaluate(size, {"s0": rows}) for size in value.tensor.shape)
                assert tuple(result.shape) == shape, op
                kept[value.name] = result

    interpret(graph, inputs(rows), observe=observe)
    return kept["y"]


def with_weights(graph: Graph) -> Graph:
    torch.manual_seed(1)
    for op in graph.ops("core.param"):
        graph.weights[str(op.attrs["name"])] = torch.randn(*map(int, map(str, op.result.tensor.shape)))
    return graph


def powers_of_two(region: ScaleRegion) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.exp2(torch.randint(-3, 4, (max(region.classes) + 1,)).float())[torch.tensor(region.classes)]


def test_each_row_has_a_proof_and_both_tests() -> None:
    assert set(LEGAL) == set(RULES) == set(REFUSED)
    assert all(f"{name}(" in LEGAL[name] and f"{name}(" in REFUSED[name][0] for name in RULES)
    for name, rule in RULES.items():
        assert rule.proof.endswith(".")
        assert set(rule.carries) <= {*traits_of(name).positions}, name


@pytest.mark.parametrize("name", UNKNOWN)
def test_operations_that_do_not_commute_are_not_in_the_table(name: str) -> None:
    assert overload_of(name) is not None
    assert name not in RULES


@pytest.mark.parametrize("end", ["result", "operand"])
@pytest.mark.parametrize("name", LEGAL)
def test_a_scale_passes_with_equal_bits(name: str, end: str) -> None:
    graph = with_weights(case(LEGAL[name]))
    graph.verify()
    want = run(graph)
    value = graph["r"] if end == "result" else graph[start(LEGAL[name])]
    region = solve(graph, value)
    assert isinstance(region, ScaleRegion), str(region)
    assert {graph["r"], graph[start(LEGAL[name])]} <= region.scaled.keys()
    fold(graph, region, powers_of_two(region), "test", "t")
    graph.verify()
    assert torch.equal(run(graph), want)


@pytest.mark.parametrize("name", REFUSED)
def test_a_scale_is_refused(name: str) -> None:
    expression, reason = REFUSED[name]
    graph = case(expression)
    graph.verify()
    before = str(graph)
    missed = solve(graph, graph["r" if "%r =" in expression else start(expression)])
    assert isinstance(missed, Missed), missed
    assert reason in str(missed)
    assert str(graph) == before


def sizes(text: str) -> Sequence[Size]:
    return [parse_size(size) for size in text.split()]


@pytest.mark.parametrize(
    ("old", "new", "groups"),
    [
        ("s0 s1 64", "s0*s1 4 16", [([0, 1], [0]), ([2], [1, 2])]),
        ("s0*s1 64", "s0 s1 64", [([0], [0, 1]), ([1], [2])]),
        ("s0 4 16", "s0 64", [([0], [0]), ([1, 2], [1])]),
        ("s0 8", "2*s0 4", [([0, 1], [0, 1])]),
        ("s0 1 8", "s0 8", [([0], [0]), ([1], []), ([2], [1])]),
        ("s0 8", "1 s0 1 8 1", [([0], [0, 1]), ([1], [2, 3, 4])]),
        ("6 4", "3 8", [([0, 1], [0, 1])]),
        ("0 8", "8 0", [([0, 1], [0, 1])]),
        ("1", "", [([0], [])]),
    ],
)
def test_runs_are_the_axes_that_a_reshape_does_not_mix(
    old: str, new: str, groups: list[tuple[list[int], list[int]]]
) -> None:
    assert [(list(left), list(right)) for left, right in runs(sizes(old), sizes(new))] == groups


def test_the_page_shows_this_table(root: Path) -> None:
    page = (root / "docs" / "smoothquant.md").read_text(encoding="utf-8")
    shown: dict[str, str] = {}
    for names, proof in re.findall(r"^\| (`.*`) \| (.*) \|$", page[page.index("## What commutes") :], re.M):
        for name in re.findall(r"`([^`]+)`", names):
            shown[name if name in RULES else f"aten.{name}"] = proof.replace("\\|", "|")
    assert shown == {name: rule.proof for name, rule in RULES.items()}
