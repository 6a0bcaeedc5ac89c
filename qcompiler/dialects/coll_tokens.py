"""Collectives of the dialect `coll` over tokens, in the program of one rank.

    %p = coll.reduce_scatter_tokens(%y) {few = 64, mesh = "tp", ranks = 2}
    %r = coll.own_tokens(%x) {few = 64, mesh = "tp", ranks = 2}                  of a value that all ranks hold
    %z = aten.add.Tensor(%p, %r)
    %w = coll.all_gather_tokens(%z, [%b, %s]) {few = 64, mesh = "tp", ranks = 2} : bf16[s0, s1, 512]

All axes but the last count tokens. A rank holds its tokens as [1, tokens, 512], one row after the other: rank 0 the
first ones, and zeros after the last one, so that all ranks hold equally many. If a call has fewer than `few` tokens,
each rank holds all of them, and only the sum is communicated. So one program serves a prompt, where cutting pays, and
a decode step of one token, which cannot be cut.

    %t = coll.all_to_all_tokens(%y) {few = 64, mesh = "tp", ranks = 2} : bf16[2, 1, share(s0*s1, 2, 64), 512]

A sum may be sent as its terms instead, for example as codes and scales, which cannot be added on the way: each rank
receives the terms of its tokens from all ranks, and adds them. With fewer than `few` tokens these are all tokens, so
the terms are gathered. The types and the operations after it are the same, and each rank adds the same terms in the
same order, so all ranks have equal bits. An all-reduce would need operands in another type.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from qcompiler.dialects.coll import RANKS
from qcompiler.distributed.communicator import current
from qcompiler.ir import Argument, Effects, Op, ScalarType, Size, TensorType, Type, Value
from qcompiler.ir.op_table import TEXT, AttributeCheck, OpDef, OpError, declare
from qcompiler.ir.sizes import call, product

FEW: tuple[AttributeCheck, str] = (lambda a: type(a) is int and a >= 1, "a number of tokens, from 1")
LAYOUT: tuple[AttributeCheck, str] = (lambda a: a in ("row_major", "col_major"), '"row_major" or "col_major"')

ALIGNED = 4
"""Alignment of each column of column-major scales, in elements."""


def tokens_of(shape: Sequence[Size]) -> Size:
    """The number of tokens of a value: the product of all sizes but the last."""
    return product(tuple(shape[:-1]))


def share(tokens: Size, ranks: int, few: int) -> Size:
    """The number of tokens that each rank holds: all if there are fewer than `few`, else an equal part, rounded up."""
    return call("share", tokens, ranks, few)


def is_cut(tokens: int, ranks: int, few: int) -> bool:
    """Whether ranks hold different tokens."""
    return share(tokens, ranks, few) != tokens


def share_shape(shape: Sequence[Size], ranks: int, few: int) -> tuple[Size, ...]:
    """The shape of a rank's tokens: [s0, s1, 512] -> [1, share of s0*s1, 512]."""
    return (*[1] * (len(shape) - 2), share(tokens_of(shape), ranks, few), shape[-1])


def _numbers(op: Op) -> tuple[int, int]:
    ranks, few = op.attrs["ranks"], op.attrs["few"]
    return (ranks, few) if isinstance(ranks, int) and isinstance(few, int) else (2, 1)


def cut_types(op: Op) -> tuple[Type, ...]:
    """x[b, s, n] -> [1, share of b*s, n]"""
    kind = op["x"].tensor
    return (TensorType(kind.dtype, share_of(op, kind)),)


def share_of(op: Op, kind: TensorType) -> tuple[Size, ...]:
    """The shape of a rank's tokens of a value that an operation cuts; raises OpError if it has no tokens."""
    if len(kind.shape) < 2:
        raise OpError(f"the operand is {kind}, which has no axis of tokens before its last one", "x")
    return share_shape(kind.shape, *_numbers(op))


def term_types(op: Op) -> tuple[Type, ...]:
    """x[b, s, n] -> [ranks, 1, share of b*s, n]"""
    kind = op["x"].tensor
    return (TensorType(kind.dtype, (_numbers(op)[0], *share_of(op, kind))),)


def gathered_types(op: Op) -> tuple[Type, ...]:
    """(x[1, share of b*s, n], [b, s]) -> [b, s, n]"""
    if len(op.args) != 2:
        raise OpError("its arguments must be the tokens and a list of sizes")
    return (whole_type(op),)


def whole_type(op: Op) -> TensorType:
    """(x[1, share of b*s, n], …, [b, s]) -> [b, s, n]"""
    kind, given = op["x"].tensor, op.args[-1]
    if not isinstance(given, tuple) or len(given) != len(kind.shape) - 1:
        raise OpError(f"the operand is {kind}, so that the last argument must list {len(kind.shape) - 1} sizes", "x")
    shape = (*map(_size, given), kind.shape[-1])
    if kind.shape != (wanted := share_shape(shape, *_numbers(op))):
        raise OpError(f"the operand is {kind}, but a rank holds [{', '.join(map(str, wanted))}] of these tokens", "x")
    return TensorType(kind.dtype, shape)


