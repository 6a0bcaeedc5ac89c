"""The graph: building and changing it keeps arguments, network, order and names in step."""

import time
from collections.abc import Callable
from random import Random

import networkx as nx
import pytest

import qcompiler.dialects  # noqa: F401
from qcompiler.errors import QCompilerError
from qcompiler.ir import Argument, DType, Graph, Location, Op, Range, TensorType, Use, Value
from qcompiler.ir.formats import FP8_TILE
from qcompiler.testing import assert_text, random_graph

F32 = TensorType(DType.f32, (2, 4))


@pytest.fixture
def graph() -> Graph:
    return Graph.parse(
        """\
func @f(%x: f32[2, 4], %y: f32[2, 4]) -> (f32[2, 4]) {
  %a = aten.neg(%x) : f32[2, 4] loc("m.py":1)
  %b = aten.add.Tensor(%a, %y) {alpha = 2} : f32[2, 4]
  %c = aten.cat([%a, %b, %a], 0) : f32[6, 4]
  %d, %e = aten.topk(%b, 1) {k = [%a]} : f32[2, 1], i64[2, 1]
  return %b, [%d]
}""".replace("(f32[2, 4]) {", "(f32[2, 4], [f32[2, 1]]) {")
    )


def names(graph: Graph) -> list[str]:
    return [value.name for op in graph for value in op.results]


# Reading


def test_reading(graph: Graph) -> None:
    assert [value.name for value in graph.inputs] == ["x", "y"]
    assert [op.name for op in graph.ops()] == ["aten.neg", "aten.add.Tensor", "aten.cat", "aten.topk"]
    assert graph.ops("aten.cat") == [graph["c"].op]
    assert len(graph) == len(list(graph)) == 7
    assert list(graph)[-1] is graph.return_op
    assert graph.outputs == (graph["b"], (graph["d"],))
    assert graph["c"].op in graph
    assert Op("aten.neg", (), {}, Location()) not in graph
    assert repr(graph) == "<Graph @f: 7 operations>"
    assert repr(graph["a"]) == "%a: f32[2, 4]"


def test_a_name_that_is_missing_gives_the_nearest_and_stays_short(graph: Graph) -> None:
    graph.rename(graph["a"], "attention")
    with pytest.raises(QCompilerError, match=r"^there is no value %atention. Did you mean '%attention'\?$"):
        graph["atention"]
    with pytest.raises(QCompilerError, match=r"^there is no value %zzzz$"):
        graph["%zzzz"]


def test_uses_and_users_are_in_order(graph: Graph) -> None:
    a, b, c, d = (graph[name] for name in "abcd")
    assert graph.uses(a) == [Use(b.op, (0,)), Use(c.op, (0, 0)), Use(c.op, (0, 2)), Use(d.op, ("k", 0))]
    assert graph.users(a) == [b.op, c.op, d.op]
    assert graph.uses(b) == [Use(c.op, (0, 1)), Use(d.op, (0,)), Use(graph.return_op, (0,))]
    assert graph.uses(d) == [Use(graph.return_op, (1, 0))]
    assert graph.uses(graph["e"]) == []


def test_users_are_in_order_after_any_change(graph: Graph) -> None:
    first = graph.insert(graph["b"].op, "aten.neg", graph["a"], types=[F32]).result
    graph.set_args(graph["b"].op, (graph["a"], first))
    graph.move(graph["c"].op, graph.return_op)
    assert graph.users(graph["a"]) == [first.op, graph["b"].op, graph["d"].op, graph["c"].op]


def test_random_changes_keep_everything_in_step() -> None:
    for seed in range(60):
        rng = Random(seed)
        graph = random_graph(rng, runnable=True)
        for _ in range(30):
            change_at_random(graph, rng)
        graph.verify()
        parsed = Graph.parse(str(graph))
        assert str(parsed) == str(graph)
        for value in (value for op in graph for value in op.results):
            twin = parsed[value.name]
            assert [(use.op.name, use.path) for use in graph.uses(value)] == [
                (use.op.name, use.path) for use in parsed.uses(twin)
            ]
            assert graph.fresh(value.name) == parsed.fresh(value.name)
            assert graph.is_constant(value) == parsed.is_constant(twin)


