"""The kernels that sort entries by group: launched under the interpreter, or compiled for Hopper without a GPU."""

import torch
from torch import Tensor

from codegen.machine_code import MachineCode
from codegen.targets.hopper import HOPPER
from codegen.templates.group_entries import GROUP_ENTRIES, GroupEntriesConfig, GroupEntriesOperands, GroupEntriesProblem


def entry_operands(keys: Tensor, groups: int, each: int) -> GroupEntriesOperands:
    """The operands, with results that are not written yet."""
    key, order, owner, place = (torch.full_like(keys, -7) for _ in range(4))
    ends = torch.full((groups,), -7, dtype=torch.int32, device=keys.device)
    return GroupEntriesOperands(keys, key, order, owner, place, ends, each)


def launch_group_entries(
    keys: Tensor, groups: int, each: int, config: GroupEntriesConfig | None = None
) -> tuple[Tensor, ...]:
    family, operands = GROUP_ENTRIES.family(HOPPER), entry_operands(keys, groups, each)
    family.launch(config or family.choose(GroupEntriesProblem(len(keys), groups)), operands)
    return operands[1:6]


def compile_group_entries(entries: int, groups: int) -> list[MachineCode]:
    family = GROUP_ENTRIES.family(HOPPER)
    operands = entry_operands(torch.empty(entries, dtype=torch.int64, device="meta"), groups, 8)
    return [
        HOPPER.compile(call) for call in family.calls(family.choose(GroupEntriesProblem(entries, groups)), operands)
    ]
