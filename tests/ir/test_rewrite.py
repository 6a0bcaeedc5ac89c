"""Rewriting: rules match or say why not, and inserted operations keep names and locations."""

from typing import Any

import pytest

import qcompiler.dialects  # noqa: F401
from qcompiler.errors import PassError, QCompilerError
from qcompiler.ir import (
    DType,
    Graph,
    Location,
    Match,
    Missed,
    Op,
    Rewriter,
    Rule,
    TensorType,
    Value,
    apply_rules,
    explain,
)
from qcompiler.testing import assert_text


class DoubleNegation(Rule):
    """neg(neg(x))  ->  x"""

    root = ("aten.neg",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        inner = op["self"].op
        return {"x": inner["self"]} if inner.name == "aten.neg" else Missed("its input is not a neg", op["self"])

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, **_: Any) -> None:
        inner = op["self"].op
        rewriter.replace(op, x)
        rewriter.erase_unread(inner)


class SiluByHand(Rule):
    """silu(x)  ->  x * sigmoid(x)"""

    root = ("aten.silu",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        return {"x": op["self"]}

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, **_: Any) -> None:
        gate = rewriter.insert("aten.sigmoid", x, types=[x.type], names=["gate"]).result
        rewriter.replace(op, rewriter.insert("aten.mul.Tensor", x, gate, types=[x.type]).result)


class Forever(Rule):
    """relu(x)  ->  relu(x), again and again"""

    root = ("aten.relu",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        return {}

    def rewrite(self, op: Op, rewriter: Rewriter, **_: Any) -> None:
        rewriter.replace(op, rewriter.insert("aten.relu", op["self"], types=[op.result.type]).result)


class Wide(SiluByHand):
    """silu(x)  ->  cat(x, x), which has another type"""

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, **_: Any) -> None:
        rewriter.replace(op, rewriter.insert("aten.cat", (x, x), types=[TensorType(DType.f32, (8,))]).result)


