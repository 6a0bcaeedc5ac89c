"""The operator `group_entries`: entries sorted by the number of their group, on a GPU by one or two kernels."""

import torch
from torch import Tensor

from codegen.launching.launch import on
from codegen.launching.replay import empty, replayed
from codegen.operators.operator import Operator, declare
from codegen.targets.cuda import gpu_at
from codegen.templates.group_entries import GROUP_ENTRIES, GroupEntriesOperands, GroupEntriesProblem
from qcompiler.dialects.entries import MOST_GROUPS, group_entries
from qcompiler.errors import CodegenError

Entries = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def group_entries_on_cpu(keys: Tensor, groups: int, each: int) -> Entries:
    """See `qcompiler.dialects.entries`."""
    _check(keys, groups, each)
    key, order, owner, place, ends = group_entries(keys, groups=groups, each=each)
    return key, order, owner, place, ends


def group_entries_on_gpu(keys: Tensor, groups: int, each: int) -> Entries:
    """The same on a CUDA device."""
    return replayed(_run, ("group_entries", groups, each), (keys,), keys, groups, each)


def _run(keys: Tensor, groups: int, each: int) -> Entries:
    _check(keys, groups, each)
    key, order, owner, place = (empty(keys.shape, torch.int64, keys.device) for _ in range(4))
    ends = empty((groups,), torch.int32, keys.device)
    if keys.shape[0] == 0:
        ends.zero_()
        return key, order, owner, place, ends
    family = GROUP_ENTRIES.family(gpu_at(keys.device))
    with on(keys.device):
        config = family.choose(GroupEntriesProblem(keys.shape[0], groups))
        family.launch(config, GroupEntriesOperands(keys.contiguous(), key, order, owner, place, ends, each))
    return key, order, owner, place, ends


def _fake(keys: Tensor, groups: int, each: int) -> Entries:
    _check(keys, groups, each)
    key, order, owner, place = (keys.new_empty(keys.shape) for _ in range(4))
    return key, order, owner, place, keys.new_empty((groups,), dtype=torch.int32)


def _check(keys: Tensor, groups: int, each: int) -> None:
    """Raises CodegenError for other operands than a vector of int64, and numbers that the kernels support."""
    if keys.dim() != 1 or keys.dtype != torch.int64 or keys.shape[0] >= 2**31:
        got = f"{keys.dtype} {list(keys.shape)}"
        raise CodegenError("the numbers of groups do not fit", got=got, need="int64 [n], n below 2^31")
    if not 1 <= groups <= MOST_GROUPS or each < 1:
        need = f"1 to {MOST_GROUPS} groups, and 1 or more entries of an owner"
        raise CodegenError("entries cannot be grouped so", got=f"{groups} groups, {each} entries", need=need)


GROUP_ENTRIES_SCHEMA = "group_entries(Tensor keys, int groups, int each) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
declare(Operator(GROUP_ENTRIES_SCHEMA, group_entries_on_cpu, group_entries_on_gpu, _fake))
