"""The verifier: legal graphs pass, and each way of breaking one is reported with its rule, operation and caret.

Here: what only a careless pass can break. What text can spell is in `test_verifier_text.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qcompiler.errors import VerifyError
from qcompiler.ir import DType, Graph, Location, Op, Range, TensorType, Value, evaluate, print_op
from qcompiler.ir import verifier as verifier_module
from qcompiler.ir.formats import FP8_TILE
from qcompiler.numerics.dtypes import torch_dtype
from qcompiler.runtime.weights import Weights
from qcompiler.testing import random_graph

SEEDS = range(8)
F32 = TensorType(DType.f32, (2, 128))
QUANTIZE = {"format": FP8_TILE}
LINEAR = {"out_dtype": DType.f32, "w_format": FP8_TILE, "x_format": FP8_TILE}


@dataclass(frozen=True)
class Probe:
    """A random legal graph with a known part, which the mutations break."""

    graph: Graph
    x: Value
    w: Value
    state: Value
    near: Value
    far: Value
    q: Value
    s: Value
    y: Value
    new: Value
    update: Op


def probe(seed: int) -> Probe:
    rng = Random(seed)
    graph = random_graph(rng, runnable=seed % 2 == 0, size=rng.randint(1, 20))
    loc = Location("mlp.py", 9)

    def add(name: str, *args: Any, **keywords: Any) -> Op:
        return graph.append(name, *args, loc=loc, **keywords)

    x = graph.add_input("probe", F32, loc)
    w = add("core.param", attrs={"name": "probe.w"}, types=[F32], names=["probe.w"]).result
    state = add("core.buffer", attrs={"name": "probe.state"}, types=[F32], names=["state"]).result
    near = add("aten.neg", x, types=[F32]).result
    far = add("aten.neg", near, types=[F32]).result
    q, s = add("quant.quantize", x, attrs=QUANTIZE).results
    w_q, w_s = add("quant.quantize", w, attrs=QUANTIZE).results
    y = add("quant.linear", q, s, w_q, w_s, None, attrs=LINEAR).result
    new = add("aten.add.Tensor", state, x, types=[F32]).result
    update = add("core.update", state, new, types=[])
    graph.set_outputs([*graph.outputs, y])
    return Probe(graph, x, w, state, near, far, q, s, y, new, update)


# A mutation breaks the graph and returns the operation and the text that the caret must mark ("" is the whole line).

Mutation = Callable[[Probe], tuple[Op, str]]
MUTATIONS: list[tuple[int, str, Mutation]] = []


def breaks(rule: int, sentence: str) -> Callable[[Mutation], Mutation]:
    def keep(mutation: Mutation) -> Mutation:
        MUTATIONS.append((rule, sentence, mutation))
        return mutation

    return keep


@breaks(1, "is defined 2 times")
def name_bound_twice(p: Probe) -> tuple[Op, str]:
    p.near.name = p.x.name
    return p.x.op, str(p.x)


@breaks(1, "is not the value called")
def name_changed_behind_the_table(p: Probe) -> tuple[Op, str]:
    p.near.name = "elsewhere"
    return p.near.op, "%elsewhere"


@breaks(1, "is not the value called")
def name_table_with_another_value(p: Probe) -> tuple[Op, str]:
    p.graph._names[p.near.name] = p.x
    return p.near.op, str(p.near)


@breaks(1, "the graph's name table has %ghost, which no operation defines")
def name_table_with_a_ghost(p: Probe) -> tuple[Op, str]:
    p.graph._names["ghost"] = p.x
    return p.graph.return_op, ""


@breaks(1, "'two words' is not a valid value name; use letters")
def name_that_cannot_be_spelled(p: Probe) -> tuple[Op, str]:
    p.graph.rename(p.near, "two words")
    return p.near.op, "%two words"


@breaks(1, "'two words' is not a valid function name")
def function_name_that_cannot_be_spelled(p: Probe) -> tuple[Op, str]:
    p.graph.name = "two words"
    return p.graph.return_op, ""


@breaks(2, "is dangling")
def operand_of_another_graph(p: Probe) -> tuple[Op, str]:
    stranger = Graph("other").append("aten.neg", types=[F32], names=["stranger"]).result
    p.near.op.args = (stranger,)
    return p.near.op, "%stranger"


@breaks(2, "is dangling")
def operand_that_was_removed(p: Probe) -> tuple[Op, str]:
    removed = p.graph.insert(p.near.op, "aten.neg", types=[F32], names=["removed"])
    p.graph.erase(removed)
    p.near.op.args = ((1, (removed.result,)),)
    return p.near.op, "%removed"


@breaks(2, "is dangling")
def operand_that_is_no_result_any_more(p: Probe) -> tuple[Op, str]:
    p.near.op.attrs = {"other": Value(p.w.op, 1, "second", F32)}
    return p.near.op, "%second"


@breaks(3, "is used before it is defined")
def use_before_definition(p: Probe) -> tuple[Op, str]:
    p.graph.move(p.near.op, p.graph.return_op)
    return p.far.op, str(p.near)


@breaks(3, "is used before it is defined")
def use_before_definition_of_one_of_several(p: Probe) -> tuple[Op, str]:
    p.graph.move(p.s.op, p.graph.return_op)
    return p.y.op, str(p.q)


@breaks(4, "it depends on its own result, through ")
def cycle(p: Probe) -> tuple[Op, str]:
    p.graph.set_args(p.near.op, (p.far,))
    return p.near.op, str(p.far)


@breaks(4, "it depends on its own result, through ")
def cycle_of_one(p: Probe) -> tuple[Op, str]:
    p.graph.set_args(p.near.op, (p.x, p.near))
    return p.near.op, str(p.near)


@breaks(5, "unknown operation 'aten.linaer'. Did you mean 'aten.linear'?")
def unknown_operation(p: Probe) -> tuple[Op, str]:
    p.near.op.name = "aten.linaer"
    return p.near.op, "aten.linaer"


@breaks(5, "unknown operation 'quant.linaer'. Did you mean 'quant.linear'?")
def unknown_operation_of_a_dialect_of_ours(p: Probe) -> tuple[Op, str]:
    p.near.op.name = "quant.linaer"
    return p.near.op, "quant.linaer"


@breaks(6, "argument 0 holds a list, which is not a value, literal, or tuple")
def list_instead_of_a_tuple(p: Probe) -> tuple[Op, str]:
    p.near.op.args = ([1, 2], 3)  # type: ignore[assignment]  # as a careless pass would
    return p.near.op, "[1, 2]"


@breaks(6, "attribute 'dtype' holds a dtype, which is not a value, literal, or tuple")
def object_of_torch_as_attribute(p: Probe) -> tuple[Op, str]:
    p.near.op.attrs["dtype"] = (None, torch.float32)  # type: ignore[assignment]  # as a careless pass would
    return p.near.op, "dtype"


@breaks(6, "'two words' is not a valid attribute name")
def attribute_name_that_cannot_be_spelled(p: Probe) -> tuple[Op, str]:
    p.near.op.attrs["two words"] = 1
    return p.near.op, "two words"


@breaks(6, "the arguments are a list, not a tuple")
def arguments_in_a_list(p: Probe) -> tuple[Op, str]:
    p.near.op.args = [p.x]  # type: ignore[assignment]  # as a careless pass would
    return p.near.op, ""


@breaks(8, "the network does not match its arguments; were they changed without set_args?")
def arguments_changed_behind_the_network(p: Probe) -> tuple[Op, str]:
    p.far.op.args = (p.x,)
    return p.far.op, ""


@breaks(8, "the network does not match its arguments")
def argument_moved_behind_the_network(p: Probe) -> tuple[Op, str]:
    p.far.op.args = ((p.near,),)
    return p.far.op, ""


@breaks(8, "operations, but the order has")
def operation_in_the_network_alone(p: Probe) -> tuple[Op, str]:
    p.graph._net.add_node(Op("aten.neg", (), {}, Location()))
    return p.graph.return_op, ""


@breaks(9, "an input is below the first operation of the body")
def input_in_the_body(p: Probe) -> tuple[Op, str]:
    return p.graph.append("core.input", types=[F32], names=["late"]), ""


@breaks(9, "an input takes no arguments and has one result")
def input_with_an_attribute(p: Probe) -> tuple[Op, str]:
    p.x.op.attrs["a"] = 1
    return p.x.op, ""


@breaks(9, "an input takes no arguments and has one result")
def input_of_two_values(p: Probe) -> tuple[Op, str]:
    return p.graph.insert(next(iter(p.graph)), "core.input", types=[F32, F32], names=["one", "two"]), ""


@breaks(10, "there is more than one return")
def second_return(p: Probe) -> tuple[Op, str]:
    return p.graph.append("core.return", p.y, types=[]), ""


@breaks(10, "the return has no attributes and no results")
def return_with_an_attribute(p: Probe) -> tuple[Op, str]:
    p.graph.return_op.attrs["a"] = 1
    return p.graph.return_op, ""


@breaks(13, "the range of s9 is 4..3, which is empty")
def empty_range(p: Probe) -> tuple[Op, str]:
    p.graph.symbols["s9"] = Range(4, 3)
    return p.graph.return_op, ""


@breaks(13, "the range of s9 is -1.., which is empty or has negative sizes")
def negative_range(p: Probe) -> tuple[Op, str]:
    p.graph.symbols["s9"] = Range(-1)
    return p.graph.return_op, ""


@breaks(13, "'s 9' is not a valid symbol name")
def symbol_that_cannot_be_spelled(p: Probe) -> tuple[Op, str]:
    p.graph.symbols["s 9"] = Range()
    return p.graph.return_op, ""


def store(p: Probe, **others: torch.Tensor) -> None:
    """Weights that agree with the graph, but for the given ones."""
    weights = {}
    for op in p.graph.ops():
        if op.name in ("core.param", "core.buffer"):
            shape = [evaluate(size, {}) for size in op.result.tensor.shape]
            weights[str(op.attrs["name"])] = torch.empty(shape, dtype=torch_dtype(op.result.tensor.dtype))
    p.graph.weights = Weights(weights | others)


@breaks(15, 'the weights store has no "probe.w"')
def weight_that_is_not_stored(p: Probe) -> tuple[Op, str]:
    store(p)
    del p.graph.weights["probe.w"]
    return p.w.op, '"probe.w"'


@breaks(15, "%probe.w is f32[2, 128], but the stored weight is f32[128, 2]")
def weight_of_another_shape(p: Probe) -> tuple[Op, str]:
    store(p, **{"probe.w": torch.empty(128, 2)})
    return p.w.op, "f32[2, 128]"


@breaks(15, "is f32[2, 128], but the stored weight is bf16[2, 128]")
def weight_of_another_dtype(p: Probe) -> tuple[Op, str]:
    store(p, **{"probe.state": torch.empty(2, 128, dtype=torch.bfloat16)})
    return p.state.op, "f32[2, 128]"


@breaks(15, "%probe.w is f32[2, 128], but the stored weight is f32[5]")
def weight_whose_store_tells_the_type(p: Probe) -> tuple[Op, str]:
    store(p)
    types = {"probe.w": TensorType(DType.f32, (5,))}
    p.graph.weights = Telling(dict(p.graph.weights), types)
    return p.w.op, "f32[2, 128]"


class Telling(dict[str, Any]):
    """A store that knows types without loading anything."""

    def __init__(self, entries: dict[str, Any], types: dict[str, TensorType]) -> None:
        super().__init__(entries)
        self.types = types

    def __getitem__(self, name: str) -> Any:
        raise AssertionError(f"{name} was loaded only to be looked at")

    def type_of(self, name: str) -> TensorType | None:
        return self.types.get(name)


@pytest.mark.parametrize(("rule", "sentence", "mutation"), MUTATIONS, ids=[entry[2].__name__ for entry in MUTATIONS])
def test_a_broken_graph_is_reported(rule: int, sentence: str, mutation: Mutation) -> None:
    for seed in SEEDS:
        p = probe(seed)
        p.graph.verify()
        op, culprit = mutation(p)
        with pytest.raises(VerifyError) as caught:
            p.graph.verify(after="some-pass")
        head, *rows = str(caught.value).split("\n")
        assert head.startswith(f"after pass 'some-pass', in @{p.graph.name}: rule V{rule}: {op.name}: ")
        assert sentence in head
        at = rows.index(f"  > {print_op(op, locations=False)}")
        start, end = rows[at + 1].index("^"), len(rows[at + 1])
        assert rows[at + 1] == " " * start + "^" * (end - start)
        assert rows[at][start:end] == (culprit or rows[at][4:])
        assert len(rows) <= 2 * verifier_module.WINDOW + 3
        assert (rows[-1] == "  source: mlp.py:9") == bool(op.loc.file == "mlp.py" and op.loc.line == 9)


def test_every_rule_is_broken_by_some_mutation() -> None:
    """Others are broken in `test_verifier_text.py`, `test_stateful_ops.py`, `test_state.py` and `test_sharding.py`."""
    lines = str(verifier_module.__doc__).splitlines()
    numbered = [int(line.split()[0][1:]) for line in lines if line.startswith("    V")]
    assert numbered == list(range(1, 20))
    assert {rule for rule, _, _ in MUTATIONS} == set(numbered) - {7, 11, 12, 14, 16, 17, 18, 19}


def test_random_legal_graphs_pass() -> None:
    for seed in range(500):
        random_graph(seed, size=seed % 25).verify()
        p = probe(seed)
        store(p) if seed % 2 == 0 else None
        p.graph.verify()


def test_a_store_that_cannot_tell_yet_is_not_asked_to_load() -> None:
    p = probe(0)
    store(p)
    p.graph.weights = Telling(dict(p.graph.weights), {})
    p.graph.verify()


def test_what_stands_under_the_caret_is_the_operand_and_not_a_result_or_attribute_of_that_name() -> None:
    graph = Graph.parse(
        "func @f(%x: f32[2, 4]) -> () {\n  %y = aten.add.Tensor(%x, %x) {o = [%x]} : f32[2, 4]\n  return\n}"
    )
    y = graph["y"].op
    y.args = (graph["x"], replace_op(graph["x"]))
    with pytest.raises(VerifyError) as caught:
        graph.verify()
    row, caret = str(caught.value).split("\n")[2:4]
    assert row == "  > %y = aten.add.Tensor(%x, %x) {o = [%x]} : f32[2, 4]"
    assert caret.index("^") == row.index(", %x") + 2


def replace_op(value: Value) -> Value:
    """A value that looks the same, of an operation that is in no graph."""
    return Value(replace(value.op), value.index, value.name, value.type)


def test_the_table_of_weights_may_be_any_mapping_of_things_with_a_dtype_and_a_shape() -> None:
    graph = Graph.parse("""\
func @f() -> () {
  %a = core.param() {name = "a"} : f32[2, 128]
  %b = core.buffer() {name = "b"} : i64[s0]
  return
}""")
    graph.symbols["s0"] = Range()
    graph.weights = {"a": SimpleNamespace(dtype="float32", shape=[2, 128]), "b": object()}  # the latter tells nothing
    graph.verify()
    graph.weights["a"].shape = [128, 2]
    with pytest.raises(VerifyError, match="rule V15"):
        graph.verify()
