"""The sanitizer's benchmark covers every kernel: its families are rehearsed without a GPU, and their kernels listed."""

import copy
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from hopper_kernels import all_configs, compile_gemm
from triton.runtime.jit import JITFunction

from benchmarks.sanitizing.families import FAMILIES
from benchmarks.sanitizing.orders import Race, code_of, is_dispatch, is_handed_over, races_of
from benchmarks.sanitizing.place import OnGpu, Rehearsal, moved
from codegen import kernels


@pytest.fixture(scope="module")
def rehearsals() -> dict[str, tuple[int, Rehearsal]]:
    """Family -> its launches, and what it would have launched."""
    torch.manual_seed(0)
    found = {}
    for name, family in FAMILIES.items():
        place = Rehearsal()
        found[name] = len(list(family(place))), place
    return found


def functions() -> Iterator[Any]:
    """All Triton functions of the modules of kernels."""
    for info in iter_modules(kernels.__path__, "codegen.kernels."):
        for value in vars(import_module(info.name)).values():
            if isinstance(value, JITFunction) and value.fn.__module__ == info.name:
                yield value


def reached(function: Any, found: set[Any]) -> None:
    """Adds a Triton function, and those that it names."""
    if function not in found:
        found.add(function)
        for name in function.fn.__code__.co_names:
            if isinstance(value := function.fn.__globals__.get(name), JITFunction):
                reached(value, found)


def test_every_kernel_is_launched(rehearsals: dict[str, tuple[int, Rehearsal]]) -> None:
    found: set[Any] = set()
    for _, place in rehearsals.values():
        for kernel in place.kernels:
            reached(kernel, found)
    missing = [f"{each.fn.__module__}.{each.fn.__name__}" for each in functions() if each not in found]
    assert not missing, "add a family to benchmarks/sanitizing that launches these"


def test_pairs_that_an_mbarrier_orders_are_told_from_others() -> None:
    config = next(each for each in all_configs() if each.variant == "team")
    code = code_of(compile_gemm(config).sass)
    written = [address for address, name, _ in code if name.startswith("STS")]
    read = [address for address, name, _ in code if name == "LDS.64"]
    pairs = {(w, r) for w in written for r in read if is_handed_over(race(w, r), code)}
    assert {w for w, _ in pairs} < {*written}, "the dispatch is not ordered by an mbarrier"
    assert {r for _, r in pairs} == {*read}
    assert not any(is_dispatch(race(*pair), code) for pair in pairs)
    alone = [each for each in code if not each[1].startswith("SYNCS.ARRIVE")]
    assert not any(is_handed_over(race(w, r), alone) for w, r in pairs)


def race(written: int, read: int) -> Race:
    said = f"Error: Race reported between Write access at team_gemm+{written:#x} in a.py:1\n"
    (found,) = races_of(f"{said}========= and Read access at team_gemm+{read:#x} in a.py:2 [8 hazards]")
    return found


def test_every_family_launches_kernels(rehearsals: dict[str, tuple[int, Rehearsal]]) -> None:
    assert not [name for name, (launches, place) in rehearsals.items() if not launches or not place.calls]


def test_copies_share_memory_as_their_originals_do() -> None:
    keys = torch.arange(24.0).view(2, 3, 4)
    empty, values = torch.empty(0), keys[..., 1:3]
    made = moved({"cache": [keys, values], "empty": empty}, "cpu")
    one, other = made["cache"]
    assert torch.equal(one, keys) and torch.equal(other, values) and other.stride() == values.stride()
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != keys.untyped_storage().data_ptr()
    assert made["empty"].shape == (0,)


def test_differences_are_reported() -> None:
    place, want = OnGpu(), torch.tensor([1.0, 2.0, float("nan")])
    place.close(want.clone(), want)
    with pytest.raises(RuntimeError, match="relative error"):
        place.close(want + torch.tensor([0.0, 0.02, 0.0]), want)
    with pytest.raises(RuntimeError, match="1 elements are NaN"):
        place.close(torch.tensor([1.0, 2.0, 3.0]), want)
    with pytest.raises(RuntimeError, match="relative error inf"):
        place.close(torch.tensor([1, 2]), torch.tensor([1, 3]))
    with pytest.raises(RuntimeError, match="instead of"):
        place.close(torch.zeros(2), copy.deepcopy(want))
