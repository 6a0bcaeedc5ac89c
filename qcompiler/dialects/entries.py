"""The operation `kernel.group_entries`: the places of entries sorted by a small number, such as an expert.

%key, %order, %owner, %place, %ends = kernel.group_entries(%expert) {groups = 8, each = 2}

    expert   1 0 1 0          entry e belongs to token e // 2
    key      0 0 1 1          the sorted numbers
    order    1 3 0 2          the entry at each place
    owner    0 1 0 1          its token
    place    2 0 3 1          the place of each entry: the inverse of the order
    ends     2 4              the end of each group

Entries of a group stay in their order. See the pass group-entries.
"""

import torch
from torch import Tensor

from qcompiler.ir import DType, Op, TensorType, Type
from qcompiler.ir.op_table import AttributeCheck, OpDef, OpError, declare

MOST_GROUPS = 1024
"""Maximum number of groups."""

GROUPS: tuple[AttributeCheck, str] = (
    lambda a: isinstance(a, int) and not isinstance(a, bool) and 1 <= a <= MOST_GROUPS,
    f"an integer from 1 to {MOST_GROUPS}",
)
EACH: tuple[AttributeCheck, str] = (
    lambda a: isinstance(a, int) and not isinstance(a, bool) and a >= 1,
    "a positive integer",
)


def group_entries_types(op: Op) -> tuple[Type, ...]:
    """(keys i64[N]) -> key i64[N], order i64[N], owner i64[N], place i64[N], ends i32[groups]"""
    keys = op["keys"].tensor
    if len(keys.shape) != 1 or keys.dtype is not DType.i64:
        raise OpError(f"the numbers of the groups are {keys}, but they must be a vector of i64", "keys")
    groups: int = op.attrs["groups"]  # type: ignore[assignment]  # checked by the declaration
    return (keys, keys, keys, keys, TensorType(DType.i32, (groups,)))


def group_entries(keys: Tensor, *, groups: int, each: int) -> tuple[Tensor, ...]:
    """Torch definition of `kernel.group_entries`; numbers outside 0 … groups - 1 give any places."""
    key, order = torch.sort(keys, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(key, torch.arange(groups, device=key.device), right=True).to(torch.int32)
    return key, order, order // each, place, ends


declare(
    OpDef(
        "kernel.group_entries",
        "Sorts entries by the number of their group, and returns where each is, and where each group ends.",
        ("keys",),
        {"each": EACH, "groups": GROUPS},
        types=group_entries_types,
        meaning=group_entries,
    )
)