def change_at_random(graph: Graph, rng: Random) -> None:
    op = rng.choice(graph.ops() or [graph.return_op])
    kind = rng.randrange(4)
    if kind == 0 and op.results:
        graph.rename(op.results[0], rng.choice(("x", "x_1", "linear", "linear_7")))
    elif kind == 1 and op is not graph.return_op and op.name != "core.update" and not any(map(graph.uses, op.results)):
        graph.erase(op)
    elif kind == 2 and op.results and isinstance(op.results[0].type, TensorType):
        old = op.results[0]
        after = rng.choice([*graph.users(old), graph.return_op])
        copy = graph.insert(after, "aten.clone", old, types=[old.type]).result
        if after.name in ("aten.neg", "aten.linear", "aten.clone"):
            graph.replace_in(after, old, copy)
    elif op is not graph.return_op:
        readers = [reader for value in op.results for reader in graph.users(value)]
        order = list(graph)
        graph.move(op, min(readers, key=order.index) if readers else graph.return_op)


# Building


def test_insert_and_append(graph: Graph) -> None:
    op = graph.insert(graph["b"].op, "aten.neg", graph["x"], types=[F32], loc=Location("n.py", 3))
    assert op.result.name == "neg"
    assert graph.append("aten.topk", op.result, 1, types=[F32, F32]).results[1].name == "topk_1"
    assert graph.add_input("x", F32).name == "x_1"
    assert names(graph) == ["x", "y", "x_1", "a", "neg", "b", "c", "d", "e", "topk", "topk_1"]
    graph.verify()


def test_types_follow_from_the_type_rule_where_there_is_one(graph: Graph) -> None:
    attrs: dict[str, Argument] = {"format": FP8_TILE}
    data, scale = graph.append("quant.quantize", graph["x"], attrs=attrs, names=["x_q", "x_s"]).results
    assert (str(data.type), str(scale.type)) == ("f8e4m3fn[2, 4]", "f32[2, 1]")
    with pytest.raises(QCompilerError, match=r"aten.neg has no type rule, so its result types must be given"):
        graph.append("aten.neg", graph["x"])
    with pytest.raises(QCompilerError, match="attribute 'format' is missing"):
        graph.append("quant.quantize", graph["x"])


def test_what_cannot_be_built_changes_nothing(graph: Graph) -> None:
    text, other = str(graph), Graph("other")
    stranger = other.append("aten.neg", other.add_input("s", F32), types=[F32])
    with pytest.raises(QCompilerError, match="needs one name per result: got 1 names; need 2"):
        graph.append("aten.topk", graph["x"], types=[F32, F32], names=["one"])
    with pytest.raises(QCompilerError, match="cannot read a value that is not in @f: got %neg: f32"):
        graph.append("aten.neg", stranger.result, types=[F32])
    with pytest.raises(QCompilerError, match="cannot read a value that is not in @f"):
        graph.set_args(graph["b"].op, ((graph["x"], stranger.result),))
    with pytest.raises(QCompilerError, match=r"the operation is not in @f: got aten\.neg"):
        graph.insert(stranger, "aten.neg", graph["x"], types=[F32])
    with pytest.raises(QCompilerError, match="the operation is not in @f"):
        graph.move(graph["b"].op, stranger)
    with pytest.raises(QCompilerError, match="the operation is not in @f"):
        graph.erase(stranger)
    assert str(graph) == text
    assert graph.fresh("neg") == "neg"
    graph.verify()


# Changing


def test_set_args(graph: Graph) -> None:
    b, y = graph["b"], graph["y"]
    graph.set_args(b.op, (y, y))
    assert b.op.attrs == {"alpha": 2}
    assert graph.uses(y) == [Use(b.op, (0,)), Use(b.op, (1,))]
    graph.set_args(b.op, (y,), {"other": graph["x"]})
    assert graph.uses(graph["x"]) == [Use(graph["a"].op, (0,)), Use(b.op, ("other",))]
    graph.verify()


