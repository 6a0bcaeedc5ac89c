"""The tables of index expressions: each row against the interpreter, with a case that it refuses."""

from itertools import product

import pytest
import torch
from element_values import At
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passes.analyses.causal_masks import in_range
from passes.analyses.elements import RULES, Elements
from passes.analyses.index_arithmetic import COMPARISONS
from passes.analyses.index_expressions import Element, Unknown
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Value, symbol

HEAD = """
func @m(%x: i64[s0, 4], %y: i64[4], %m: b8[s0, 4], %n: b8[4], %f: f32[s0, 4], %place: i64[2, 4]) -> () where s0 in 1.. {
  %rows = aten.sym_size.int(%x, 0) : int(s0)
  %i = aten.arange(%rows) : i64[s0]
  %j = aten.arange.start(3, 7) : i64[4]
  %k = aten.unsqueeze(%i, 1) : i64[s0, 1]
"""
X, B, F = "i64[s0, 4]", "b8[s0, 4]", "f32[s0, 4]"


def legal() -> dict[str, str]:
    cases = {
        "aten.arange": "aten.arange(%rows) : i64[s0]",
        "aten.arange.start": "aten.arange.start(-2, %rows) : i64[s0 + 2]",
        "aten.arange.start_step": "aten.arange.start_step(7, -2, -3) : i64[3]",
        "aten.full": "aten.full([2, 3], 5) : i64[2, 3]",
        "aten.full_like": f"aten.full_like(%m, 0.5) {{dtype = f32}} : {F}",
        "aten.new_full": "aten.new_full(%x, [3], true) {dtype = b8} : b8[3]",
        "aten.scalar_tensor": "aten.scalar_tensor(0.1) {dtype = f16} : f16[]",
        "aten.zeros": "aten.zeros([2]) {dtype = f32} : f32[2]",
        "aten.ones": "aten.ones([2]) {dtype = i64} : i64[2]",
        "aten._to_copy": f"aten._to_copy(%x) {{dtype = b8}} : {B}",
        "aten.to.dtype": f"aten.to.dtype(%m, f32) : {F}",
        "aten.where.self": f"aten.where.self(%m, %k, %y) : {X}",
        "aten.where.ScalarOther": f"aten.where.ScalarOther(%m, %x, 3) : {X}",
        "aten.where.ScalarSelf": f"aten.where.ScalarSelf(%n, 3, %k) : {X}",
        "aten.where.Scalar": f"aten.where.Scalar(%m, 0.1, -inf) : {F}",
        "aten.masked_fill.Scalar": f"aten.masked_fill.Scalar(%x, %n, 9) : {X}",
        "aten.masked_fill.Tensor": "aten.where.ScalarOther(%m, %x, 3) : i64[s0, 4]\n"
        "%five = aten.full([], 5) : i64[]\n%r = aten.masked_fill.Tensor(%r0, %n, %five) : i64[s0, 4]",
        "aten.logical_and": f"aten.logical_and(%x, %n) : {B}",
        "aten.logical_or": f"aten.logical_or(%m, %y) : {B}",
        "aten.logical_xor": f"aten.logical_xor(%m, %n) : {B}",
        "aten.logical_not": f"aten.logical_not(%x) : {B}",
        "aten.bitwise_not": f"aten.bitwise_not(%x) : {X}",
        "aten.neg": f"aten.neg(%x) : {X}",
        "aten.abs": f"aten.abs(%x) : {X}",
        "aten.div.Tensor": "aten.full([2], 5.0) : f32[2]\n%r = aten.div.Tensor(%r0, 3) : f32[2]",
        "aten.div.Scalar": "aten.full([2], 5.0) : f32[2]\n%r = aten.div.Scalar(%r0, 3.0) : f32[2]",
        "aten.minimum": f"aten.minimum(%x, %k) : {X}",
        "aten.maximum": f"aten.maximum(%x, %y) : {X}",
        "aten.floor_divide": f"aten.floor_divide(%x, 3) : {X}",
        "aten.div.Tensor_mode": f'aten.div.Tensor_mode(%x, 2) {{rounding_mode = "floor"}} : {X}',
        "aten.div.Scalar_mode": f'aten.div.Scalar_mode(%x, 2) {{rounding_mode = "floor"}} : {X}',
        "aten.remainder.Scalar": f"aten.remainder.Scalar(%x, 3) : {X}",
        "aten.remainder.Tensor": f"aten.full([], 3) : i64[]\n%r = aten.remainder.Tensor(%x, %r0) : {X}",
        "aten.cumsum": "aten.eq.Tensor(%k, %k) : b8[s0, 1]\n%r = aten.cumsum(%r0, 0) : i64[s0, 1]",
        "aten.tril": f"aten.tril(%x, -1) : {X}",
        "aten.triu": f"aten.triu(%x, 1) : {X}",
        "aten.clone": f"aten.clone(%x) {{memory_format = #contiguous_format}} : {X}",
        "aten.view": "aten.view(%x, [-1, 2, 1, 2]) : i64[s0, 2, 1, 2]",
        "aten.reshape": "aten.reshape(%x, [-1]) : i64[4*s0]",
        "aten._unsafe_view": "aten._unsafe_view(%x, [-1, 2]) : i64[2*s0, 2]",
        "aten.unsqueeze": "aten.unsqueeze(%x, -2) : i64[s0, 1, 4]",
        "aten.squeeze": "aten.unsqueeze(%place, 0) : i64[1, 2, 4]\n%r = aten.squeeze(%r0) : i64[2, 4]",
        "aten.squeeze.dim": "aten.unsqueeze(%x, 0) : i64[1, s0, 4]\n%r = aten.squeeze.dim(%r0, 0) : i64[s0, 4]",
        "aten.squeeze.dims": "aten.view(%y, [1, 4, 1]) : i64[1, 4, 1]\n%r = aten.squeeze.dims(%r0, [0, 2]) : i64[4]",
        "aten.flatten.using_ints": "aten.flatten.using_ints(%place) : i64[8]",
        "aten.unflatten.int": "aten.unflatten.int(%x, 1, [2, 2]) : i64[s0, 2, 2]",
        "aten.t": "aten.t(%x) : i64[4, s0]",
        "aten.transpose.int": "aten.transpose.int(%x, -1, 0) : i64[4, s0]",
        "aten.permute": "aten.unsqueeze(%x, 0) : i64[1, s0, 4]\n%r = aten.permute(%r0, [-1, 0, 1]) : i64[4, 1, s0]",
        "aten.expand": "aten.expand(%k, [-1, 3]) : i64[s0, 3]",
        "aten.expand_as": f"aten.expand_as(%y, %x) : {X}",
        "aten.repeat": "aten.repeat(%y, [2, 3]) : i64[2, 12]",
        "aten.repeat_interleave.self_int": "aten.repeat_interleave.self_int(%x, 3, 1) : i64[s0, 12]",
        "aten.slice.Tensor": "aten.slice.Tensor(%x, 1, -9, 9223372036854775807, 3) : i64[s0, 2]",
        "aten.flip": f"aten.flip(%x, [-1]) : {X}",
        "aten.select.int": "aten.select.int(%x, 1, -1) : i64[s0]",
        "aten.cat": "aten.cat([%k, %x, %k], -1) : i64[s0, 6]",
        "aten.stack": "aten.stack([%y, %j], -1) : i64[4, 2]",
        "aten.copy": f"aten.copy(%x, %y) : {X}",
        "aten.slice_scatter": "aten.slice.Tensor(%x, 1, 2, 4) : i64[s0, 2]\n"
        f"%r = aten.slice_scatter(%x, %r0, 1, -3, 3) : {X}",
        "aten.index.Tensor": "aten.slice.Tensor(%place, 1, 0, 2) : i64[2, 2]\n"
        "%far = aten.sub.Tensor(%r0, 4) : i64[2, 2]\n%r = aten.index.Tensor(%x, [None, %far]) : i64[s0, 2, 2]",
        "aten.index_select": "aten.index_select(%x, 1, %y) : i64[s0, 4]",
        "aten.gather": "aten.gather(%place, 1, %place) : i64[2, 4]",
        "aten.embedding": "aten.t(%place) : i64[4, 2]\n%r = aten.embedding(%r0, %y) : i64[4, 2]",
    }
    for name, sizes in (
        ("split_with_sizes", "[1, 3]"),
        ("split.sizes", "[1, 3]"),
        ("split.Tensor", "3"),
        ("chunk", "2"),
    ):
        first, second = {"3": (3, 1), "2": (2, 2)}.get(sizes, (1, 3))
        cases[f"aten.{name}"] = (
            f"%a, %b = aten.{name}(%x, {sizes}, -1) : i64[s0, {first}], i64[s0, {second}]\n"
            f"%r = aten.clone(%b) : i64[s0, {second}]"
        )
    same = ("contiguous", "alias", "detach", "lift_fresh_copy")
    cases |= {f"aten.{name}": f"aten.{name}(%x) : {X}" for name in same}
    cases |= {f"aten.{name}_like": f"aten.{name}_like(%x) : {X}" for name in ("zeros", "ones")}
    cases |= {f"aten.new_{name}": f"aten.new_{name}(%x, [3]) : i64[3]" for name in ("zeros", "ones")}
    for kind, other, alpha in (("Tensor", "%k", ") {alpha = 3}"), ("Scalar", "2", ", 3)")):
        cases |= {f"aten.{name}.{kind}": f"aten.{name}.{kind}(%x, {other}) : {B}" for name in COMPARISONS}
        cases |= {f"aten.{name}.{kind}": f"aten.{name}.{kind}(%x, {other}{alpha} : {X}" for name in ("sub", "rsub")}
        cases |= {f"aten.add.{kind}": f"aten.add.{kind}(%x, {other}) : {X}"}
        cases |= {f"aten.mul.{kind}": f"aten.mul.{kind}(%x, {other}) : {X}"}
        for name in ("bitwise_and", "__and__", "bitwise_or", "__or__", "bitwise_xor", "__xor__"):
            cases[f"aten.{name}.{kind}"] = f"aten.{name}.{kind}(%m, {'%n' if kind == 'Tensor' else 'true'}) : {B}"
    return cases


