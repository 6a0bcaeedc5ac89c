"""An operation that writes state during the call needs only its declaration: all else asks its effects."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from codegen.host import emit_host_module, load_host_module
from codegen.mlir.interface import interface_of
from qcompiler.errors import VerifyError
from qcompiler.interpreter import interpret
from qcompiler.ir import Effects, Graph, op_table, traits
from qcompiler.ir.op_table import OpDef, declare
from qcompiler.pass_manager.pipeline import Pipeline

TALLY = """\
func @tally(%x: f32[4]) -> (f32[4], f32[4]) {
  %total = core.buffer() {name = "total"} : f32[4]
  %before = tally.read(%total) : f32[4]
  %twice = aten.add.Tensor(%x, %x) : f32[4]
  tally.add(%total, %twice)
  %unread = tally.read(%total) : f32[4]
  %after = tally.read(%total) : f32[4]
  return %before, %after
}"""


@dataclass
class Owner:
    """The `weights` object of a host module."""

    total: Tensor
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def _add(total: Tensor, x: Tensor) -> None:
    total.add_(x)


@pytest.fixture(autouse=True)
def tally(monkeypatch: pytest.MonkeyPatch) -> None:
    """Declares a dialect with two operations for the time of a test."""
    for module, name in ((op_table, "_TABLE"), (op_table, "_DIALECTS"), (traits, "_KNOWN")):
        monkeypatch.setattr(module, name, getattr(module, name).copy())
    declare(
        OpDef("tally.add", "Adds to a total.", ("total", "x"), types=lambda _: (), meaning=_add, effects=Effects.WRITES)
    )
    declare(OpDef("tally.read", "The total so far.", ("total",), types=lambda op: (op["total"].type,),
                  meaning=torch.clone, effects=Effects.READS))  # fmt: skip


def check_runs(graph: Graph) -> None:
    """Checks two calls of the host module against one of the interpreter, which changes no weight."""
    total, x = torch.full((4,), 10.0), torch.arange(4.0)
    updates: dict[str, Tensor] = {}
    before, after = interpret(graph, [x], {"total": total}, updates=updates)
    assert torch.equal(before, total)
    assert torch.equal(after, 10 + 2 * x)
    assert torch.equal(updates["total"], after)
    assert torch.equal(total, torch.full((4,), 10.0))

    owner, run = Owner(total), load_host_module(emit_host_module(graph, "cpu"), "<test>")
    assert all(map(torch.equal, run(owner, x), (before, after)))
    assert all(map(torch.equal, run(owner, x), (10 + 2 * x, 10 + 4 * x)))
    assert torch.equal(total, 10 + 4 * x)


def test_it_runs_in_the_order_of_the_graph() -> None:
    graph = Graph.parse(TALLY)
    graph.verify()
    check_runs(graph)


def test_passes_keep_it_and_its_place() -> None:
    graph = Graph.parse(TALLY)
    pipeline = Pipeline.parse("canonicalize; dead-code; share-quantize; fold-constants; to-kernels")
    for step in pipeline:
        step.run(graph)
        graph.verify(step.name)
    names = [op.name for op in graph.ops() if op.name.startswith("tally.")]
    assert names == ["tally.read", "tally.add", "tally.read"], "only the read without users is gone"
    check_runs(graph)


@pytest.mark.parametrize(
    ("user", "who"), [("%y = aten.neg(%total) : f32[4]", "aten.neg"), ("core.update(%total, %twice)", "core.update")]
)
def test_state_that_is_written_during_the_call_has_no_other_users(user: str, who: str) -> None:
    """A view or a copy of it would depend on the order of operations that passes may move."""
    graph = Graph.parse(TALLY.replace("  return", f"  {user}\n  return"))
    with pytest.raises(VerifyError) as error:
        graph.verify()
    assert f"rule V16: {who}: tally.add writes %total during the call, so only operations that read" in str(error.value)


def test_it_is_not_an_update_at_the_end_of_the_call() -> None:
    graph = Graph.parse(TALLY)
    assert graph.updates == []
    assert [result.kind for result in interface_of(graph).results] == ["output", "output"]
