"""Finds values that equal operations compute from equal operands: one value, written several times.

%q_in = aten.mul.Tensor(%x, %factors)
%k_in = aten.mul.Tensor(%x, %factors)        ->    {%k_in: %q_in}
"""

from collections.abc import Iterator, Mapping

from passes.analyses.memory import origin
from qcompiler.ir import Argument, Graph, Value
from qcompiler.ir.traits import Effects


def equal_values(graph: Graph) -> Mapping[Value, Value]:
    """Value -> the first value that equals it in every bit, without values that are the first themselves.

    Operations that read or write state, draw random numbers or communicate differ each time. So do those whose result
    or operand shares memory with a value that an operation writes in place, before or after it.
    """
    equal: dict[Value, Value] = {}
    found: dict[tuple[object, ...], tuple[Value, ...]] = {}
    written = {*_written(graph)}
    for op in graph.ops():
        values = (*op.results, *(value for _, value in op.operands()))
        if not op.effects.repeatable or not op.results or not written.isdisjoint(map(origin, values)):
            continue
        attrs = ((name, _key(op.attrs[name], equal)) for name in sorted(op.attrs))
        key = (op.name, _key(op.args, equal), *attrs, *(str(each.type) for each in op.results))
        first = found.setdefault(key, tuple(op.results))
        if first[0] is not op.results[0]:
            equal |= zip(op.results, first, strict=True)
    return equal


def _key(arg: Argument, equal: Mapping[Value, Value]) -> object:
    """What two arguments have in common if they are equal; 1, 1.0 and True are not."""
    if isinstance(arg, Value):
        return equal.get(arg, arg)
    return tuple(_key(item, equal) for item in arg) if isinstance(arg, tuple) else (type(arg), arg)


def _written(graph: Graph) -> Iterator[Value]:
    """The values that own the memory that an operation may write."""
    for op in graph.ops():
        if Effects.WRITES in op.effects:
            yield from (origin(value) for _, value in op.operands())
