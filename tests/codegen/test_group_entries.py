"""The operator and kernels `group_entries`: on a CPU, in Triton's interpreter, and compiled for Hopper."""

import pytest
import torch
from entry_kernels import compile_group_entries
from torch import Tensor
from triton_interpreter import needs_interpreter, prepare_interpreter, run_interpreted

import codegen.torch_ops  # noqa: F401  (registers the operators)
from qcompiler.dialects.entries import group_entries
from qcompiler.errors import CodegenError


def grouped(keys: Tensor, groups: int, each: int) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = torch.ops.qcompiler.group_entries(keys, groups, each)
    return made


@pytest.mark.parametrize(("entries", "groups", "each"), [(0, 3, 1), (1, 1, 1), (40, 8, 2), (600, 128, 8)])
def test_places_of_entries(entries: int, groups: int, each: int) -> None:
    keys = torch.randint(groups, (entries,))
    key, order, owner, place, ends = got = grouped(keys, groups, each)
    count = torch.arange(entries)
    assert torch.equal(key, keys[order]) and torch.equal(key, keys.sort().values)
    assert torch.equal(order[place], count) and torch.equal(place[order], count)
    assert torch.equal(owner, order // each)
    assert ends.dtype is torch.int32 and torch.equal(ends, keys.bincount(minlength=groups).cumsum(0).int())
    same = key[1:] == key[:-1]
    assert bool((order[1:] > order[:-1])[same].all()), "entries of a group stay in their order"
    meta = grouped(keys.to("meta"), groups, each)
    assert [(each_.shape, each_.dtype) for each_ in meta] == [(each_.shape, each_.dtype) for each_ in got]


def test_operands_that_do_not_fit() -> None:
    for keys in (torch.zeros(3), torch.zeros(3, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int64)):
        with pytest.raises(CodegenError, match="the numbers of groups do not fit"):
            grouped(keys, 4, 1)
    for groups, each in ((0, 1), (1025, 1), (4, 0)):
        with pytest.raises(CodegenError, match="entries cannot be grouped so"):
            grouped(torch.zeros(3, dtype=torch.int64), groups, each)


@pytest.mark.parametrize(("entries", "groups"), [(512, 128), (4096, 128), (32768, 8), (32768, 128), (1 << 18, 256)])
def test_the_kernels(entries: int, groups: int) -> None:
    made = compile_group_entries(entries, groups)
    assert len(made) == (1 if entries <= 2048 else 2)
    for code in made:
        assert (code.local_loads, code.local_stores) == (0, 0)
        assert "ACQBULK" in code.sass and "PREEXIT" in code.sass, "it overlaps with other kernels"


def _run_all() -> None:
    torch.manual_seed(0)
    ranked, counted = (GroupEntriesConfig(32, 4, 1, counted=each) for each in (False, True))
    cases = (
        (1, 1, 1, None), (70, 40, 8, None), (5, 100, 1, None), (33, 7, 3, ranked), (300, 7, 3, counted),
        (32 * 32 + 5, 6, 2, counted),
    )  # fmt: skip
    for entries, groups, each, config in cases:
        for keys in (torch.randint(groups, (entries,)), torch.full((entries,), groups - 1)):
            got = launch_group_entries(keys, groups, each, config)
            for one, want in zip(got, group_entries(keys, groups=groups, each=each), strict=True):
                assert torch.equal(one, want), (entries, groups, each, config)
    print("all cases ran")


@needs_interpreter
@pytest.mark.timeout(240)
def test_the_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


if __name__ == "__main__":
    from entry_kernels import launch_group_entries

    from codegen.templates.group_entries import GroupEntriesConfig

    prepare_interpreter()
    _run_all()
