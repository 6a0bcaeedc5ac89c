"""One error for all operations that MLIR cannot represent, with count, locations and reasons."""

import operator
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.fx import Graph as FxGraph
from torch.fx import Node, map_arg

from qcompiler.errors import CodegenError, QCompilerError
from qcompiler.ir import Op

OPERATION = "operation"
"""Key of a node's metadata for its operation in the graph."""


class Refusals:
    """Collects failures to report them together.

    Args:
        problem: What is wrong with the operations, such as "cannot be traced".
    """

    def __init__(self, problem: str) -> None:
        self._problem = problem
        self._found: dict[tuple[str, str], list[Op]] = {}

    def add(self, op: Op, why: object) -> None:
        """Adds one operation."""
        reason = str(why).strip().partition("\n")[0] or type(why).__name__
        self._found.setdefault((op.name, reason), []).append(op)

    def __bool__(self) -> bool:
        return bool(self._found)

    def check(self) -> None:
        """Raises CodegenError with everything that was added, if there is anything."""
        if not self._found:
            return
        count = len({name for name, _ in self._found})
        rows = [f"\n  {name}{_places(ops)}: {why}" for (name, why), ops in self._found.items()]
        raise CodegenError(
            f"{count} operation{'s' * (count > 1)} of the graph {self._problem}:{''.join(rows)}",
            fix="\nChoose another stage, or write those parts of the model with other operations.",
        )


def _places(ops: Sequence[Op]) -> str:
    """The number of occurrences of an operation, and their locations."""
    lines = dict.fromkeys(f"{op.loc.file}:{op.loc.line}" for op in ops if op.loc.file)
    shown = ", ".join([*list(lines)[:3], *(["…"] if len(lines) > 3 else [])])
    return f" (x{len(ops)}{f', {shown}' if shown else ''})"


def find(graph: FxGraph, attempt: Callable[[FxGraph], object], refusals: Refusals) -> None:
    """Attempts each node of a graph separately, and adds the operations whose nodes fail.

    Equal nodes are attempted once.
    """
    known: dict[str, str | None] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem or OPERATION not in node.meta:
            continue
        key = f"{node.target} {map_arg((node.args, node.kwargs), lambda arg: _shown(arg.meta.get('val')))}"
        if key not in known:
            known[key] = _why_not(alone(node), attempt)
        if (why := known[key]) is not None:
            refusals.add(node.meta[OPERATION], f"{why}, for {node.target}")


def alone(node: Node) -> FxGraph:
    """A graph of one node, with its tensors as placeholders; sizes are computed as in the original graph."""
    graph = FxGraph()
    twins: dict[Node, Node] = {}

    def twin(arg: Node) -> Node:
        if arg not in twins:
            is_size = isinstance(arg.meta.get("val"), torch.SymInt) and arg.op == "call_function"
            twins[arg] = graph.node_copy(arg, twin) if is_size else graph.placeholder(arg.name)
            twins[arg].meta = dict(arg.meta)
        return twins[arg]

    map_arg((node.args, node.kwargs), twin)
    copy = graph.node_copy(node, twin)
    results = node.meta["val"]
    if isinstance(results, tuple | list):
        graph.output(tuple(_items(graph, copy, results)))
    else:
        graph.output((copy,))
    return _placeholders_first(graph)


def _items(graph: FxGraph, node: Node, results: tuple[object, ...] | list[object]) -> Iterator[Node]:
    for index, result in enumerate(results):
        item = graph.call_function(operator.getitem, (node, index))
        item.meta["val"] = result
        yield item


def _placeholders_first(graph: FxGraph) -> FxGraph:
    first = next(iter(graph.nodes))
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        if node is not first:
            first.prepend(node)
    return graph


def _why_not(graph: FxGraph, attempt: Callable[[FxGraph], object]) -> str | None:
    try:
        attempt(graph)
    except QCompilerError as error:
        return str(error.got or error.problem)
    except Exception as error:  # the importer raises arbitrary exceptions
        return str(error).partition("\n")[0] or type(error).__name__
    return None


def _shown(value: object) -> str:
    """An argument, for a key: a tensor is represented by its type."""
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else str(value)
