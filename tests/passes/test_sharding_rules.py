"""Every row of the sharding table: exactly which axes can be cut together, and that cutting them is right."""

from typing import Any

import pytest
import torch

from passes.analyses.sharding_factors import Factor, Place, value_at
from passes.analyses.sharding_rules import RULES, row_of
from qcompiler.errors import QCompilerError
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Op, TensorType
from qcompiler.testing import random_inputs

X = "%x: f32[4, 6, 8]"
SAME = "x0 y0; x1 y1; x2 y2"
HEADS = "%q: f32[2, 4, 6, 8], %k: f32[2, 2, 6, 8], %v: f32[2, 2, 6, 8]"
GROUPED = "q0 k0 v0 y0; q1 k1*2 v1*2 y1"

CASES: list[tuple[str, str, str]] = [
    (X, "aten.relu(%x) : f32[4, 6, 8]", SAME),
    (f"{X}, %b: f32[8]", "aten.add.Tensor(%x, %b) : f32[4, 6, 8]", "y0 x0; y1 x1; y2 x2 b0"),
    (f"{X}, %b: f32[4, 1, 1]", "aten.mul.Tensor(%b, %x) : f32[4, 6, 8]", "y0 b0 x0; y1 x1; y2 x2"),
    (X, "aten.mul.Tensor(%x, %x) : f32[4, 6, 8]", "y0 x0 x0; y1 x1 x1; y2 x2 x2"),
    (X, "aten._to_copy(%x) {dtype = f64} : f64[4, 6, 8]", SAME),
    (X, "aten.to.dtype(%x, f64) : f64[4, 6, 8]", SAME),
    (X, "aten.clone(%x) : f32[4, 6, 8]", SAME),
    (X, "aten.contiguous(%x) : f32[4, 6, 8]", SAME),
    (X, "aten.alias(%x) : f32[4, 6, 8]", SAME),
    (X, "aten.detach(%x) : f32[4, 6, 8]", SAME),
    (X, "aten.hardswish(%x) : f32[4, 6, 8]", SAME),
    (f"{X}, %c: b8[4, 6, 8]", "aten.where.ScalarOther(%c, %x, 0) : f32[4, 6, 8]", "y0 c0 x0; y1 c1 x1; y2 c2 x2"),
    (f"{X}, %c: b8[6, 8]", "aten.where.ScalarSelf(%c, 0, %x) : f32[4, 6, 8]", "y0 x0; y1 c0 x1; y2 c1 x2"),
    (f"{X}, %c: b8[6, 1], %f: f32[]", "aten.masked_fill.Tensor(%x, %c, %f) : f32[4, 6, 8]", "y0 x0; y1 x1 c0; y2 x2"),
    (X, "aten.view(%x, [4, 6, 2, 4]) : f32[4, 6, 2, 4]", "x0 y0; x1 y1; x2/4 y2"),
    (X, "aten.reshape(%x, [24, 8]) : f32[24, 8]", "x0 y0/6; x2 y1"),
    (X, "aten._unsafe_view(%x, [4, 48]) : f32[4, 48]", "x0 y0; x1 y1/8"),
    (X, "aten.view(%x, [4, 3, 16]) : f32[4, 3, 16]", "x0 y0; x1/2 y1"),
    (X, "aten.view(%x, [4, -1, 8]) : f32[4, 6, 8]", SAME),
    (X, "aten.flatten.using_ints(%x, 1) : f32[4, 48]", "x0 y0; x1 y1/8"),
    (X, "aten.unsqueeze(%x, 1) : f32[4, 1, 6, 8]", "x0 y0; x1 y2; x2 y3"),
    ("%x: f32[4, 1, 8]", "aten.squeeze(%x) : f32[4, 8]", ""),
    ("%x: f32[4, 1, 8]", "aten.squeeze.dim(%x, 1) : f32[4, 8]", "x0 y0; x2 y1"),
    ("%x: f32[4, 1, 8]", "aten.squeeze.dims(%x, [1]) : f32[4, 8]", "x0 y0; x2 y1"),
    ("%x: f32[2, 1, 8]", "aten.squeeze.dims(%x, [0, 1]) : f32[2, 8]", "x2 y1"),
    ("%x: f32[4, 1, 8]", "aten.expand(%x, [4, 6, 8]) : f32[4, 6, 8]", "y0 x0; y1; y2 x2"),
    ("%x: f32[4, 8]", "aten.t(%x) : f32[8, 4]", "x1 y0; x0 y1"),
    (X, "aten.transpose.int(%x, 0, -1) : f32[8, 6, 4]", "x2 y0; x1 y1; x0 y2"),
    (X, "aten.permute(%x, [2, 0, 1]) : f32[8, 4, 6]", "x2 y0; x0 y1; x1 y2"),
    (X, "aten.slice.Tensor(%x, 1, 2, 5) : f32[4, 3, 8]", "y0 x0; y2 x2"),
    (X, "aten.slice.Tensor(%x, 1, 0, 9223372036854775807) : f32[4, 6, 8]", "y0 x0; y1 x1; y2 x2"),
    (X, "aten.select.int(%x, 1, 3) : f32[4, 8]", "x0 y0; x2 y1"),
    (X, "aten.split.Tensor(%x, 4, -1) : f32[4, 6, 4], f32[4, 6, 4]", "y0 z0 x0; y1 z1 x1"),
    (X, "aten.split_with_sizes(%x, [2, 6], 2) : f32[4, 6, 2], f32[4, 6, 6]", "y0 z0 x0; y1 z1 x1"),
    (X, "aten.chunk(%x, 2, 1) : f32[4, 3, 8], f32[4, 3, 8]", "y0 z0 x0; y2 z2 x2"),
    ("%x: f32[4, 2, 8]", "aten.unbind.int(%x, 1) : f32[4, 8], f32[4, 8]", "x0 y0 z0; x2 y1 z1"),
    (f"{X}, %u: f32[4, 2, 8]", "aten.cat([%x, %u], 1) : f32[4, 8, 8]", "y0 x0 u0; y2 x2 u2"),
    (f"{X}, %u: f32[4, 6, 8]", "aten.stack([%x, %u], 1) : f32[4, 2, 6, 8]", "y0 x0 u0; y2 x1 u1; y3 x2 u2"),
    (X, "aten.sym_size.int(%x, 1) : int(6)", "x0; x2"),
    (X, "aten.softmax.int(%x, -1) : f32[4, 6, 8]", "y0 x0; y1 x1"),
    (X, "aten._softmax(%x, 1, false) : f32[4, 6, 8]", "y0 x0; y2 x2"),
    (X, "aten.log_softmax.int(%x, 2) : f32[4, 6, 8]", "y0 x0; y1 x1"),
    (X, "aten.cumsum(%x, 1) : f32[4, 6, 8]", "y0 x0; y2 x2"),
    (X, "aten.sum.dim_IntList(%x, [1]) : f32[4, 8]", "x0 y0; x2 y1; sum x1"),
    (X, "aten.mean.dim(%x, [-1], true) : f32[4, 6, 1]", "x0 y0; x1 y1"),
    (X, "aten.mean.dim(%x, None) : f32[]", ""),
    (X, "aten.amax(%x, [0]) : f32[6, 8]", "x1 y0; x2 y1"),
    (X, "aten.amin(%x, [0, 1]) : f32[8]", "x2 y0"),
    (X, "aten.topk(%x, 3, -1) : f32[4, 6, 3], i64[4, 6, 3]", "y0 z0 x0; y1 z1 x1"),
    (f"{X}, %i: i64[4, 3, 8]", "aten.gather(%x, 1, %i) : f32[4, 3, 8]", "y0 x0 i0; y2 x2 i2"),
    (f"{X}, %i: i64[2, 6, 3]", "aten.gather(%x, 2, %i) : f32[2, 6, 3]", "y1 x1 i1"),
    (f"{X}, %i: i64[4, 6, 2]", "aten.scatter.value(%x, 2, %i, 1) : f32[4, 6, 8]", "y0 x0 i0; y1 x1 i1"),
    (X, "aten.zeros_like(%x) : f32[4, 6, 8]", SAME),
    (X, "aten.max.dim(%x, 1) : f32[4, 8], i64[4, 8]", "y0 z0 x0; y1 z1 x2"),
    (f"{X}, %g: f32[8]", "aten.rms_norm(%x, [8], %g) : f32[4, 6, 8]", "x0 y0; x1 y1"),
    (f"{X}, %g: f32[6, 8]", "aten.layer_norm(%x, [6, 8], %g) : f32[4, 6, 8]", "x0 y0"),
    ("%t: f32[16, 8], %i: i64[4, 6]", "aten.embedding(%t, %i) : f32[4, 6, 8]", "t1 y2; i0 y0; i1 y1; sum t0"),
    (f"{X}, %w: f32[10, 8]", "aten.linear(%x, %w) : f32[4, 6, 10]", "x0 y0; x1 y1; w0 y2; sum x2 w1"),
    (
        f"{X}, %w: f32[10, 8], %b: f32[10]", "aten.linear(%x, %w, %b) : f32[4, 6, 10]",
        "x0 y0; x1 y1; w0 b0 y2; sum x2 w1 once b",
    ),
    ("%x: f32[6, 8], %w: f32[8, 10]", "aten.mm(%x, %w) : f32[6, 10]", "x0 y0; w1 y1; sum x1 w0"),
    (f"{X}, %w: f32[4, 8, 10]", "aten.bmm(%x, %w) : f32[4, 6, 10]", "x1 y1; w2 y2; sum x2 w1; y0 x0 w0"),
    (f"{X}, %w: f32[8, 10]", "aten.matmul(%x, %w) : f32[4, 6, 10]", "x1 y1; w1 y2; sum x2 w0; y0 x0"),
    (f"{X}, %w: f32[8]", "aten.matmul(%x, %w) : f32[4, 6]", ""),
    (HEADS, "attention.causal(%q, %k, %v) {scale = 0.5} : f32[2, 4, 6, 8]", GROUPED),
    (
        f"{HEADS}, %s: f32[4]", "attention.causal(%q, %k, %v, %s) {scale = 0.5} : f32[2, 4, 6, 8]",
        "q0 k0 v0 y0; q1 k1*2 v1*2 s0 y1",
    ),
    (
        HEADS, "aten.scaled_dot_product_attention(%q, %k, %v) {enable_gqa = true, is_causal = true} : f32[2, 4, 6, 8]",
        GROUPED,
    ),
    *(
        (
            f"{HEADS}, %m: f32[{mask}]",
            "aten.scaled_dot_product_attention(%q, %k, %v, %m) {enable_gqa = true} : f32[2, 4, 6, 8]",
            f"q0 k0 v0 y0 {batch}; q1 k1*2 v1*2 y1 {heads}",
        )
        for mask, batch, heads in (
            ("6, 6", "", ""), ("4, 6, 6", "", "m0"), ("2, 1, 6, 6", "m0", ""), ("1, 4, 6, 6", "", "m1"),
            ("2, 4, 6, 6", "m0", "m1"),
        )
    ),
    (
        "%c: f8e4m3fn[8, 6], %s: f32[4, 1]",
        "quant.dequantize(%c, %s) {format = #format<f8e4m3fn, block = [2, -1]>, out_dtype = f32} : f32[8, 6]",
        "c0/2 s0 y0/2; c1 y1",
    ),
    (
        "%c: f8e4m3fn[7, 6], %s: f32[4, 6]",
        "quant.dequantize(%c, %s) {format = #format<f8e4m3fn, block = [2, 1]>, out_dtype = f32} : f32[7, 6]",
        "c1 s1 y1",
    ),
    ("%x: f32[4, 6, 2]", "aten.view_as_complex(%x) : c64[4, 6]", "x0 y0; x1 y1"),
    ("%x: c64[4, 6]", "aten.view_as_real(%x) : f32[4, 6, 2]", "x0 y0; x1 y1"),
    (X, 'coll.reshard(%x) {mesh = "tp"} : f32[4, 6, 8]', "y0 x0; y1 x1; y2 x2"),
    (X, 'coll.all_reduce(%x) {mesh = "tp"} : f32[4, 6, 8]', "y0 x0; y1 x1; y2 x2"),
]  # fmt: skip
"""Inputs, operation, factors: `x1/2 y0` cuts axis 1 of %x in steps of two elements, and axis 0 of the result.

Of `x1*2 y0`, two steps along axis 0 of the result read the same element of %x.
"""

