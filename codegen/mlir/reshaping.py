"""Rewrites views over symbolic sizes into unambiguous ones: flatten, then unflatten.

    view(x: [s0, s1, 256], [s0*s1, 256])       ->   flatten(x, 0, 1)
    view(x: [s0, s1, 256], [s0, s1, 4, 64])    ->   unflatten(x, 2, [4, 64])

torch-mlir sees `?` instead of s0 or s0*s1. For a view with several of them it has to guess which belong together, and
guesses wrong: it pairs the first two, and assumes that the rest are ones.
"""

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten


def spell_out_views(graph: torch.fx.Graph) -> None:
    """Replaces, in place, the views that have a symbolic size; needs the tracer's fake tensors in `meta["val"]`."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.view.default:
            continue
        before, after = _shape(node.args[0]), _shape(node)
        if all(isinstance(size, int) for size in (*before, *after)):
            continue
        parts = groups(before, after)
        with graph.inserting_before(node):
            node.replace_all_uses_with(_spelled(graph, node, parts))
        graph.erase_node(node)


def groups(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[slice, slice]]:
    """Shortest runs of dimensions of both shapes whose products are known to be equal."""
    left, right = (list(accumulate(shape, operator.mul, initial=1)) for shape in (before, after))
    found, start, begin = [], 0, 0
    for stop in range(1, len(before) + 1):
        ends = (end for end in range(begin + 1, len(after) + 1) if statically_known_true(left[stop] == right[end]))
        if (end := next(ends, None)) is not None:
            found.append((slice(start, stop), slice(begin, end)))
            start, begin = stop, end
    rest = (slice(start, len(before)), slice(begin, len(after)))
    if start < len(before) or begin < len(after):
        empty = start == len(before) or begin == len(after)  # trailing ones belong to the previous run
        first = found.pop() if empty and found else rest
        found.append((slice(first[0].start, len(before)), slice(first[1].start, len(after))))
    return found


def _spelled(graph: torch.fx.Graph, node: torch.fx.Node, parts: list[tuple[slice, slice]]) -> torch.fx.Node:
    """The last of the nodes that replace the view `node`."""
    value, sizes = node.args[0], node.args[1]
    axis = 0
    for before, after in parts:
        if before.stop - before.start > 1:
            value = _call(graph, node, aten.flatten.using_ints, value, axis, axis + before.stop - before.start - 1)
        if after.stop - after.start > 1:
            value = _call(graph, node, aten.unflatten.int, value, axis, list(sizes[after]))  # type: ignore[index,arg-type]
        axis += after.stop - after.start
    return value  # type: ignore[return-value]  # the first argument of a view is a node


def _call(graph: torch.fx.Graph, like: torch.fx.Node, target: Any, *args: Any) -> torch.fx.Node:
    made = graph.call_function(target, args)
    made.meta = dict(like.meta)
    made.meta["val"] = target(*(torch.fx.map_arg(arg, lambda node: node.meta["val"]) for arg in args))
    return made


def _shape(node: Any) -> Sequence[Any]:
    shape: Sequence[Any] = node.meta["val"].shape
    return shape


__all__ = ["groups", "spell_out_views"]
