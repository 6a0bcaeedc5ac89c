"""What a rank's collectives do while it runs.

    with communicating(simulation.rank(1)):      # or ProcessGroups(device_mesh, NoPeers())
        run(weights, x)                          # its collectives meet the ones of the other ranks

Collectives of the dialect `coll` name an axis of the mesh, and find their communicator in the context of the thread.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import InputError

_CURRENT: ContextVar["Communicator | None"] = ContextVar("communicator", default=None)


@dataclass(frozen=True)
class Choices:
    """Which groups each token has chosen, and so which ranks need it.

    Attributes:
        experts: Integers `[tokens, chosen]`: numbers of groups.
        groups: The number of groups; consecutive ones belong to one rank.
        ranks: The number of ranks, each with equally many groups.
    """

    experts: Tensor
    groups: int
    ranks: int

    @property
    def share(self) -> int:
        """The number of tokens of each rank; the last ranks may have rows of zeros."""
        return -(-self.experts.shape[0] // self.ranks)

    def of(self, rank: int) -> Tensor:
        """Whether each token has chosen a group of a rank."""
        return (self.experts // (self.groups // self.ranks) == rank).any(1)

    def masked(self, x: Tensor, rank: int) -> Tensor:
        """The rows of tokens that have chosen a group of a rank, and zeros."""
        return x.masked_fill(~self.of(rank).unsqueeze(1), 0)

    def padded(self, x: Tensor) -> Tensor:
        """The rows of all tokens, with rows of zeros so that all ranks have equally many."""
        missing = self.share * self.ranks - x.shape[0]
        return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


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

    def gather_chosen(self, x: Tensor, mesh: str, choices: Choices) -> Tensor:
        """The tokens of all ranks, in order: zeros for those that chose no group of this rank."""
        tokens = choices.experts.shape[0]
        return choices.masked(self.all_gather(x, mesh, 0)[:tokens], self.place(mesh))

    def reduce_scatter_chosen(self, x: Tensor, mesh: str, choices: Choices) -> Tensor:
        """This rank's tokens of a sum: of each rank's term, tokens that chose no group of it are zeros."""
        return self.reduce_scatter(choices.padded(choices.masked(x, self.place(mesh))), mesh, 0)

    def peers(self, x: Tensor, mesh: str) -> Any:
        """What a kernel needs to exchange a tensor with other GPUs itself (`codegen.peer_memory.Peers`), or None."""
        return None

    def inboxes(self, x: Tensor, size: int, mesh: str) -> Any:
        """What matmuls of tensors like `x` need to store results of `size` bytes in the memory of other GPUs.

        Returns:
            `codegen.inboxes.Inboxes`, or None.
        """
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