IDS = [f"{text.split('(')[0]} {number}" for number, (_, text, _) in enumerate(CASES)]


def parsed(inputs: str, text: str) -> tuple[Graph, Op]:
    types = text.rpartition(" : ")[2]
    names = "%y, %z" if types.count("[") > 1 and "], " in types else "%y"
    graph = Graph.parse(f"func @m({inputs}) -> ({types}) {{\n  {names} = {text}\n  return {names}\n}}")
    graph.verify()
    (op,) = graph.ops()
    return graph, op


def along(op: Op) -> int:
    """The axis of the first operand that an operation indexes."""
    axis = op.argument("dim") if op.name != "aten.embedding" else 0
    assert isinstance(axis, int)
    return axis


def shown(op: Op, factor: Factor) -> str:
    places = [
        f"{value.name}{place.axis}{f'/{place.inner}' * (place.inner > 1)}{f'*{place.shared}' * (place.shared > 1)}"
        for place in factor.places
        if (value := value_at(op, place.slot))
    ]
    once = [value.name for path in factor.terms if (value := value_at(op, path))]
    return " ".join([*["sum"] * factor.summed, *places, *["once", *once] * bool(once)])


@pytest.mark.parametrize(("inputs", "text", "expected"), CASES, ids=IDS)
def test_factors(inputs: str, text: str, expected: str) -> None:
    _, op = parsed(inputs, text)
    row = row_of(op)
    assert row is not None
    # the order of places in a factor, and of factors, means nothing
    found = {frozenset(shown(op, factor).split()) for factor in row.factors(op)}
    assert found == {frozenset(each.split()) for each in expected.split("; ") if each}


