"""The interpreter: any legal graph, run in plain torch, operation by operation."""

import gc
import weakref
from typing import Any

import pytest
import torch

from qcompiler import numerics
from qcompiler.errors import InputError, QCompilerError
from qcompiler.interpreter import interpret, makes_tensors
from qcompiler.ir import Graph, Op, ScalarType, TensorType, Value, evaluate
from qcompiler.testing import random_graph, random_inputs


def run(text: str, *inputs: Any, **keywords: Any) -> tuple[Any, ...]:
    graph = Graph.parse(text)
    graph.verify()
    return interpret(graph, inputs, **keywords)


X = torch.arange(8.0).reshape(2, 4)


def test_an_operation_of_torch_runs_itself() -> None:
    (y,) = run(
        "func @f(%x: f32[2, 4]) -> (f32[2, 4]) {\n"
        "  %y = aten.add.Tensor(%x, %x) {alpha = 3} : f32[2, 4]\n  return %y\n}",
        X,
    )
    assert torch.equal(y, 4 * X)


def test_an_operation_of_ours_runs_its_meaning() -> None:
    text = """\
func @f(%x: f32[2, 256]) -> (f32[2, 256], f32[2, 2]) {
  %q, %s = quant.quantize(%x) {format = #fp8_tile} : f8e4m3fn[2, 256], f32[2, 2]
  %y = quant.dequantize(%q, %s) {format = #fp8_tile, out_dtype = f32} : f32[2, 256]
  return %y, %s
}"""
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    y, s = run(text, x)
    q, scale = numerics.quantize(x, numerics.format_of((1, 128), torch.float8_e4m3fn, "deepseek"))
    assert torch.equal(s, scale)
    assert torch.equal(
        y, numerics.dequantize(q, scale, format=numerics.format_of((1, 128), q.dtype), out_dtype=torch.float32)
    )


def test_several_results_lists_and_constants_in_the_outputs() -> None:
    text = """\
func @f(%x: f32[2, 4])
  -> ([f32[2, 1], [i64[2, 1]]], None, 3, bf16, #contiguous_format, f32[6, 4], f32[2, 2], f32[2, 2]) {
  %v, %i = aten.topk(%x, 1) : f32[2, 1], i64[2, 1]
  %c = aten.cat([%x, %x, %x]) : f32[6, 4]
  %l, %r = aten.split.Tensor(%x, 2, 1) : f32[2, 2], f32[2, 2]
  return [%v, [%i]], None, 3, bf16, #contiguous_format, %c, %l, %r
}"""
    (v, (i,)), nothing, three, dtype, memory_format, c, left, right = run(text, X)
    assert torch.equal(v, X[:, 3:])
    assert i.tolist() == [[3], [3]]
    assert (nothing, three, dtype, memory_format) == (None, 3, torch.bfloat16, torch.contiguous_format)
    assert torch.equal(c, torch.cat([X, X, X]))
    assert torch.equal(left, X[:, :2])
    assert torch.equal(right, X[:, 2:])


def test_a_list_of_one_result_and_a_result_that_is_left_out() -> None:
    text = """\
func @f(%x: f32[2, 4]) -> (f32[2, 4]) {
  %only = aten.split.Tensor(%x, 4, 1) : f32[2, 4]
  %y, %mean, %rstd = aten.native_layer_norm(%only, [4], None, None, 1e-05) : f32[2, 4], f32[2, 1], f32[2, 1]
  return %y
}"""
    (y,) = run(text, X)
    assert torch.equal(y, torch.layer_norm(X, [4]))


def test_indices_with_gaps() -> None:
    text = """\
func @f(%x: f32[2, 4], %i: i64[2]) -> (f32[2, 2]) {
  %y = aten.index.Tensor(%x, [None, %i]) : f32[2, 2]
  return %y
}"""
    (y,) = run(text, X, torch.tensor([3, 0]))
    assert torch.equal(y, X[:, [3, 0]])