def test_replace_reaches_lists_attributes_and_the_return(graph: Graph) -> None:
    graph.replace(graph["a"], graph["x"])
    graph.replace(graph["b"], graph["y"])
    assert_text(
        graph,
        """
        func @f(%x: f32[2, 4], %y: f32[2, 4]) -> (f32[2, 4], [f32[2, 1]]) {
          %a = aten.neg(%x) : f32[2, 4]
          %b = aten.add.Tensor(%x, %y) {alpha = 2} : f32[2, 4]
          %c = aten.cat([%x, %y, %x], 0) : f32[6, 4]
          %d, %e = aten.topk(%y, 1) {k = [%x]} : f32[2, 1], i64[2, 1]
          return %y, [%d]
        }
        """,
    )
    graph.verify()
    assert graph.uses(graph["a"]) == []


def test_replace_leaves_the_maker_of_the_new_value_alone(graph: Graph) -> None:
    cast = graph.insert(graph["c"].op, "aten.clone", graph["b"], types=[F32]).result
    graph.replace(graph["b"], cast)
    assert graph.uses(graph["b"]) == [Use(cast.op, (0,))]
    assert graph.users(cast) == [graph["c"].op, graph["d"].op, graph.return_op]
    graph.verify()


def test_replace_in_one_operation(graph: Graph) -> None:
    graph.replace_in(graph["c"].op, graph["a"], graph["y"])
    assert graph.uses(graph["y"]) == [Use(graph["b"].op, (1,)), Use(graph["c"].op, (0, 0)), Use(graph["c"].op, (0, 2))]


def test_erase(graph: Graph) -> None:
    graph.erase(graph["c"].op)
    assert names(graph) == ["x", "y", "a", "b", "d", "e"]
    assert graph.fresh("c") == "c"
    with pytest.raises(QCompilerError, match=r"got aten\.neg; need no users, but it has 2, such as aten\.add\.Tensor"):
        graph.erase(graph["a"].op)
    with pytest.raises(QCompilerError, match="the return must be the last operation"):
        graph.erase(graph.return_op)
    graph.verify()


def test_erasing_one_of_several_results_that_is_read(graph: Graph) -> None:
    with pytest.raises(QCompilerError, match=r"it has 1, such as core\.return"):
        graph.erase(graph["e"].op)


def test_move(graph: Graph) -> None:
    graph.move(graph["c"].op, graph.return_op)
    graph.move(graph["d"].op, graph["d"].op)
    assert names(graph) == ["x", "y", "a", "b", "d", "e", "c"]
    with pytest.raises(QCompilerError, match="cannot be erased or moved"):
        graph.move(graph.return_op, graph["a"].op)
    graph.verify()


def test_many_insertions_at_one_place_keep_their_order(graph: Graph) -> None:
    for number in range(300):
        graph.insert(graph["b"].op, "aten.neg", graph["x"], types=[F32], names=[f"n{number}"])
    for number in range(300):
        graph.insert(graph["a"].op, "aten.neg", graph["x"], types=[F32], names=[f"m{number}"])
    middle = [f"n{number}" for number in range(300)]
    assert names(graph)[2:] == [f"m{number}" for number in range(300)] + ["a", *middle, "b", "c", "d", "e"]
    assert [user.results[0].name for user in graph.users(graph["x"])] == [*names(graph)[2:303], *middle]


# Names


def test_names_and_network_are_read_only(graph: Graph) -> None:
    value = graph.inputs[0]
    assert graph.names[value.name] is value and value.op in graph.network
    with pytest.raises(TypeError):
        graph.names["mine"] = value  # type: ignore[index]  # an invalid edit
    with pytest.raises(nx.NetworkXError):
        graph.network.remove_node(value.op)


def test_fresh_names(graph: Graph) -> None:
    def take(name: str) -> str:
        return graph.append("aten.neg", graph["x"], types=[F32], names=[name]).result.name

    assert [take("linear") for _ in range(3)] == ["linear", "linear_1", "linear_2"]
    assert take("linear_1") == "linear_3"
    assert take("linear_9") == "linear_9"
    assert take("linear_9") == "linear_10"
    assert [take("linear") for _ in range(6)] == [f"linear_{n}" for n in (4, 5, 6, 7, 8, 11)]
    graph.erase(graph["linear_2"].op)
    assert [take("linear"), take("linear")] == ["linear_2", "linear_12"]
    graph.rename(graph["linear_5"], "other")
    assert take("linear_1") == "linear_5"
    assert [take("x_²"), take("x_²"), take("_3"), take("_3")] == ["x_²", "x_²_1", "_3", "_3_1"]
    graph.verify()