@pytest.mark.parametrize(("inputs", "text", "expected"), CASES, ids=IDS)
def test_parts_of_operands_give_parts_of_results(inputs: str, text: str, expected: str) -> None:
    graph, op = parsed(inputs, text)
    row = row_of(op)
    if op.name.startswith("coll.") or row is None:
        return
    given, graph.weights = random_inputs(graph, 0)
    if "%i: i64" in inputs:
        given[1] = given[1] % given[0].shape[along(op)]
    whole = interpret(graph, given)
    for factor in row.factors(op):
        for count in parts_of(op, factor):
            parts = [run_part(graph, op, factor, given, part, count) for part in range(count)]
            for index, result in enumerate(op.results):
                got = [part[index] for part in parts]
                axes = [place.axis for place in factor.places if place.slot == index]
                if not isinstance(result.type, TensorType):
                    assert got == [whole[index]] * count
                elif factor.summed:
                    torch.testing.assert_close(sum(got), whole[index])
                else:
                    torch.testing.assert_close(torch.cat(got, axes[0]), whole[index])


def parts_of(op: Op, factor: Factor) -> set[int]:
    """The smallest and the largest number of parts into which a factor can be cut."""
    place = factor.places[0]
    value = value_at(op, place.slot)
    assert value is not None
    steps = int(str(value.tensor.shape[place.axis])) * place.shared // place.inner
    return {next(count for count in range(2, steps + 1) if steps % count == 0), steps}