REFUSED: dict[str, str] = {
    "it counts in floating point": "%r = aten.arange(%rows) {dtype = f32} : f32[s0]",
    "varies to floating point": f"%r = aten._to_copy(%x) {{dtype = f32}} : {F}",
    "small integer type": "%r = aten._to_copy(%x) {dtype = i8} : i8[s0, 4]",
    "converts inf": "%h = aten.full([], inf) : f32[]\n%r = aten._to_copy(%h) {dtype = i64} : i64[]",
    "compares a number that varies": f"%r = aten.gt.Scalar(%x, 0.5) : {B}",
    "mixes a number that varies": f"%r = aten.mul.Scalar(%x, 0.5) : {F}",
    "bits of integers": f"%r = aten.bitwise_and.Tensor(%x, %y) : {X}",
    "it computes with booleans": f"%r = aten.add.Tensor(%m, %n) : {B}",
    "positive constant": f"%r = aten.remainder.Scalar(%x, -3) : {X}",
    "divide integers by a positive": f"%r = aten.floor_divide(%x, %y) : {X}",
    "round its quotient down": f'%r = aten.div.Tensor_mode(%x, 2) {{rounding_mode = "trunc"}} : {X}',
    "does not divide by a constant": f"%r = aten.div.Tensor(%x, %y) : {F}",
    "compares floating-point numbers": "%h = aten.ones([2]) : f32[2]\n%r = aten.minimum(%h, %h) : f32[2]",
    "selects elements with a mask": "%r = aten.index.Tensor(%y, [%n]) : i64[3]",
    "are not next to each other": "%h = aten.slice.Tensor(%x, 1, 2, 4) : i64[s0, 2]\n"
    f"%r = aten.slice_scatter(%x, %h, 1, 0, 4, 2) : {X}",
    "this value has floating-point numbers": f"%r = aten.tril(%f) : {F}",
}

