"""Unit tests for parts of capture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional

from qcompiler.capture.bounds import BoundsCheck
from qcompiler.capture.decompositions import _is_taken_apart, _table, decompose, is_assertion
from qcompiler.capture.exporting import export_program
from qcompiler.capture.inlining import inline
from qcompiler.capture.locations import short_path
from qcompiler.capture.quiet import third_party_silence
from qcompiler.testing import Function


def test_indices_out_of_range_raise_before_they_reach_a_device() -> None:
    x = torch.randn(4, 3)
    index = torch.tensor
    with BoundsCheck():
        assert x[index([0, -1])].shape == (2, 3) and x[x > 9].numel() == 0
        (
            functional.embedding(index([3]), x),
            x.gather(1, index([[2]])),
            x[:, index([2])],
            x.index_copy(0, index([3]), x[:1]),
        )
        out_of_range: list[Callable[[], Any]] = [
            lambda: x[index([4])],
            lambda: x[:, index([3])],
            lambda: functional.embedding(index([-1]), x),
            lambda: x.gather(1, index([[3]])),
            lambda: x.index_copy(0, index([4]), x[:1]),
            lambda: torch.zeros(3).scatter(0, index([3]), 1.0),
        ]
        for access in out_of_range:
            with pytest.raises(IndexError, match="out of range for"):
                access()


def test_locations_show_no_machine_paths() -> None:
    assert short_path("/usr/lib/python3.11/site-packages/transformers/models/a.py") == "transformers/models/a.py"
    assert short_path("/somewhere/else/model.py") == "model.py"


class Layout(torch.nn.Module):
    """Composites decomposed in place that use sizes, strides, dtypes and constants in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(8, 8)

    def forward(self, input: Tensor, mask: Tensor) -> Any:
        heads = self.fc(input).view(input.shape[0], -1, 2, 4).transpose(1, 2)
        back = heads.transpose(1, 2).reshape(*input.shape[:-1], -1).to(torch.bfloat16)
        flat = functional.dropout(back, 0.5, self.training).float().flatten(0, 1).contiguous()
        wide = mask[:, None].expand(-1, input.shape[1]).reshape(-1) & torch.tensor(True)
        return flat.reshape(input.shape[0] * input.shape[1], 8), wide, heads.narrow(1, 0, 1).type_as(mask), heads.mT


def test_composites_decomposed_in_place_match_torch() -> None:
    program = export_program(Layout().eval(), (torch.randn(3, 5, 8), torch.ones(3, dtype=torch.bool)), {})
    assert_made_like_torch(program)
    graph = inline(program, _is_taken_apart, is_assertion)
    assert graph is not None
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    assert placeholders == [node.name for node in program.graph.nodes if node.op == "placeholder"]


def assert_made_like_torch(program: ExportedProgram) -> None:
    with third_party_silence():
        again = program.run_decompositions(_table())
    graph = inline(program, _is_taken_apart, is_assertion)
    assert graph is not None
    ours: Any = graph.output_node().args[0]
    theirs: Any = again.graph.output_node().args[0]
    assert list(map(spelled, ours)) == list(map(spelled, theirs))


def accumulated(x: Tensor) -> Any:
    total = x * 0
    total.index_put_((torch.tensor([2, 0]),), x[:2], accumulate=True)
    total /= total.sum(-1, keepdim=True)
    late = total[1:]
    return total, late, torch.where(x > 0, x, 1).masked_fill_(x < -1, 0).add_(1, alpha=2)


def overwritten(x: Tensor) -> Any:
    """The view is read before the second write."""
    y = x + 1
    first = y.add_(x)
    part = y[1:] * 2
    second = first.copy_(x)
    return first, second, part, torch.min(y, x)


@pytest.mark.parametrize("function", [accumulated, overwritten])
def test_writes_to_intermediate_tensors_become_functional_like_torchs(function: Callable[[Tensor], Any]) -> None:
    program = export_program(Function(function), (torch.randn(3, 5),), {})
    assert any(node.op == "call_function" and node.target._schema.is_mutable for node in program.graph.nodes)
    assert_made_like_torch(program)


def test_a_written_view_is_the_only_one_that_is_read() -> None:
    program = export_program(Function(lambda x: (x * 3).t().add_(1)), (torch.randn(3, 5),), {})
    scaled: Any = ("aten.mul.Tensor", ["args_0", 3], [])
    outputs = decompose(program).graph.output_node().args[0]
    assert spelled(outputs) == [("aten.add.Tensor", [("aten.t.default", [scaled], []), 1], [])]


def spelled(node: Any) -> Any:
    """The expression that a node computes, as a tree down to the inputs, with sizes by their expressions."""
    if not isinstance(node, torch.fx.Node):
        return [spelled(item) for item in node] if isinstance(node, list | tuple) else node
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return str(value.node.expr)
    if node.op == "placeholder":
        return node.name
    if node.target in (torch.ops.aten.clone.default, torch.ops.aten.lift_fresh_copy.default) and not node.kwargs:
        return spelled(node.args[0])  # the importer drops copies
    return str(node.target), spelled(node.args), [(key, spelled(arg)) for key, arg in node.kwargs.items()]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.add_(1),
        lambda x: (y := x + 1, y.t(), y.add_(1))[1],
        lambda x: (y := x + 1, y[1:].add_(1))[0],
        lambda x: (x.half() * 2).add_(x),
        lambda x: (x * 2).t_(),
        lambda x: torch.empty_like(x).uniform_(),
        lambda x: functional.conv1d(x[None], torch.ones(4, 3, 3), padding="same"),
        lambda x: torch.where(x > 0)[0].reshape(-1, 1),
    ],
    ids=[
        "an input",
        "read through a view",
        "written through a view",
        "other dtype",
        "other strides",
        "random",
        "contains what is kept",
        "data decide a size",
    ],
)
def test_other_programs_are_traced_again(function: Callable[[Tensor], Tensor]) -> None:
    program = export_program(Function(function), (torch.randn(3, 5),), {})
    assert inline(program, _is_taken_apart, is_assertion) is None
    assert len(decompose(program).graph.nodes) > 2
