"""The `coll` dialect: operations of all ranks along an axis of the mesh.

    %y = coll.reshard(%x) {mesh = "tp"}        the same value, held as the result type says
    %y = coll.all_reduce(%x) {mesh = "tp"}     the sum of what the ranks hold

In a graph with placements (`qcompiler.ir.sharding`), values are whole, and a collective changes only how ranks hold
them. In the program of one rank, types have no placements, and a collective computes with the other ranks: through
`torch.distributed`, or through a simulation (see `qcompiler.distributed`).
"""

import torch
from torch import Tensor

from qcompiler.distributed.communicator import current
from qcompiler.ir import Argument, Effects, Op, Partial, Shard, TensorType, Type
from qcompiler.ir.op_table import TEXT, AttributeCheck, OpDef, OpError, declare

AXIS: tuple[AttributeCheck, str] = (lambda a: type(a) is int and a >= 0, "an axis, from 0")
RANKS: tuple[AttributeCheck, str] = (lambda a: type(a) is int and a >= 2, "a number of ranks, from 2")
UNIT: tuple[AttributeCheck, str] = (lambda a: type(a) is int and a >= 1, "a number of elements, from 1")


def is_whole(op: Op) -> bool:
    """Whether a collective is in a graph with placements, where values are whole and it changes no numbers."""
    kinds = [value.type for value in (*(value for _, value in op.operands()), *op.results)]
    return any(isinstance(kind, TensorType) and kind.sharding for kind in kinds)


def _integer(op: Op, name: str) -> int:
    value: Argument = op.argument(name)
    return value if isinstance(value, int) else 1


def _operand(op: Op) -> tuple[TensorType, str, int]:
    """The type of the operand, the mesh axis, and the axis that is gathered or scattered."""
    kind, axis = op["x"].tensor, _integer(op, "axis")
    if axis >= len(kind.shape):
        raise OpError(f"the operand is {kind}, which has no axis {axis}", "x")
    return kind, str(op.attrs["mesh"]), axis


def all_reduce_types(op: Op) -> tuple[Type, ...]:
    """x partial along mesh -> replicated along mesh; of one rank: x -> the same type"""
    kind, mesh = op["x"].tensor, str(op.attrs["mesh"])
    if isinstance(kind.placement(mesh), Shard):
        raise OpError(f"the operand is cut along '{mesh}', so that its parts are not terms of a sum", "x")
    return (kind.placed(mesh, None),)


def all_gather_types(op: Op) -> tuple[Type, ...]:
    """x cut along mesh -> replicated along mesh; of one rank: x[..., n, ...] -> [..., ranks * n, ...]"""
    kind, mesh, axis = _operand(op)
    match kind.placement(mesh):
        case Shard(axis=cut, copies=1) if cut == axis:
            return (kind.placed(mesh, None),)
        case None:
            shape = list(kind.shape)
            shape[axis] = shape[axis] * _integer(op, "ranks")
            return (TensorType(kind.dtype, tuple(shape), kind.sharding),)
    raise OpError(f"the operand is {kind}, which is not cut along axis {axis}", "x")


def reduce_scatter_types(op: Op) -> tuple[Type, ...]:
    """x partial along mesh -> cut along mesh; of one rank: x[..., n, ...] -> [..., n / ranks, ...]"""
    kind, mesh, axis = _operand(op)
    shard = Shard(axis, _integer(op, "ranks"), _integer(op, "unit"))
    if (why := shard.why_not(kind.shape)) is not None:
        raise OpError(f"the operand is {kind}, but {why}", "x")
    match kind.placement(mesh):
        case Partial():
            return (kind.placed(mesh, shard),)
        case None:
            return (TensorType(kind.dtype, kind.shape).placed(mesh, shard).local,)
    raise OpError(f"the operand is {kind}, which is not a partial sum along '{mesh}'", "x")


def reshard(x: Tensor, *, mesh: str) -> Tensor:
    """Torch definition of `coll.reshard`: the value itself; it occurs only in graphs with placements."""
    return x


def all_reduce(x: Tensor, *, mesh: str) -> Tensor:
    """Torch definition of `coll.all_reduce`, for one rank.

    Args:
        x: What this rank holds, of the same type on all ranks.
        mesh: The axis of the mesh along which the ranks differ.
    """
    return current().all_reduce(x, mesh)


def all_gather(x: Tensor, *, mesh: str, axis: int, ranks: int) -> Tensor:
    """Torch definition of `coll.all_gather`, for one rank: the parts of all `ranks`, concatenated along `axis`."""
    return current().all_gather(x, mesh, axis)