def _size(arg: Argument) -> Size:
    if type(arg) is int:
        return arg
    if isinstance(arg, Value) and isinstance(arg.type, ScalarType) and arg.type.value is not None:
        return arg.type.value
    raise OpError(f"the size {arg} is not known", 1)


def _padded(x: Tensor, ranks: int, few: int) -> Tensor | None:
    """The tokens as rows, with rows of zeros so that all ranks get equally many; None if each rank holds all."""
    rows = x.reshape(-1, x.shape[-1])
    mine = share(rows.shape[0], ranks, few)
    if not isinstance(mine, int) or mine == rows.shape[0]:
        return None
    missing = mine * ranks - rows.shape[0]
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows  # which would copy them


def shaped(rows: Tensor, like: Tensor) -> Tensor:
    """A rank's tokens as an operation returns them: with as many axes as a tensor."""
    return rows.reshape(*[1] * (like.dim() - 2), -1, like.shape[-1])


def own_tokens(x: Tensor, *, mesh: str, ranks: int, few: int) -> Tensor:
    """Torch definition of `coll.own_tokens`: this rank's tokens of a tensor that all ranks hold."""
    rows = _padded(x, ranks, few)
    return shaped(x if rows is None else rows.chunk(ranks)[current().place(mesh)], x)


def reduce_scatter_tokens(x: Tensor, *, mesh: str, ranks: int, few: int) -> Tensor:
    """Torch definition of `coll.reduce_scatter_tokens`: this rank's tokens of the sum over all `ranks`."""
    rows = _padded(x, ranks, few)
    return shaped(current().all_reduce(x, mesh) if rows is None else current().reduce_scatter(rows, mesh, 0), x)


def all_to_all_tokens(x: Tensor, *, mesh: str, ranks: int, few: int) -> Tensor:
    """Torch definition of `coll.all_to_all_tokens`: this rank's tokens of the tensors of all `ranks`."""
    sent = as_bytes(x).reshape(-1, x.shape[-1])
    rows = _padded(sent, ranks, few)
    found = current().all_gather(sent, mesh, 0) if rows is None else current().all_to_all(rows, mesh)
    return found.view(x.dtype).view(ranks, *[1] * (x.dim() - 2), len(found) // ranks, x.shape[-1])


def all_gather_tokens(
    x: Tensor, sizes: Sequence[int], *, mesh: str, ranks: int, few: int, scale_layout: str = "row_major"
) -> Tensor:
    """Torch definition of `coll.all_gather_tokens`: the tokens of all `ranks`.

    Args:
        x: This rank's tokens.
        sizes: All sizes of the result but the last; their product is the number of tokens.
        mesh: The axis of the mesh.
        ranks: The number of ranks along it.
        few: The number of tokens from which on they are cut.
        scale_layout: "col_major" for scales of activations whose format has this layout.
    """
    rows, count = x.reshape(-1, x.shape[-1]), prod(sizes)
    if is_cut(count, ranks, few):
        rows = gathered_bytes(rows, mesh, 0)[:count]
    return in_layout(rows, scale_layout).view(*sizes, x.shape[-1])


def gathered_bytes(x: Tensor, mesh: str, axis: int) -> Tensor:
    """The parts of all ranks along an axis; FP8 codes are sent as bytes, because not all backends know them."""
    return current().all_gather(as_bytes(x), mesh, axis).view(x.dtype)


def as_bytes(x: Tensor) -> Tensor:
    """FP8 codes as bytes; other tensors as they are."""
    return x.view(torch.uint8) if x.dtype.is_floating_point and x.dtype.itemsize == 1 else x


def in_layout(scales: Tensor, layout: str) -> Tensor:
    """The rows of scales in a memory layout of formats; column-major columns are padded to an aligned length."""
    if layout == "row_major":
        return scales
    rows, columns = scales.shape
    stride = -(-rows // ALIGNED) * ALIGNED
    if scales.stride() == (1, stride):
        return scales
    return scales.new_empty_strided((rows, columns), (1, max(1, stride))).copy_(scales)


CUT = {"few": FEW, "mesh": TEXT, "ranks": RANKS}

declare(
    OpDef(
        "coll.own_tokens",
        "This rank's tokens of a tensor that all ranks hold.",
        ("x",),
        CUT,
        types=cut_types,
        meaning=own_tokens,
        effects=Effects.COMMUNICATES,
    )
)
declare(
    OpDef(
        "coll.reduce_scatter_tokens",
        "This rank's tokens of the sum of the tensors that the ranks hold.",
        ("x",),
        CUT,
        types=cut_types,
        meaning=reduce_scatter_tokens,
        effects=Effects.COMMUNICATES,
    )
)
declare(
    OpDef(
        "coll.all_to_all_tokens",
        "This rank's tokens of the tensors that the ranks hold, one after the other along a new first axis.",
        ("x",),
        CUT,
        types=term_types,
        meaning=all_to_all_tokens,
        effects=Effects.COMMUNICATES,
    )
)
declare(
    OpDef(
        "coll.all_gather_tokens",
        "The tokens of all ranks, on each rank, with the given sizes before the last one.",
        ("x", "*"),
        CUT,
        {"scale_layout": LAYOUT},
        types=gathered_types,
        meaning=all_gather_tokens,
        effects=Effects.COMMUNICATES,
    )
)