UNKNOWN: dict[str, str] = {
    "a sum of elements that differ": f"%r = aten.cumsum(%x, 1) : {X}",
    "an operation that is not in the table": f"%r = aten.bitwise_left_shift.Tensor_Scalar(%x, 1) : {X}",
    "a sum of booleans of an input": "%r = aten.cumsum(%m, 1) : i64[s0, 4]",
}


def graph_of(text: str) -> Graph:
    """The graph with the lines of a case, of which the last one defines %r."""
    text = text if text.startswith("%") else f"%r{0 if chr(10) in text else ''} = {text}"
    kind = text.rpartition(" : ")[2]
    return Graph.parse(HEAD.replace("-> ()", f"-> ({kind})") + text + "\n  return %r\n}\n")


def result_of(graph: Graph) -> Value:
    """The only output."""
    ((_, value),) = graph.return_op.operands()
    return value


def example(rows: int) -> list[Tensor]:
    torch.manual_seed(rows)
    x, y, place = torch.randint(-6, 7, (rows, 4)), torch.randint(0, 4, (4,)), torch.randint(0, 4, (2, 4))
    return [x, y, torch.rand(rows, 4) < 0.5, torch.rand(4) < 0.5, torch.randn(rows, 4), place]


def check(graph: Graph, inputs: list[Tensor], rows: int) -> Element:
    """Compares each element of the output with its expression; returns the expression."""
    tensors = dict(zip([value.name for value in graph.inputs], inputs, strict=True))
    (want,) = interpret(graph, inputs, observe=lambda op, values: tensors.update({op.results[0].name: values[0]}))
    result = result_of(graph)
    names = [f"at{axis}" for axis in range(want.dim())]
    at = tuple(map(symbol, names))
    element = Elements(graph).element(result, at, in_range(at, result.tensor.shape))
    for index in product(*map(range, want.shape)):
        numbers = At({**dict(zip(names, index, strict=True)), "s0": rows}, tensors)
        assert numbers.element(element) == want[index].item(), index
    return element


