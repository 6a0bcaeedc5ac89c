"""All ranks of a mesh in one process: one thread per rank; collectives exchange tensors when all ranks have arrived.

    simulation = Simulation(Mesh.parse("tp=2"))
    outputs = simulation.run([partial(run, weights[rank], x) for rank in range(2)])

Threads run each rank's own host module unchanged. Terms are added in the order of the ranks, so that results do not
depend on timing. If a rank fails, the others stop at their next collective.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from threading import Barrier, BrokenBarrierError, Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcompiler.distributed.communicator import Communicator, communicating
from qcompiler.errors import QCompilerError
from qcompiler.ir import Mesh


class SimulatedMesh(NamedTuple):
    """A mesh whose ranks all run in this process; see `simulated_mesh`."""

    mesh: Mesh

    def __str__(self) -> str:
        return f"simulated_mesh({self.mesh})"


def simulated_mesh(**axes: int) -> SimulatedMesh:
    """A mesh for `qcompiler.compile` whose ranks all run in this process: `simulated_mesh(tp=2)`.

    Raises:
        QCompilerError: The mesh has no axis, or a size is not a positive integer.
    """
    return SimulatedMesh(Mesh(tuple(axes.items())))


class Call(NamedTuple):
    """A collective that a rank has reached, and its operand."""

    name: str
    mesh: str
    axis: int | None
    x: Tensor

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be equal on all ranks."""
        return self.name, self.mesh, self.axis, self.x.dtype, tuple(self.x.shape)


class Simulation:
    """Runs the ranks of a mesh in lock-step."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._barrier = Barrier(mesh.size)
        self._calls: list[Call | None] = [None] * mesh.size

    def run(self, programs: Sequence[Callable[[], Any]]) -> list[Any]:
        """Calls one function per rank and returns their results; raises the first error of a rank."""
        results: list[Any] = [None] * self.mesh.size
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                with communicating(_Rank(self, rank)):
                    results[rank] = programs[rank]()
            except BrokenBarrierError:  # another rank failed first
                pass
            except BaseException as error:
                errors.append(error)
            finally:
                if errors:
                    self._barrier.abort()

        threads = [Thread(target=work, args=(rank,), name=f"rank {rank}") for rank in range(self.mesh.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._barrier.reset()
        if errors:
            raise errors[0]
        return results

    def exchange(self, rank: int, call: Call) -> list[Tensor]:
        """The operands of the ranks that differ from this one only along the axis of the call, in order."""
        self._calls[rank] = call
        self._barrier.wait()
        calls = [found for found in self._calls if found is not None]
        group = [calls[other].x for other in self.mesh.group(rank, call.mesh)]
        odd = next((other for other, found in enumerate(calls) if found.kind != calls[0].kind), None)
        self._barrier.wait()
        if odd is not None:
            got = f"{calls[0].kind} on rank 0, {calls[odd].kind} on rank {odd}"
            raise QCompilerError("the ranks have reached different collectives", got=got, need="the same program")
        return group


class _Rank(Communicator):
    """One rank of a simulation."""

    def __init__(self, simulation: Simulation, rank: int) -> None:
        self.simulation, self.rank = simulation, rank

    def place(self, mesh: str) -> int:
        """The coordinate of this rank."""
        return self.simulation.mesh.place(self.rank, mesh)

    def all_reduce(self, x: Tensor, mesh: str) -> Tensor:
        """The sum of the tensors of all ranks."""
        return _sum(self.simulation.exchange(self.rank, Call("all_reduce", mesh, None, x)))

    def all_gather(self, x: Tensor, mesh: str, axis: int) -> Tensor:
        """The tensors of all ranks along an axis."""
        return torch.cat(self.simulation.exchange(self.rank, Call("all_gather", mesh, axis, x)), axis)

    def reduce_scatter(self, x: Tensor, mesh: str, axis: int) -> Tensor:
        """This rank's part of the sum."""
        total = _sum(self.simulation.exchange(self.rank, Call("reduce_scatter", mesh, axis, x)))
        return total.chunk(self.simulation.mesh.length(mesh), axis)[self.place(mesh)].contiguous()

    def all_to_all(self, x: Tensor, mesh: str) -> Tensor:
        """This rank's parts of the tensors of all ranks."""
        found = self.simulation.exchange(self.rank, Call("all_to_all", mesh, None, x))
        return torch.cat([each.chunk(len(found))[self.place(mesh)] for each in found])


def _sum(terms: Sequence[Tensor]) -> Tensor:
    """The sum in the order of the ranks, rounded once, as GPUs of a host add (`codegen.kernels.peers`)."""
    dtype = terms[0].dtype
    kind = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    return reduce(add, [term.to(kind) for term in terms]).to(dtype)