def reduce_scatter(x: Tensor, *, mesh: str, axis: int, ranks: int, unit: int = 1) -> Tensor:
    """Torch definition of `coll.reduce_scatter`, for one rank: its part along `axis` of the sum over all `ranks`."""
    return current().reduce_scatter(x, mesh, axis)


def own_first(x: Tensor, *, mesh: str, ranks: int, groups: int) -> Tensor:
    """Torch definition of `coll.own_first`: (x - the first group of this rank) mod `groups`.

    Args:
        x: Numbers of groups, integers.
        mesh: The axis of the mesh.
        ranks: The number of ranks along it, each with an equal number of groups.
        groups: The number of groups on all ranks.
    """
    return (x - current().place(mesh) * (groups // ranks)) % groups


def own_first_types(op: Op) -> tuple[Type, ...]:
    """x: integers -> the same type"""
    kind, groups, ranks = op["x"].tensor, op.attrs["groups"], op.attrs["ranks"]
    if kind.dtype.is_float:
        raise OpError(f"the operand is {kind}, but numbers of groups are integers", "x")
    if isinstance(groups, int) and isinstance(ranks, int) and groups % ranks:
        raise OpError(f"{groups} groups cannot be divided among {ranks} ranks")
    return (kind,)


def own_part(x: Tensor, *, mesh: str, axis: int, ranks: int) -> Tensor:
    """Torch definition of `coll.own_part`: the tensor itself."""
    return x


def own_part_types(op: Op) -> tuple[Type, ...]:
    """x -> the type of x"""
    return (_operand(op)[0],)


def own_rows(x: Tensor, ends: Tensor) -> Tensor:
    """Torch definition of `coll.own_rows`: zeros in all rows after the end of the last group.

    Args:
        x: Rows sorted by group, `[T, N]`.
        ends: int32 `[E]`, the end row of each group.
    """
    others = torch.arange(x.shape[0], device=x.device) >= ends[-1]
    return x.masked_fill(others.unsqueeze(1), 0)


def own_rows_types(op: Op) -> tuple[Type, ...]:
    """(x[T, N], ends i32[E]) -> the type of x"""
    x, ends = op["x"].tensor, op["ends"].tensor
    if len(x.shape) != 2 or len(ends.shape) != 1:
        raise OpError(f"the operands are {x} and {ends}, but it needs a matrix and the ends of groups of its rows")
    return (x,)


declare(
    OpDef(
        "coll.reshard",
        "The same value, held by the ranks as the result type says.",
        ("x",),
        {"mesh": TEXT},
        meaning=reshard,
        effects=Effects.COMMUNICATES,
    )
)
declare(
    OpDef(
        "coll.all_reduce",
        "The sum of the tensors that the ranks hold, on each rank.",
        ("x",),
        {"mesh": TEXT},
        types=all_reduce_types,
        meaning=all_reduce,
        effects=Effects.COMMUNICATES,
    )
)
declare(
    OpDef(
        "coll.all_gather",
        "The parts that the ranks hold, concatenated along an axis, on each rank.",
        ("x",),
        {"mesh": TEXT, "axis": AXIS, "ranks": RANKS},
        types=all_gather_types,
        meaning=all_gather,
        effects=Effects.COMMUNICATES,
    )
)
declare(
    OpDef(
        "coll.reduce_scatter",
        "One part per rank, along an axis, of the sum of the tensors that the ranks hold.",
        ("x",),
        {"mesh": TEXT, "axis": AXIS, "ranks": RANKS},
        {"unit": UNIT},
        types=reduce_scatter_types,
        meaning=reduce_scatter,
        effects=Effects.COMMUNICATES,
    )
)
declare(
    OpDef(
        "coll.own_first",
        "Numbers of groups, counted from the first group of this rank: its own groups have the smallest numbers.",
        ("x",),
        {"groups": RANKS, "mesh": TEXT, "ranks": RANKS},
        types=own_first_types,
        meaning=own_first,
        effects=Effects.COMMUNICATES,
    )
)
declare(
    OpDef(
        "coll.own_rows",
        "The rows of groups, and zeros after the last group.",
        ("x", "ends"),
        types=own_rows_types,
        meaning=own_rows,
    )
)
declare(
    OpDef(
        "coll.own_part",
        "The same tensor, which is the part of this rank, along an axis, of what the ranks return.",
        ("x",),
        {"mesh": TEXT, "axis": AXIS, "ranks": RANKS},
        types=own_part_types,
        meaning=own_part,
        effects=Effects.COMMUNICATES,
    )
)
