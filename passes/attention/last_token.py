"""Keeps the result of one token of each row: only that token's numbers pass through the last operations.

  %norm = … : bf16[s0, s1, 4096]
  %logits = aten.linear(%norm, %head) : bf16[s0, s1, 128256]
  return %logits
->
  %norm_last = aten.gather(%norm, 1, %last) : bf16[s0, 1, 4096]           (with %last expanded to this shape)
  %logits = aten.linear(%norm_last, %head) : bf16[s0, 1, 128256]          (with the position axis kept as size 1)
  return %logits[:, 0]

`gather`, unlike `index`, takes no negative indices, so that a kernel need not test for them.
"""

from passes.analyses.sequence import Sequence
from qcompiler.errors import PassError
from qcompiler.ir import Argument, Graph, Op, ScalarType, Size, TensorType, Type, Value, map_tree
from qcompiler.ir.sizes import substitute


def keep_last(graph: Graph, sequence: Sequence, last: Value, batch: Value) -> None:
    """Reduces the only output, [batch, positions, …], to the token `last[b]` of each row, [batch, …].

    Args:
        graph: The graph, changed in place.
        sequence: Its analysis.
        last: i64[batch], indices along the positions of this call.
        batch: The size of the batch, a number.

    Raises:
        PassError: The graph has another output.
    """
    output = only_output(graph)
    cut = set(sequence.tokens)
    after = _after(graph, cut)
    if not cut or not _narrow(after, cut, sequence):
        cut, after = {output}, {graph.return_op}
    first = next(op for op in graph if op in after)
    for value in sorted(cut, key=lambda value: graph.rank(value.op)):
        new = _gathered(graph, first, value, batch, last)
        for user in graph.users(value):
            if user in after:
                graph.replace_in(user, value, new)
    for op in graph.ops():
        if op in after:
            _shorten(graph, op, after, sequence, batch)
    final = only_output(graph)
    kind = TensorType(final.tensor.dtype, (final.tensor.shape[0], *final.tensor.shape[2:]))
    loc = final.op.loc
    chosen = graph.append("aten.select.int", final, 1, 0, types=[kind], names=[f"{output.name}_last"], loc=loc)
    graph.set_outputs([chosen.result])


def only_output(graph: Graph) -> Value:
    """The only output, a tensor; raises PassError if there are others."""
    if len(graph.outputs) == 1 and isinstance(value := graph.outputs[0], Value) and isinstance(value.type, TensorType):
        return value
    got = ", ".join(str(each.type) if isinstance(each, Value) else str(each) for each in graph.outputs)
    raise PassError("the model returns more than its logits", got=got, need="one tensor, the logits of each token")


def _after(graph: Graph, cut: set[Value]) -> set[Op]:
    """The operations between the values of `cut` and the outputs, which depend on one of them."""
    found: set[Op] = set()
    for op in graph:
        if any(value in cut or value.op in found for _, value in op.operands()):
            found.add(op)
    needed = {graph.return_op}
    for op in reversed(list(graph)):
        if op in needed:
            needed.update(value.op for _, value in op.operands() if value not in cut)
    return found & needed


def _narrow(after: set[Op], cut: set[Value], sequence: Sequence) -> bool:
    """Whether the operations after the cut read no other tensor along the positions, and sizes with known values."""
    for op in after:
        for value in (value for _, value in op.operands() if value not in cut and value.op not in after):
            left = _shortened(value.type, sequence.length)
            if left == value.type:
                continue
            if not isinstance(left, ScalarType) or not (isinstance(left.value, int) or left.value == sequence.batch):
                return False
    return True


def _gathered(graph: Graph, before: Op, value: Value, batch: Value, last: Value) -> Value:
    """The elements of one token of each row, [batch, 1, …]."""
    shape = (value.tensor.shape[0], 1, *value.tensor.shape[2:])
    ones = TensorType(last.tensor.dtype, (shape[0], *(1 for _ in shape[1:])))
    column: Argument = (batch, *(1 for _ in shape[1:]))
    token = graph.insert(before, "aten.view", last, column, types=[ones], names=["last"]).result
    sizes = tuple(_size(graph, before, value, axis) for axis in range(2, len(shape)))
    whole = TensorType(last.tensor.dtype, shape)
    index = graph.insert(before, "aten.expand", token, (batch, 1, *sizes), types=[whole], names=["last"]).result
    types, names = [TensorType(value.tensor.dtype, shape)], [f"{value.name}_last"]
    return graph.insert(before, "aten.gather", value, 1, index, types=types, names=names, loc=value.op.loc).result


def _size(graph: Graph, before: Op, value: Value, axis: int) -> Argument:
    """The size of an axis as an argument."""
    size = value.tensor.shape[axis]
    if isinstance(size, int):
        return size
    types = [ScalarType("int", size)]
    return graph.insert(before, "aten.sym_size.int", value, axis, types=types, names=["size"]).result


def _shorten(graph: Graph, op: Op, after: set[Op], sequence: Sequence, batch: Value) -> None:
    """Replaces the number of positions by 1 in the result types of an operation, and in the sizes that it reads."""

    def swap(leaf: Argument) -> Argument:
        if not isinstance(leaf, Value) or leaf.op in after or not isinstance(leaf.type, ScalarType):
            return leaf
        left = _shortened(leaf.type, sequence.length)
        if left == leaf.type:
            return leaf
        return left.value if isinstance(left, ScalarType) and isinstance(left.value, int) else batch

    graph.set_args(op, map_tree(swap, op.args), {key: map_tree(swap, arg) for key, arg in op.attrs.items()})
    for value in op.results:
        value.type = _shortened(value.type, sequence.length)


def _shortened(type: Type, length: Size) -> Type:
    sizes: dict[str, Size] = {str(length): 1}
    if isinstance(type, TensorType):
        return TensorType(type.dtype, tuple(substitute(size, sizes) for size in type.shape))
    if isinstance(type, ScalarType) and type.value is not None:
        return ScalarType(type.kind, substitute(type.value, sizes))
    return type