def test_rename(graph: Graph) -> None:
    graph.rename(graph["a"], "b")
    assert graph["b_1"].op.name == "aten.neg"
    graph.rename(graph["b_1"], "b_1")
    assert graph["b_1"].op.name == "aten.neg"
    with pytest.raises(QCompilerError):
        graph["a"]
    graph.verify()


# Copies and other forms


def test_a_clone_is_independent(graph: Graph) -> None:
    graph.symbols["s0"] = Range(1, 8)
    graph.weights["w"] = object()
    text = str(graph)
    copy = graph.clone()
    assert str(copy) == text
    assert copy.weights == graph.weights
    assert copy.weights is not graph.weights
    assert not set(copy) & set(graph)
    copy.replace(copy["a"], copy["x"])
    copy.erase(copy["a"].op)
    copy.symbols["s1"] = Range()
    copy.rename(copy["x"], "z")
    copy.set_args(copy["b"].op, copy["b"].op.args, {"alpha": 3})
    del copy.weights["w"]
    assert str(graph) == text
    assert "w" in graph.weights
    assert graph.clone(weights=False).weights == {}
    graph.verify()
    copy.verify()


def test_clones_of_random_graphs_print_alike_and_are_legal() -> None:
    for seed in range(300):
        graph = random_graph(seed)
        copy = graph.clone()
        copy.verify()
        assert str(copy) == str(graph)


def test_a_graph_with_operations_out_of_order_can_be_cloned(graph: Graph) -> None:
    graph.move(graph["a"].op, graph.return_op)
    assert str(graph.clone()) == str(graph)


def test_the_network_tells_names_types_and_places(graph: Graph) -> None:
    net = graph.to_networkx()
    assert net.graph == {"name": "f"}
    assert [net.nodes[op]["op"] for op in net] == list(graph)
    assert [data["index"] for _, data in net.nodes(data=True)] == list(range(len(graph)))
    assert net.nodes[graph["b"].op] == {
        "op": graph["b"].op,
        "name": "aten.add.Tensor",
        "index": 3,
        "text": "%b = aten.add.Tensor(%a, %y) {alpha = 2} : f32[2, 4]",
    }
    edges = [data for _, _, data in net.in_edges(graph["d"].op, data=True)]
    assert sorted(edges, key=lambda data: str(data["path"])) == [
        {"value": "a", "type": "f32[2, 4]", "result": 0, "path": ("k", 0)},
        {"value": "b", "type": "f32[2, 4]", "result": 0, "path": (0,)},
    ]
    assert net.number_of_edges(graph["a"].op, graph["c"].op) == 2
    assert nx.has_path(net, graph["x"].op, graph.return_op)
    net.clear()
    graph.verify()


def test_a_network_of_random_graphs_has_an_edge_for_each_operand() -> None:
    for seed in range(50):
        graph = random_graph(seed)
        net = graph.to_networkx()
        assert net.number_of_edges() == sum(1 for op in graph for _ in op.operands())
        assert nx.is_directed_acyclic_graph(net)


def long_chain(length: int) -> tuple[Graph, Value]:
    graph = Graph("long")
    value = graph.add_input("x", F32)
    for _ in range(length):
        value = graph.append("aten.linear", value, value, 1, types=[F32], loc=Location("m.py", 3, "a.b")).result
    graph.set_outputs([value])
    return graph, value


def test_no_step_takes_more_than_linear_time() -> None:
    graph, _ = long_chain(5000)
    assert timed(lambda: str(graph)) < 3
    assert timed(lambda: Graph.parse(str(graph))) < 8
    assert timed(graph.verify) < 4
    assert timed(graph.clone) < 4
    assert timed(lambda: [graph.append("aten.linear", types=[F32]) for _ in range(2000)]) < 2
    assert timed(lambda: [graph.fresh("linear_1") for _ in range(2000)]) < 1


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
