"""Tokens of experts through the memory of other GPUs: in Triton's interpreter, and compiled ahead of time.

In the interpreter, ranks run one after the other, twice: the second time, each finds what all have sent.
"""

from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hopper_kernels import meta
from peer_kernels import compile_exchange_chosen
from torch import Tensor
from torch.distributed import ProcessGroup
from triton_interpreter import needs_interpreter, prepare_interpreter, run_interpreted

from benchmarks.sanitizing.place import OnGpu
from benchmarks.sanitizing.ranks import chosen_exchanges
from codegen.kernels import chosen_peers
from codegen.launching.launch import KernelCall, launch
from codegen.operators.operator import OPERATORS
from codegen.peer_memory import PeerMemory
from codegen.targets.hopper import HOPPER
from codegen.templates.chosen_peers import (
    CHOSEN_PEERS,
    ChosenConfig,
    ChosenOperands,
    ChosenProblem,
    chosen_configs,
)
from codegen.templates.peers import PROGRAMS, REGION_BYTES, memory_bytes
from qcompiler.distributed.communicator import Choices
from qcompiler.errors import CodegenError

CONFIGS = (ChosenConfig(8, 64, 4), ChosenConfig(2, 256, 4))


def _choices(tokens: int, ranks: int, which: str) -> Choices:
    """Two of three experts of each rank: any of them, of the last rank only, or of all but the first one."""
    groups = 3 * ranks
    first = {"any": 0, "last": groups - 3, "not first": 3}[which]
    experts = torch.stack([first + torch.randperm(groups - first)[:2] for _ in range(tokens)])
    return Choices(experts, groups, ranks)


def _calls(
    xs: list[Tensor], choices: Choices, config: ChosenConfig, memories: list[Tensor], *, summed: bool
) -> Iterator[tuple[Tensor, KernelCall]]:
    """What each rank receives, and its launch."""
    addresses = torch.tensor([memory.data_ptr() for memory in memories])
    for rank, x in enumerate(xs):
        out = torch.full((choices.share if summed else len(choices.experts), x.shape[1]), 7, dtype=x.dtype)
        steps = torch.zeros(PROGRAMS, dtype=torch.int32)
        operands = ChosenOperands(x, choices.experts, out, addresses, steps, choices.groups, rank, 1, summed)
        (call,) = CHOSEN_PEERS.family(HOPPER).calls(config, operands)
        yield out, call


def _case(ranks: int, tokens: int, width: int, config: ChosenConfig, which: str, *, summed: bool) -> None:
    choices = _choices(tokens, ranks, which)
    if summed:
        xs = [torch.randn(tokens, width) for _ in range(ranks)]
        terms = [choices.padded(choices.masked(x, rank)) for rank, x in enumerate(xs)]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        wanted = list(total.chunk(ranks))
    else:
        dtype = torch.int32 if width % 4 == 0 else torch.int8
        whole = torch.randint(-128, 128, (choices.share * ranks, width), dtype=dtype)
        xs = [part.contiguous() for part in whole.chunk(ranks)]
        wanted = [choices.masked(whole[:tokens], rank) for rank in range(ranks)]
    memories = [torch.full((memory_bytes(ranks),), 5, dtype=torch.uint8) for _ in range(ranks)]
    found: list[Tensor] = []
    for _ in range(2):
        found = []
        for out, call in _calls(xs, choices, config, memories, summed=summed):
            launch(call)
            found.append(out)
    for rank, (got, want) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(got, want), (ranks, tokens, width, config, which, summed, rank)


def _run_all() -> None:
    torch.manual_seed(0)
    for (ranks, tokens, width), summed in product(((2, 21, 48), (3, 10, 33), (4, 3, 16)), (False, True)):
        _case(ranks, tokens, width, CONFIGS[1], "any", summed=summed)
        for which in ("any", "last", "not first"):
            _case(ranks, tokens, width, CONFIGS[0], which, summed=summed)
    print("all cases ran")


@needs_interpreter
@pytest.mark.timeout(240)
def test_the_kernel_under_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("summed", [False, True])
def test_accesses_of_16_bytes_and_no_spills(ranks: int, summed: bool) -> None:
    code = compile_exchange_chosen(ranks, 4096, 4096, summed=summed)
    assert code.wide_stores and code.wide_loads and not code.local_loads
    assert "MEMBAR.ALL.SYS" in code.sass and "LDG.E.STRONG.SYS" in code.sass


def test_a_tile_fits_into_a_region() -> None:
    problems = (ChosenProblem(1, 1), ChosenProblem(4, 128), ChosenProblem(2048, 4096), ChosenProblem(1 << 16, 14336))
    tiles = [next(iter(chosen_configs(problem))) for problem in problems]
    assert [(tile.rows, tile.bytes, tile.warps) for tile in tiles] == [
        (4096, 1, 2), (32, 128, 2), (8, 2048, 8), (8, 2048, 8),
    ]  # fmt: skip
    assert all(tile.rows * tile.bytes <= REGION_BYTES for tile in tiles)


@pytest.mark.gpu
def test_two_ranks_on_one_gpu() -> None:
    assert [*chosen_exchanges(OnGpu())]  # each result is compared


def test_tensors_on_a_cpu_are_left_to_torch() -> None:
    peers, group = PeerMemory(), cast(ProcessGroup, SimpleNamespace(size=lambda: 2, group_name="tp"))
    choices = Choices(torch.zeros(4, 2, dtype=torch.int64), 8, 2)
    assert peers.gather_chosen(torch.ones(2, 8), choices, group) is None
    assert peers.reduce_scatter_chosen(torch.ones(4, 8), choices, group) is None
    numbers = torch.zeros(2, dtype=torch.int64), torch.zeros(PROGRAMS, dtype=torch.int32)
    with pytest.raises(CodegenError, match="only on GPUs"):
        torch.ops.qcompiler.exchange_chosen(torch.ones(2, 8), choices.experts, *numbers, 8, 0, 1, False)


@pytest.mark.parametrize(("summed", "shape"), [(False, (5, 8)), (True, (3, 8))])
def test_shapes_without_data(summed: bool, shape: tuple[int, ...]) -> None:
    numbers = meta(2, dtype=torch.int64), meta(PROGRAMS, dtype=torch.int32)
    x, experts = meta(5 if summed else 3, 8), meta(5, 2, dtype=torch.int64)
    assert OPERATORS["exchange_chosen"].fake(x, experts, *numbers, 8, 0, 1, summed).shape == shape


if __name__ == "__main__":
    import triton

    @triton.jit
    def _go_on(step, memories, rank, patience, RANKS, PROGRAMS):  # type: ignore[no-untyped-def]
        """Instead of waiting for ranks that do not run at the same time."""

    setattr(chosen_peers, "meet", _go_on)  # noqa: B010  (for mypy, it is not a name of this module)
    tl = triton.language  # visible from the function
    prepare_interpreter()
    _run_all()
