"""What a rank's collectives do while it runs.

    with communicating(simulation.rank(1)):      # or ProcessGroups(device_mesh, NoPeers())
        run(weights, x)                          # its collectives meet the ones of the other ranks

Collectives of the dialect `coll` name an axis of the mesh, and find their communicator in the context of the thread.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from qcompiler.errors import InputError

_CURRENT: ContextVar["Communicator | None"] = ContextVar("communicator", default=None)


class Communicator(ABC):
    """One rank's connection to the other ranks of a mesh. `mesh` names the axis along which the ranks differ."""

    @abstractmethod
    def place(self, mesh: str) -> int:
        """The coordinate of this rank along an axis."""

    @abstractmethod
    def all_reduce(self, x: Tensor, mesh: str) -> Tensor:
        """The sum of the tensors of all ranks."""

    @abstractmethod
    def all_gather(self, x: Tensor, mesh: str, axis: int) -> Tensor:
        """The tensors of all ranks, concatenated along an axis in the order of the ranks."""

    @abstractmethod
    def reduce_scatter(self, x: Tensor, mesh: str, axis: int) -> Tensor:
        """This rank's part, along an axis, of the sum of the tensors of all ranks."""

    @abstractmethod
    def all_to_all(self, x: Tensor, mesh: str) -> Tensor:
        """This rank's parts, along the first axis, of the tensors of all ranks, in the order of the ranks."""

    def peers(self, x: Tensor, mesh: str) -> Any:
        """What a kernel needs to exchange a tensor with other GPUs itself (`codegen.peer_memory.Peers`), or None."""
        return None


@contextmanager
def communicating(communicator: Communicator) -> Iterator[None]:
    """Lets the collectives of this thread use a communicator."""
    token = _CURRENT.set(communicator)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> Communicator:
    """The communicator of this thread; raises InputError if there is none, as for one rank of a simulation."""
    communicator = _CURRENT.get()
    if communicator is None:
        raise InputError(
            "this is the program of one rank, and its collectives need the other ranks",
            fix="Call the compiled model instead of one of its ranks.",
        )
    return communicator
