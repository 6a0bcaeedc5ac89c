"""dead-code: removes unused values and their weights; keeps operations with effects."""

import pytest
import torch

from passes.cleanup.dead_code import DeadCode
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph


def with_line(line: str) -> Graph:
    return Graph.parse(f"func @m(%x: f32[4]) -> (f32[4]) {{\n  {line}\n  %y = aten.relu(%x) : f32[4]\n  return %y\n}}")


@pytest.mark.parametrize(
    "line",
    [
        "%d = aten.neg(%x) : f32[4]",
        "%v, %i = aten.topk(%x, 1) : f32[1], i64[1]",
        '%b = core.buffer() {name = "b"} : f32[4]',
        "%n = aten.layer_norm(%x, [4]) : f32[4]",
        "%e = aten.empty.memory_format([4]) : f32[4]",
    ],
)
def test_unused_operations_are_removed(line: str) -> None:
    graph = with_line(line)
    assert DeadCode().run(graph)
    assert len(graph.ops()) == 1
    assert not DeadCode().run(graph)


@pytest.mark.parametrize(
    "line",
    [
        "%d = aten.rand([4]) : f32[4]",  # removing it would change later random numbers
        "%d = aten.dropout(%x, 0.5, true) : f32[4]",
        "%d = aten.copy_(%x, %x) : f32[4]",
        "aten._assert_async(%x)",
        "core.update(%x, %x)",
    ],
)
def test_effects_stay(line: str) -> None:
    graph = with_line(line)
    assert not DeadCode().run(graph)
    assert len(graph.ops()) == 2


def test_unused_weights_are_released() -> None:
    graph = Graph.parse(
        'func @m(%x: f32[4]) -> (f32[4]) {\n  %a = core.param() {name = "a"} : f32[4]\n'
        '  %b = core.param() {name = "b"} : f32[4]\n  %y = aten.add.Tensor(%x, %b) : f32[4]\n  return %y\n}'
    )
    graph.weights = {"a": torch.ones(4), "b": torch.ones(4), "forgotten": torch.ones(4)}
    DeadCode().run(graph)
    graph.verify()
    assert list(graph.weights) == ["b"]
    assert interpret(graph, [torch.ones(4)])[0].tolist() == [2.0] * 4


def test_an_unused_input_stays() -> None:
    graph = Graph.parse("func @m(%x: f32[4], %y: f32[4]) -> (f32[4]) {\n  return %x\n}")
    assert not DeadCode().run(graph)
    assert len(graph.inputs) == 2