class Idle(Rule):
    """relu(x) matches and is not changed"""

    root = ("aten.relu",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        return {}

    def rewrite(self, op: Op, rewriter: Rewriter, **_: Any) -> None:
        assert not rewriter.changed


class Silent(Idle):
    """match returns nothing"""

    def match(self, op: Op, graph: Graph) -> Any:
        return None


class Misspelled(Idle):
    """No operation has this name"""

    root = ("aten.rellu",)


class Suffixed(Idle):
    """The default overload has no suffix"""

    root = ("aten.relu.default",)


class Unlisted(Idle):
    """root is a name, not names"""

    root = "aten.relu"  # type: ignore[assignment]


class Foreign(Idle):
    """A namespace that is not loaded may have any name"""

    root = ("others.relu",)


def graph_of(*lines: str, returned: str) -> Graph:
    body = "\n".join(f"  {line}" for line in lines)
    return Graph.parse(f"func @f(%x: f32[4]) -> (f32[4]) {{\n{body}\n  return {returned}\n}}")


NEGATIONS = (
    '%a = aten.neg(%x) : f32[4] loc("m.py":1)',
    '%b = aten.neg(%a) : f32[4] loc("m.py":2)',
    '%c = aten.neg(%b) : f32[4] loc("m.py":3 in "fc" by "old")',
    "%d = aten.neg(%c) : f32[4]",
    "%e = aten.silu(%d) : f32[4]",
)


def test_rules_are_applied_until_none_matches() -> None:
    graph = graph_of(*NEGATIONS, returned="%e")
    assert apply_rules(graph, [DoubleNegation()], "simplify")
    assert_text(
        graph,
        """
        func @f(%x: f32[4]) -> (f32[4]) {
          %e = aten.silu(%x) : f32[4]
          return %e
        }
        """,
    )
    assert not apply_rules(graph, [DoubleNegation()], "simplify")
    graph.verify()


def test_what_is_inserted_inherits_the_location_and_takes_over_the_name() -> None:
    graph = graph_of('%y = aten.silu(%x) : f32[4] loc("m.py":9 in "fc" by "old")', returned="%y")
    assert apply_rules(graph, [SiluByHand()], "split-silu")
    assert_text(
        graph,
        """
        func @f(%x: f32[4]) -> (f32[4]) {
          %gate = aten.sigmoid(%x) : f32[4] loc("m.py":9 in "fc" by "split-silu")
          %y = aten.mul.Tensor(%x, %gate) : f32[4] loc("m.py":9 in "fc" by "split-silu")
          return %y
        }
        """,
        locations=True,
    )
    graph.verify()


def test_an_operation_without_a_location_passes_on_who_made_it() -> None:
    graph = graph_of("%y = aten.silu(%x) : f32[4]", returned="%y")
    apply_rules(graph, [SiluByHand()], "split-silu")
    assert graph["y"].op.loc == Location(made_by="split-silu")


def test_rules_work_together_in_the_order_given() -> None:
    graph = graph_of(*NEGATIONS, returned="%e")
    assert apply_rules(graph, [SiluByHand(), DoubleNegation()], "both")
    assert [op.name for op in graph.ops()] == ["aten.sigmoid", "aten.mul.Tensor"]
    assert graph.outputs == (graph["e"],)
    graph.verify()


def test_values_that_were_there_before_keep_their_names() -> None:
    graph = graph_of("%a = aten.relu(%x) : f32[4]", "%b = aten.relu(%x) : f32[4]", returned="%b")
    graph["a"].op.loc = Location(made_by="share")
    rewriter = Rewriter(graph, graph["b"].op, "share")
    rewriter.replace(graph["b"].op, graph["a"])
    assert rewriter.changed
    assert graph.outputs == (graph["a"],)
    assert [value.name for op in graph.ops() for value in op.results] == ["a"]


def test_parameters_keep_the_names_of_their_weights_and_others_on_request() -> None:
    graph = graph_of("%y = aten.silu(%x) : f32[4]", returned="%y")
    op = graph["y"].op
    rewriter = Rewriter(graph, op, "fold")
    rewriter.replace(op, rewriter.insert("core.param", attrs={"name": "w"}, types=[op.result.type], names=["w"]).result)
    assert graph.outputs == (graph["w"],)
    op = graph.append("aten.neg", graph["w"], types=[graph["w"].type], names=["z"])
    rewriter = Rewriter(graph, op, "fold")
    made = rewriter.insert("aten.relu", graph["w"], types=[graph["w"].type], names=["mine"]).result
    rewriter.replace(op, made, keep_names=False)
    assert made.name == "mine"


def test_several_results_are_replaced_one_by_one() -> None:
    graph = graph_of(
        "%v, %i = aten.topk(%x, 4) : f32[4], i64[4]", "%y = aten.gather(%v, 0, %i) : f32[4]", returned="%y"
    )
    op = graph["v"].op
    rewriter = Rewriter(graph, op, "sort")
    with pytest.raises(PassError, match=r"aten\.topk has 2 results, but got 1 replacement values"):
        rewriter.replace(op, graph["x"])
    assert not rewriter.changed
    made = rewriter.insert("aten.sort", graph["x"], types=[value.type for value in op.results])
    rewriter.replace(op, *made.results)
    assert_text(
        graph,
        """
        func @f(%x: f32[4]) -> (f32[4]) {
          %v, %i = aten.sort(%x) : f32[4], i64[4]
          %y = aten.gather(%v, 0, %i) : f32[4]
          return %y
        }
        """,
    )


def test_a_value_may_be_wrapped_in_an_operation_that_reads_it() -> None:
    graph = graph_of("%a = aten.relu(%x) : f32[4]", "%b = aten.silu(%a) : f32[4]", returned="%b")
    rewriter = Rewriter(graph, graph["b"].op, "cast")
    cast = rewriter.insert("aten.clone", graph["a"], types=[graph["a"].type], names=["cast"]).result
    graph.replace(graph["a"], cast)
    graph.verify()
    assert graph["b"].op.args == (cast,)


def test_rewriting_that_does_not_end_is_reported() -> None:
    graph = graph_of("%a = aten.neg(%x) : f32[4]", "%y = aten.relu(%a) : f32[4]", returned="%y")
    with pytest.raises(PassError) as caught:
        apply_rules(graph, [DoubleNegation(), Forever()], "loop")
    assert str(caught.value) == "rewriting does not terminate: after 100 sweeps, Forever still matches (in pass 'loop')"
    graph.verify()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Silent(), "rule Silent does not say whether it matches: got None; need the keyword arguments of rewrite"),
        (Misspelled(), "rule Misspelled starts at an unknown operation 'aten.rellu'. Did you mean 'aten.relu'?"),
        (Suffixed(), "rule Suffixed starts at an unknown operation 'aten.relu.default'. Did you mean 'aten.relu'?"),
        (Unlisted(), "root of rule Unlisted is of a wrong type: got 'aten.relu'; need a tuple of names or roles"),
        (Wide(), "%s would be replaced by %cat, which has another type: got f32[8]; need f32[4]"),
    ],
)
def test_a_malformed_rule(rule: Rule, message: str) -> None:
    graph = graph_of("%r = aten.relu(%x) : f32[4]", "%s = aten.silu(%r) : f32[4]", returned="%s")
    with pytest.raises(PassError) as caught:
        apply_rules(graph, [rule], "malformed")
    assert str(caught.value).startswith(message)
    assert not apply_rules(graph, [Foreign()], "foreign")


