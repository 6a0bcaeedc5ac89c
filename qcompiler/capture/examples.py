"""Example inputs in other sizes, for tracing and for checking the graph.

A tensor is resized by repeating its own entries (index modulo size), so token ids, masks and positions stay valid.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompiler.capture.signature import Signature, TensorSlot, linear, solve
from qcompiler.ir.sizes import evaluate

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""A call's (args, kwargs)."""

Shapes = list[tuple[int, ...]]
"""One shape per flat argument; () if it is not a tensor."""


def enlarged(call: Call, runs: Callable[[Call], bool], has_cache: bool = False) -> Iterator[Call]:
    """Yields examples without sizes of 1 for tracing, most general first; the last is the original call.

    torch.export treats a dimension of size 1 as a constant. A batch or sequence of 1 is therefore traced as 2: first
    both leading dimensions of every tensor, then the leading dimensions of tensors up to rank 3 (a mask has its head
    dimension there), then the first dimension alone. A mask as long as a cache plus one new token grows with the
    tokens, if the model accepts that.

    Args:
        call: The user's example.
        runs: Whether the model runs on a call.
        has_cache: Whether the call has a key-value cache, of rank 4; its length, and the query length of a mask of rank
            4, are the second-to-last axis.
    """
    choices: list[Callable[[torch.Tensor, int], bool]] = [
        *[lambda tensor, axis: axis == 0 or axis == (1 if tensor.ndim < 4 else tensor.ndim - 2)] * has_cache,
        lambda tensor, axis: axis < 2,
        lambda tensor, axis: (axis < 2 and tensor.ndim <= 3) or axis == 0,
        lambda tensor, axis: axis == 0,
        lambda tensor, axis: False,
    ]
    leaves, spec = pytree.tree_flatten(call)
    before = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else () for leaf in leaves]
    seen = []
    for wanted in choices:
        grown = [
            tuple(2 if n == 1 and wanted(leaf, axis) else n for axis, n in enumerate(shape))
            for leaf, shape in zip(leaves, before, strict=True)
        ]
        for shapes in (_with_sums(before, grown), grown):
            if shapes in seen:
                continue
            seen.append(shapes)
            variant = pytree.tree_unflatten(list(map(_resized, leaves, shapes)), spec)
            if shapes == grown or runs(variant):
                yield variant


def _with_sums(before: Shapes, grown: Shapes) -> Shapes:
    """Returns the grown shapes; a last axis that was the sum of two others remains one if a sequence of 1 grew."""
    pairs = [list(zip(shape, new, strict=True)) for shape, new in zip(before, grown, strict=True)]
    longer = {axis for sizes in pairs for axis, (old, new) in enumerate(sizes) if axis and old != new}
    if not longer:
        return grown
    sums = {old + 1: old + 2 for sizes in pairs for old, new in sizes if old == new > 1}
    sums[2] = 4 if len(longer) > 1 else 3  # of past and new tokens, both 1 before
    return [
        (*new[:-1], sums.get(new[-1], new[-1])) if new and new[-1] == old[-1] > 1 else new
        for old, new in zip(before, grown, strict=True)
    ]


def _resized(leaf: Any, shape: tuple[int, ...]) -> Any:
    return resized(leaf, shape) if isinstance(leaf, torch.Tensor) else leaf


def resized(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Returns a tensor of another shape with the same kind of entries; the tensor itself if the shape is unchanged."""
    for axis, size in enumerate(shape):
        if size != tensor.shape[axis]:
            index = torch.arange(size, device=tensor.device) % max(1, tensor.shape[axis])
            tensor = tensor.index_select(axis, index)
    return tensor


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], call: Call) -> Call:
    """Returns the call with `function` applied to every tensor; containers are rebuilt."""
    leaves, spec = pytree.tree_flatten(call)
    mapped: Call = pytree.tree_unflatten([function(x) if isinstance(x, torch.Tensor) else x for x in leaves], spec)
    return mapped


def sizes_of(signature: Signature, call: Call) -> dict[str, int]:
    """Returns the value of each symbol in a call of the captured structure."""
    found: dict[str, int] = {}
    for slot, leaf in zip(signature.slots, pytree.tree_leaves(call), strict=True):
        for axis, size in enumerate(slot.shape if isinstance(slot, TensorSlot) else ()):
            if linear(size) is not None and (solved := solve(size, leaf.shape[axis])) and solved[1] is not None:
                found[solved[0]] = solved[1]
    return found


def with_sizes(signature: Signature, call: Call, sizes: Mapping[str, int]) -> Call | None:
    """Returns a call in which each symbol has the value in `sizes`; None if an empty tensor would have to grow."""
    leaves, spec = pytree.tree_flatten(call)
    for index, slot in enumerate(signature.slots):
        if not isinstance(slot, TensorSlot):
            continue
        try:
            shape = [evaluate(size, sizes) for size in slot.shape]
        except (KeyError, ZeroDivisionError):
            return None
        if any(n and not old for n, old in zip(shape, leaves[index].shape, strict=True)):
            return None
        leaves[index] = resized(leaves[index], shape)
    changed: Call = pytree.tree_unflatten(leaves, spec)
    return changed