def test_sizes_are_ordinary_values() -> None:
    text = """\
func @f(%x: f32[s0, 4]) -> (f32[4*s0], int(s0), float, bool) where s0 in 1.. {
  %n = aten.sym_size.int(%x, 0) : int(s0)
  %m = core.mul(%n, 4) : int(4*s0)
  %y = aten.view(%x, [%m]) : f32[4*s0]
  %half = core.truediv(%n, 2) : float
  %large = core.gt(%n, 2) : bool
  return %y, %n, %half, %large
}"""
    y, n, half, large = run(text, torch.ones(3, 4))
    assert (list(y.shape), n, half, large) == ([12], 3, 1.5, True)


def test_numbers_may_be_inputs() -> None:
    text = """\
func @f(%x: f32[2, 4], %n: int(s0)) -> (f32[2, 4], int(s0 + 1)) {
  %y = aten.mul.Scalar(%x, %n) : f32[2, 4]
  %m = core.add(%n, 1) : int(s0 + 1)
  return %y, %m
}"""
    y, m = run(text, X, 5)
    assert torch.equal(y, 5 * X)
    assert m == 6


UPDATES = """\
func @f(%x: f32[4], %cache: f32[4]) -> (f32[4]) {
  %count = core.buffer() {name = "count"} : f32[4]
  %more = aten.add.Tensor(%count, %x) : f32[4]
  core.update(%count, %more)
  core.update(%cache, %x)
  %y = aten.add.Tensor(%count, %cache) : f32[4]
  return %y
}"""


def test_updates_are_handed_back_and_nothing_is_changed() -> None:
    x, cache, count = torch.ones(4), torch.full((4,), 5.0), torch.full((4,), 10.0)
    updates: dict[str, torch.Tensor] = {}
    (y,) = run(UPDATES, x, cache, weights={"count": count}, updates=updates)
    assert torch.equal(y, torch.full((4,), 15.0)), "reads see the state that the call began with"
    assert sorted(updates) == ["cache", "count"]
    assert torch.equal(updates["count"], torch.full((4,), 11.0))
    assert torch.equal(updates["cache"], x)
    assert torch.equal(cache, torch.full((4,), 5.0))
    assert torch.equal(count, torch.full((4,), 10.0))


def test_updates_may_be_ignored() -> None:
    assert len(run(UPDATES, torch.ones(4), torch.ones(4), weights={"count": torch.ones(4)})) == 1


FACTORY = """\
func @f(%x: f32[2, 4]) -> (f32[3]) {
  %y = aten.full([3], 1.5) {dtype = f32} : f32[3]
  return %y
}"""


def test_operations_that_make_tensors_make_them_where_the_inputs_are() -> None:
    assert run(FACTORY, X)[0].device == torch.device("cpu")
    assert run(FACTORY, torch.empty(2, 4, device="meta"))[0].device == torch.device("meta")
    without_inputs = Graph.parse("func @f() -> (f32[3]) {\n  %y = aten.ones([3]) : f32[3]\n  return %y\n}")
    assert torch.equal(interpret(without_inputs, [])[0], torch.ones(3))
    on_meta = interpret(without_inputs, [], weights={"w": torch.empty(1, device="meta")})
    assert on_meta[0].device == torch.device("meta")


def test_which_operations_make_tensors() -> None:
    graph = Graph.parse("""\
func @f(%x: f32[2, 4], %n: int(s0)) -> () {
  %a = aten.full([3, %n], 1.5) : f32[3, s0]
  %b = aten.full_like(%x, 1.5) : f32[2, 4]
  %c = aten.neg(%x) : f32[2, 4]
  return
}""")
    assert [makes_tensors(graph[name].op) for name in "abc"] == [True, False, False]


def test_a_device_that_is_given_stays() -> None:
    op = Graph.parse('func @f() -> (f32[]) {\n  %a = aten.full([], 1) {device = "meta"} : f32[]\n  return %a\n}')
    assert interpret(op, [])[0].device == torch.device("meta")


def test_memory_is_free_after_the_last_reader() -> None:
    graph = Graph.parse("""\
func @f(%x: f32[4]) -> (f32[4]) {
  %a = aten.neg(%x) : f32[4]
  %b = aten.add.Tensor(%a, %a) : f32[4]
  %c = aten.neg(%b) : f32[4]
  %d = aten.add.Tensor(%c, %b) : f32[4]
  return %d
}""")
    alive: dict[str, weakref.ref[torch.Tensor]] = {}
    seen: list[tuple[str, list[str]]] = []

    def watch(op: Op, results: tuple[Any, ...]) -> None:
        gc.collect()
        seen.append((op.result.name, sorted(name for name, tensor in alive.items() if tensor() is not None)))
        alive[op.result.name] = weakref.ref(results[0])

    interpret(graph, [torch.ones(4)], observe=watch)
    assert seen == [("a", []), ("b", ["a"]), ("c", ["b"]), ("d", ["b", "c"])]


