"""Ranks of a simulated mesh: what collectives exchange, and what happens if a rank fails."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from qcompiler.distributed.agreement import Ranks
from qcompiler.distributed.communicator import current
from qcompiler.distributed.simulation import Simulation, simulated_mesh
from qcompiler.errors import InputError, QCompilerError
from qcompiler.ir import Mesh


def each(mesh: str, program: Callable[[int], Tensor]) -> list[Tensor]:
    """The results of all ranks."""
    grid = Mesh.parse(mesh)
    return Simulation(grid).run([partial(program, rank) for rank in range(grid.size)])


def test_all_reduce_adds_in_the_order_of_the_ranks() -> None:
    terms = [torch.tensor(1e8), torch.tensor(-1e8), torch.tensor(1.0)]
    for _ in range(20):
        assert each("tp=3", lambda rank: current().all_reduce(terms[rank], "tp")) == [torch.tensor(1.0)] * 3


def test_all_gather_and_reduce_scatter_are_inverse_but_for_the_sum() -> None:
    whole = torch.arange(24.0).reshape(2, 12)
    parts = each("tp=4", lambda rank: current().reduce_scatter(whole, "tp", 1))
    assert torch.equal(parts[3], 4 * whole[:, 9:])
    gathered = each("tp=4", lambda rank: current().all_gather(parts[rank], "tp", 1))
    assert all(torch.equal(found, 4 * whole) for found in gathered)


def test_all_to_all_transposes_the_parts_of_the_ranks() -> None:
    found = each("dp=2, tp=3", lambda rank: current().all_to_all(torch.arange(6) + 10 * rank, "tp"))
    assert found[1].tolist() == [2, 3, 12, 13, 22, 23] and found[5].tolist() == [34, 35, 44, 45, 54, 55]


def test_groups_of_two_axes() -> None:
    def program(rank: int) -> Tensor:
        rows = current().all_gather(torch.tensor([rank]), "tp", 0)
        return current().all_reduce(rows, "dp")

    found = each("dp=2, tp=3", program)
    assert [value.tolist() for value in found] == [[3, 5, 7]] * 6


def test_a_rank_that_fails_ends_the_others() -> None:
    def program(rank: int) -> Tensor:
        if rank == 1:
            raise ValueError("rank 1 failed")
        return current().all_reduce(torch.ones(()), "tp")

    with pytest.raises(ValueError, match="rank 1 failed"):
        each("tp=4", program)


def test_ranks_with_different_programs() -> None:
    def program(rank: int) -> Tensor:
        return current().all_reduce(torch.ones(1 + rank), "tp")

    with pytest.raises(QCompilerError, match=r"the ranks have reached different collectives: got .* on rank 1"):
        each("tp=2", program)


def test_ranks_must_have_the_same_program() -> None:
    def program(texts: list[str], rank: int) -> Tensor:
        Ranks(current(), Mesh.parse("dp=2, tp=2"), rank, torch.device("cpu")).check_same(texts[rank])
        return torch.ones(())

    each("dp=2, tp=2", partial(program, ["func"] * 4))
    with pytest.raises(QCompilerError, match="different programs: got 2 programs on 4 ranks; need the same program"):
        each("dp=2, tp=2", partial(program, ["func", "func", "other", "func"]))


def test_a_rank_alone() -> None:
    with pytest.raises(InputError, match="this is the program of one rank, and its collectives need the other ranks"):
        current()


def test_simulated_meshes() -> None:
    assert str(simulated_mesh(dp=2, tp=4)) == "simulated_mesh(dp=2, tp=4)"
    with pytest.raises(QCompilerError, match="the size of mesh axis 'tp' is wrong"):
        simulated_mesh(tp=0)