@pytest.mark.parametrize("name", RULES)
def test_each_row_equals_the_interpreter(name: str) -> None:
    graph = graph_of(legal()[name])
    assert name in {op.name for op in graph.ops()}
    for rows in (1, 4):
        assert "%r(" not in str(check(graph, example(rows), rows))


def test_the_cases_are_those_of_the_tables() -> None:
    assert legal().keys() == RULES.keys()


@pytest.mark.parametrize("why", REFUSED)
def test_each_reason_to_refuse(why: str) -> None:
    graph = graph_of(REFUSED[why])
    result = result_of(graph)
    with pytest.raises(Unknown, match=why):
        Elements(graph).element(result, tuple(symbol(f"at{axis}") for axis in range(len(result.tensor.shape))))


@pytest.mark.parametrize("what", UNKNOWN)
def test_other_integers_are_unknowns(what: str) -> None:
    graph = graph_of(UNKNOWN[what])
    result = result_of(graph)
    element = Elements(graph).element(result, (symbol("a"), symbol("b")))
    assert str(element.only) == "%r(a, b)"


UNARY = ("aten.t({0}) : {t}", "aten.flip({0}, [1]) : {t}", "aten.flip({0}, [0]) : {t}", "aten.triu({0}, -1) : {t}")
INTEGERS = ("aten.add.Tensor({0}, {1}) {{alpha = -2}} : i64[4, 4]", "aten.minimum({0}, {1}) : i64[4, 4]",
            "aten.remainder.Scalar({0}, 3) : i64[4, 4]", "aten.floor_divide({0}, 2) : i64[4, 4]",
            "aten.where.self({2}, {0}, {1}) : i64[4, 4]", "aten.cumsum({2}, 1) : i64[4, 4]")  # fmt: skip
BOOLEANS = ("aten.le.Tensor({0}, {1}) : b8[4, 4]", "aten.eq.Tensor({0}, {1}) : b8[4, 4]",
            "aten.ne.Scalar({0}, 1) : b8[4, 4]", "aten.logical_not({2}) : b8[4, 4]",
            "aten.logical_or({2}, {3}) : b8[4, 4]", "aten.bitwise_and.Tensor({2}, {3}) : b8[4, 4]")  # fmt: skip


@st.composite
def random_graphs(draw: st.DrawFn) -> Graph:
    """Small graphs of these operations on [4, 4], with a cat of two slices, like transformers' test for packing."""
    lines = ["%i = aten.arange(4) : i64[4]", "%k = aten.expand(%i, [4, 4]) : i64[4, 4]", "%q = aten.t(%k) : i64[4, 4]"]
    lines += ["%m0 = aten.le.Tensor(%k, %q) : b8[4, 4]"]
    integers, booleans = ["%k", "%q", "%x"], ["%m0", "%m"]
    for number in range(draw(st.integers(1, 5))):
        kind, group, names = draw(
            st.sampled_from(
                [("i64[4, 4]", (*UNARY, *INTEGERS, "cat"), integers), ("b8[4, 4]", (*UNARY, *BOOLEANS), booleans)]
            )
        )
        form, name = draw(st.sampled_from(group)), f"%v{number}"
        picked = [draw(st.sampled_from(integers)) for _ in range(2)] + [
            draw(st.sampled_from(booleans)) for _ in range(2)
        ]
        if form == "cat":
            lines += [
                f"%a{number} = aten.slice.Tensor({picked[0]}, 1, 0, 1) : i64[4, 1]",
                f"%b{number} = aten.slice.Tensor({picked[1]}, 1, 0, -1) : i64[4, 3]",
            ]
            lines += [f"{name} = aten.cat([%a{number}, %b{number}], -1) : i64[4, 4]"]
        else:
            own = names is booleans and form in UNARY
            lines += [f"{name} = " + form.format(*(picked[2:] if own else picked), *picked[:2], t=kind)]
        names.append(name)
    head = f"func @m(%x: i64[4, 4], %m: b8[4, 4]) -> ({kind}) {{\n"
    return Graph.parse(head + "\n".join(lines) + f"\n  return {name}\n}}\n")


@settings(max_examples=40)
@given(random_graphs(), st.integers(0, 99))
def test_random_graphs_equal_the_interpreter(graph: Graph, seed: int) -> None:
    torch.manual_seed(seed)
    check(graph, [torch.randint(-3, 4, (4, 4)), torch.rand(4, 4) < 0.5], 4)
