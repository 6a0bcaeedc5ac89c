"""Which values are computed alike, and which only look alike."""

import pytest

from passes.analyses.equal_values import equal_values
from passes.cleanup.canonicalize import Canonicalize
from qcompiler.ir import Graph


def equal(*lines: str) -> dict[str, str]:
    head = "func @f(%x: f32[8], %y: f32[8]) -> (f32[8]) {"
    graph = Graph.parse("\n".join([head, *lines, "return %x", "}"]))
    return {value.name: first.name for value, first in equal_values(graph).items()}


def test_chains_of_equal_operations() -> None:
    lines = [
        line
        for name in "ab"
        for line in (
            f"%{name}0 = aten.mul.Tensor(%x, %y) : f32[8]",
            f"%{name}1 = aten._to_copy(%{name}0) {{dtype = bf16}} : bf16[8]",
            f"%{name}2, %{name}3 = aten.aminmax(%{name}1) {{dim = 0}} : bf16[], bf16[]",
        )
    ]
    assert equal(*lines) == {f"b{at}": f"a{at}" for at in range(4)}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("aten.mul.Tensor(%x, %y)", "aten.mul.Tensor(%y, %x)"),
        ("aten.mul.Scalar(%x, 1)", "aten.mul.Scalar(%x, 1.0)"),
        ('aten.gelu(%x) {approximate = "none"}', 'aten.gelu(%x) {approximate = "tanh"}'),
        ("aten.bernoulli(%x)", "aten.bernoulli(%x)"),
    ],
)  # fmt: skip
def test_different_operations(one: str, other: str) -> None:
    assert equal(f"%a = {one} : f32[8]", f"%b = {other} : f32[8]") == {}


def test_values_that_are_written_in_place() -> None:
    copies = ["%a = aten.clone(%x) : f32[8]", "%b = aten.clone(%x) : f32[8]"]
    assert equal(*copies) == {"b": "a"}
    assert equal(*copies, "%c = aten.mul_.Tensor(%b, %y) : f32[8]") == {}
    view = "%v = aten.view(%b, [2, 4]) : f32[2, 4]"
    assert equal(*copies, view, "%c = aten.relu_(%v) : f32[2, 4]") == {}


def test_values_computed_from_memory_that_is_written_between() -> None:
    first, again = "%a = aten.mul.Tensor(%x, %y) : f32[8]", "%b = aten.mul.Tensor(%x, %y) : f32[8]"
    assert equal(first, again) == {"b": "a"}
    assert equal(first, "%c = aten.add_.Tensor(%x, %y) : f32[8]", again) == {}
    view = "%v = aten.view(%x, [2, 4]) : f32[2, 4]"
    assert equal(view, first, "%c = aten.relu_(%v) : f32[2, 4]", again) == {}
    read = "aten.neg(%v) : f32[2, 4]"
    assert equal(view, f"%a = {read}", "%c = aten.add_.Tensor(%x, %y) : f32[8]", f"%b = {read}") == {}


def test_linears_after_equal_linears() -> None:
    """Each chain but the first becomes unused from its end on."""
    chain = [
        line
        for name in "ab"
        for line in (
            f"%{name}0 = aten.neg(%x) : f32[8]",
            f"%{name}1 = aten.linear(%{name}0, %w) : f32[8]",
            f"%{name}2 = aten.tanh(%{name}1) : f32[8]",
            f"%{name}3 = aten.linear(%{name}2, %{name}w) : f32[8]",
        )
    ]
    weights = [f'%{name} = core.param() {{name = "{name}"}} : f32[8, 8]' for name in ("w", "aw", "bw")]
    head = "func @f(%x: f32[8]) -> (f32[8], f32[8]) {"
    graph = Graph.parse("\n".join([head, *weights, *chain, "return %a3, %b3", "}"]))
    assert Canonicalize().run(graph)
    assert [op.result.name for op in graph.ops("aten.linear")] == ["a1", "a3", "b3"]
    assert graph["b3"].op["input"] is graph["a2"]