def test_a_rule_that_changes_nothing_does_not_count_as_a_change() -> None:
    graph = graph_of("%y = aten.relu(%x) : f32[4]", returned="%y")
    assert not apply_rules(graph, [Idle()], "idle")


def test_explain_says_for_each_candidate_why_it_was_left_alone() -> None:
    graph = graph_of(*NEGATIONS[:2], "%r = aten.relu(%b) : f32[4]", returned="%r")
    rule = DoubleNegation()
    assert explain(graph, [rule, Idle()]) == [(graph["a"].op, rule, Missed("its input is not a neg", graph["x"]))]
    assert str(Missed("its input is not a neg", graph["x"])) == "its input is not a neg (%x)"
    assert str(Missed("it is alone")) == "it is alone"
    assert rule.name == "DoubleNegation"


def test_erase_unread_takes_what_only_the_erased_ones_read() -> None:
    graph = graph_of(
        "%a = aten.neg(%x) : f32[4]",
        "%b = aten.relu(%a) : f32[4]",
        "%c, %d = aten.topk(%b, 4) : f32[4], i64[4]",
        "%e = aten.cat([%c, %b]) : f32[8]",
        returned="%a",
    )
    rewriter = Rewriter(graph, graph.return_op, "clean")
    rewriter.erase_unread(graph["b"].op)
    assert not rewriter.changed
    rewriter.erase_unread(graph["e"].op)
    assert rewriter.changed
    assert [op.name for op in graph.ops()] == ["aten.neg"]
    rewriter.erase_unread(graph["x"].op)
    rewriter.erase_unread(graph.return_op)
    assert len(graph) == 3
    graph.verify()


def test_erase_unread_leaves_updates_alone() -> None:
    graph = graph_of("core.update(%x, %x)", "%y = aten.neg(%x) : f32[4]", returned="%y")
    Rewriter(graph, graph.return_op, "clean").erase_unread(graph.ops()[0])
    assert len(graph.ops()) == 2


def test_erase_unread_copes_with_long_chains() -> None:
    graph = Graph()
    graph.append("aten.relu", types=[])
    value = graph.append("core.param", attrs={"name": "w"}, types=[F32]).result
    for _ in range(5000):
        value = graph.append("aten.neg", value, types=[F32]).result
    Rewriter(graph, graph.return_op, "clean").erase_unread(value.op)
    assert [op.name for op in graph.ops()] == ["aten.relu"]


F32 = graph_of(returned="%x")["x"].type


def test_an_erased_anchor_is_no_place_any_more() -> None:
    graph = graph_of("%y = aten.neg(%x) : f32[4]", returned="%y")
    rewriter = Rewriter(graph, graph["y"].op, "late")
    rewriter.replace(graph["y"].op, graph["x"])
    with pytest.raises(QCompilerError, match=r"the operation is not in @f: got aten\.neg"):
        rewriter.insert("aten.relu", graph["x"], types=[F32])