def run_part(graph: Graph, op: Op, factor: Factor, given: Any, part: int, count: int) -> tuple[Any, ...]:
    """The results for one of several parts of a factor."""
    own = dict(zip(graph.inputs, given, strict=True))
    seen = set()
    for place in factor.places:
        value = value_at(op, place.slot)
        if value is not None and value in own and value not in seen:
            seen.add(value)
            copies = max(1, count // int(own[value].shape[place.axis])) if place.shared > 1 else 1
            own[value] = own[value].chunk(count // copies, place.axis)[part // copies]
    if op.name == "aten.embedding" and factor.summed:  # `partition` makes the result zeros for rows in other parts
        table, ids = own.values()
        row = ids - part * len(table)
        mine = (row >= 0) & (row < len(table))
        return (torch.where(mine.unsqueeze(-1), table[row.clamp(0, len(table) - 1)], 0.0),)
    for path in factor.terms:
        if part and (term := value_at(op, path)) is not None:
            own[term] = torch.zeros_like(own[term])
    row, args = row_of(op), op.args
    if row is not None and row.sizes is not None:
        cut = [place.axis for place in factor.places if place.slot == 0]
        sizes = [n // count if at in cut and n > 0 else n for at, n in enumerate(op.args[1])]  # type: ignore[arg-type,operator]
        graph.set_args(op, (op.args[0], tuple(sizes)))
    results = interpret(graph, list(own.values()))
    graph.set_args(op, args)
    return results


def test_every_row_has_a_case() -> None:
    assert set(RULES) <= {text.split("(")[0] for _, text, _ in CASES}


@pytest.mark.parametrize(
    "text", ["aten.sort(%x) : f32[4, 6, 8], i64[4, 6, 8]", "aten.dropout(%x, 0.5, true) : f32[4, 6, 8]"]
)
def test_operations_without_a_row(text: str) -> None:
    assert row_of(parsed(X, text)[1]) is None


VALUES = ("attention.causal", "aten.scaled_dot_product_attention")
"""Operations whose third operand could also be cut along its columns, which no region needs."""


def uncut(op: Op) -> list[Place]:
    """Axes of operands, of an even size, that no factor has."""
    row = row_of(op)
    known = {(place.slot, place.axis) for factor in row.factors(op) for place in factor.places} if row else set()
    known |= {((2,), 3)} if op.name in VALUES else set()
    return [
        Place(path, axis)
        for path, value in op.operands()
        for axis, size in enumerate(value.tensor.shape)
        if (path, axis) not in known and isinstance(size, int) and size % 2 == 0
    ]


def joined(parts: list[Any], whole: Any) -> list[int]:
    """The axes along which two parts, one after the other, are the whole."""
    found = []
    for axis, size in enumerate(whole.shape):
        alike = [part.dim() == whole.dim() for part in parts]
        sizes = all(alike) and [part.narrow(axis, 0, 0).shape == whole.narrow(axis, 0, 0).shape for part in parts]
        if sizes and all(sizes) and sum(part.shape[axis] for part in parts) == size:
            found += [axis] * torch.allclose(torch.cat(parts, axis).double(), whole.double())
    return found


FACTORED = [case for case in CASES if case[2] and not case[1].startswith("coll.")]


@pytest.mark.parametrize(("inputs", "text", "expected"), FACTORED, ids=[case[1].split("(")[0] for case in FACTORED])
def test_no_other_axis_can_be_cut(inputs: str, text: str, expected: str) -> None:
    """The opposite of the test above: halves of an operand along another axis do not give halves of a result."""
    graph, op = parsed(inputs, text)
    given, graph.weights = random_inputs(graph, 0)
    if "%i: i64" in inputs:
        given[1] = given[1] % given[0].shape[along(op)]
    whole = interpret(graph, given)
    for place in uncut(op):
        try:
            first, second = (run_part(graph, op, Factor((place,)), given, at, 2) for at in range(2))
        except QCompilerError:
            continue  # the halves do not fit the other operands
        for index, result in enumerate(op.results):
            if isinstance(result.type, TensorType):
                assert not joined([first[index], second[index]], whole[index]), place
