"""In-place operators on intermediate tensors, and the functional operators that can replace them.

same = aten.index_put_(total, [i], x, True)   ->   new = aten.index_put(total, [i], x, True)
y = aten.mul(total, same)                     ->   y = aten.mul(new, new)
"""

from typing import Any

import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

UNFIT = (torch.Tag.inplace_view, torch.Tag.nondeterministic_seeded)
"""Operators that change sizes or strides in place, or draw random numbers, have no equivalent functional operator."""


class Writes:
    """Which nodes of a traced graph share memory, and which in-place operators can be replaced."""

    def __init__(self, graph: Graph) -> None:
        self.place = {node: place for place, node in enumerate(graph.nodes)}
        self.sharing: dict[int, list[Node]] = {}  # storage -> its nodes, in order
        for node in graph.nodes:
            values = pytree.tree_leaves(node.meta.get("val"))
            for storage in {_storage(value) for value in values if isinstance(value, torch.Tensor)}:
                self.sharing.setdefault(storage, []).append(node)

    def functional(self, node: Node) -> Any:
        """Returns the operator that can replace an in-place one; None if there is none.

        It cannot be replaced if it writes to an input or a constant, or to memory that another node views and a
        later one reads.
        """
        form = functional_form(node.target)
        if form is None or "unbacked_bindings" in node.meta:
            return None
        written: Any = node.args[0]
        value, result = written.meta.get("val"), node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not isinstance(result, torch.Tensor):
            return None
        if _storage(value) != _storage(result):
            return None
        first, *_ = group = self.sharing[_storage(value)]
        same = self.same(node)
        views = [other for other in group if other not in same and self.place[other] < self.place[node]]
        stale = any(self.place[user] > self.place[node] for view in views for user in view.users)
        return None if first.op != "call_function" or stale else form

    def same(self, node: Node) -> set[Node]:
        """Returns the nodes that are the written tensor itself: the node, and its operands through earlier writes."""
        found = {node}
        while functional_form(node.target) is not None:
            node = node.args[0]  # type: ignore[assignment]  # a tensor
            found.add(node)
        return found


def functional_form(op: Any) -> Any:
    """Returns `aten.add.Tensor` for `aten.add_.Tensor`; None if there is no such equivalent."""
    if not isinstance(op, torch._ops.OpOverload) or not op._schema.is_mutable or any(tag in op.tags for tag in UNFIT):
        return None
    written = [
        argument.name for argument in op._schema.arguments if argument.alias_info and argument.alias_info.is_write
    ]
    packet = op.overloadpacket.__name__
    form = getattr(getattr(torch.ops.aten, packet.removesuffix("_"), None), op._overloadname, None)
    if form is None or op.namespace != "aten" or not packet.endswith("_") or form._schema.is_mutable:
        return None
    names, others = ([argument.name for argument in each._schema.arguments] for each in (op, form))
    return form if written == names[:1] and names == others else None


def layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Returns dtype, sizes and strides as plain values: comparing symbolic sizes would add guards."""
    sizes = (*tensor.shape, *tensor.stride())
    return tensor.dtype, *(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


def _storage(tensor: torch.Tensor) -> int:
    while is_functorch_wrapped_tensor(tensor):  # traced inside torch.vmap
        tensor = get_unwrapped(tensor)
    address: int = tensor.untyped_storage()._cdata
    return address
