"""Sorting entries by group on a Hopper GPU: equal to the definition on a CPU."""

import pytest
import torch

import codegen.torch_ops  # noqa: F401  (registers the operators)
from qcompiler.dialects.entries import group_entries

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("entries", [0, 1, 128, 512, 1000, 1025, 8192, 32768, 100_000])
@pytest.mark.parametrize(("groups", "each"), [(1, 1), (8, 2), (128, 8), (1000, 6)])
def test_places_of_entries(entries: int, groups: int, each: int) -> None:
    for keys in (torch.randint(groups, (entries,)), torch.full((entries,), groups - 1)):
        want = group_entries(keys, groups=groups, each=each)
        for _ in range(3):  # the third call is replayed
            made = torch.ops.qcompiler.group_entries(keys.cuda(), groups, each)
            for got, one in zip(made, want, strict=True):
                assert torch.equal(got.cpu(), one)