def test_the_graphs_own_weights_are_read_and_others_take_their_place() -> None:
    graph = Graph.parse("""\
func @f() -> (f32[2]) {
  %w = core.param() {name = "fc.weight"} : f32[2]
  return %w
}""")
    graph.weights["fc.weight"] = torch.ones(2)
    assert torch.equal(interpret(graph, [])[0], torch.ones(2))
    assert torch.equal(interpret(graph, [], {"fc.weight": torch.zeros(2)})[0], torch.zeros(2))
    with pytest.raises(InputError, match=r"a weight that the graph reads is missing: got fc\.weight"):
        interpret(graph, [], {"other": torch.zeros(2)})


@pytest.mark.parametrize("count", [0, 2])
def test_the_number_of_inputs_must_be_right(count: int) -> None:
    with pytest.raises(InputError, match=f"@f takes 1 inputs: got {count}; need 1"):
        run(FACTORY, *[X] * count)
    with pytest.raises(InputError, match="the inputs of @f are of a wrong type: got a tensor; need a list of inputs"):
        interpret(Graph.parse(FACTORY), X)  # type: ignore[arg-type]  # wrong on purpose


def test_an_operation_that_fails_is_named_with_its_source_line() -> None:
    text = """\
func @f(%x: f32[2, 4]) -> (f32[2, 4]) {
  %y = aten.mm(%x, %x) : f32[2, 4] loc("mlp.py":9 in "fc1")
  return %y
}"""
    with pytest.raises(QCompilerError) as caught:
        run(text, X)
    assert str(caught.value).startswith("aten.mm failed: ")
    assert str(caught.value).endswith('(in loc("mlp.py":9 in "fc1"))')
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_gradients_are_off() -> None:
    (y,) = run(
        "func @f(%x: f32[4]) -> (f32[4]) {\n  %y = aten.neg(%x) : f32[4]\n  return %y\n}",
        torch.ones(4).requires_grad_(),
    )
    assert not y.requires_grad


def test_random_graphs_compute_what_their_types_say() -> None:
    for seed in range(40):
        graph = random_graph(seed, size=20, runnable=True)
        inputs, weights = random_inputs(graph, seed)
        bound = sizes_of(graph, inputs)
        updates: dict[str, torch.Tensor] = {}

        def check(op: Op, results: tuple[Any, ...], bound: dict[str, int] = bound) -> None:
            for value, result in zip(op.results, results, strict=True):
                assert_type(value, result, bound)

        outputs = interpret(graph, inputs, weights, updates=updates, observe=check)
        for value, output in zip(graph.outputs, outputs, strict=True):
            assert isinstance(value, Value)
            assert_type(value, output, bound)
        for name, tensor in updates.items():
            assert_type(graph[name], tensor, bound)
        assert len(updates) == len(graph.ops("core.update"))


def sizes_of(graph: Graph, inputs: list[Any]) -> dict[str, int]:
    """The sizes that the random inputs were made with, found again by trying all small ones."""
    bound: dict[str, int] = {}
    for name in graph.symbols:
        for size in range(10):
            if all(fits(value, tensor, name, size) for value, tensor in zip(graph.inputs, inputs, strict=True)):
                bound[name] = size
                break
    return bound


def fits(value: Value, tensor: torch.Tensor, name: str, size: int) -> bool:
    pairs = zip(value.tensor.shape, tensor.shape, strict=True)
    return all(evaluate(want, {name: size}) == got for want, got in pairs if name in str(want))


def assert_type(value: Value, result: Any, bound: dict[str, int]) -> None:
    if isinstance(value.type, ScalarType):
        assert value.type.value is not None
        assert result == evaluate(value.type.value, bound)
    else:
        shape = tuple(evaluate(size, bound) for size in value.tensor.shape)
        assert TensorType.of(result) == TensorType(value.tensor.dtype, shape), repr(value)
