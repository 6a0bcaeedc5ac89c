"""Collectives of this process on torch.distributed, over the groups of a device mesh.

They are the operators of torch's functional collectives, which torch.compile supports.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import (
    ProcessGroup,
    _functional_collectives,  # noqa: F401  (defines the operators)
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from qcompiler import knobs
from qcompiler.distributed.communicator import Choices, Communicator
from qcompiler.errors import QCompilerError
from qcompiler.ir import Mesh

OPS: Any = torch.ops._c10d_functional
"""Operators that return new tensors, to be waited for; their Python wrappers differ between versions of torch."""


class PeerCollectives(Protocol):
    """A quicker way for GPUs of one host; returns None, on all ranks, for tensors that it does not take."""

    def all_reduce(self, x: Tensor, group: ProcessGroup) -> Tensor | None:
        """The sum of the tensors of all ranks."""

    def all_gather(self, x: Tensor, group: ProcessGroup) -> Tensor | None:
        """The tensors of all ranks, `[ranks, *x.shape]`."""

    def reduce_scatter(self, x: Tensor, group: ProcessGroup) -> Tensor | None:
        """This rank's part of the sum, along the first axis."""

    def all_to_all(self, x: Tensor, group: ProcessGroup) -> Tensor | None:
        """This rank's parts of the tensors of all ranks, along the first axis."""

    def gather_chosen(self, x: Tensor, choices: Choices, group: ProcessGroup) -> Tensor | None:
        """The tokens of all ranks; zeros for those that chose no group of this rank."""

    def reduce_scatter_chosen(self, x: Tensor, choices: Choices, group: ProcessGroup) -> Tensor | None:
        """This rank's tokens of the sum of the terms of the ranks whose groups they chose."""

    def small(self, x: Tensor, group: ProcessGroup) -> Any:
        """What a kernel needs to exchange a small tensor itself."""

    def inboxes(self, x: Tensor, size: int, group: ProcessGroup) -> Any:
        """What matmuls of tensors like this one need to store results of `size` bytes for other ranks."""


class NoPeers:
    """Leaves all tensors to torch; see `PeerCollectives`."""

    def _none(self, *_: Any) -> None:
        return None

    all_reduce = all_gather = reduce_scatter = all_to_all = small = inboxes = _none
    gather_chosen = reduce_scatter_chosen = _none


def is_device_mesh(mesh: object) -> bool:
    """Whether an object is a device mesh of `torch.distributed`."""
    return isinstance(mesh, DeviceMesh)


def mesh_of(devices: DeviceMesh) -> tuple[Mesh, int]:
    """The mesh of a device mesh, and the rank of this process in it.

    Raises:
        QCompilerError: Its axes have no names, or this process is not in it.
    """
    names = devices.mesh_dim_names
    if not names:
        fix = 'Name them: init_device_mesh("cuda", (2,), mesh_dim_names=("tp",)).'
        raise QCompilerError("the axes of the device mesh have no names", got=devices, fix=fix)
    mesh = Mesh(tuple(zip(names, devices.mesh.shape, strict=True)))
    place = devices.get_coordinate()
    if place is None:
        raise QCompilerError("this process is not a rank of the mesh", got=devices)
    rank = 0
    for at, (_, size) in zip(place, mesh.axes, strict=True):
        rank = rank * size + at
    return mesh, rank


class ProcessGroups(Communicator):
    """This process as a rank of a device mesh.

    A rank that waits longer than `QCOMPILER_COLLECTIVE_SECONDS` for the others raises an error; by default, torch's own
    limits hold. With NCCL, torch ends the process then.

    Args:
        devices: The mesh.
        peers: Asked before torch.
    """

    def __init__(self, devices: DeviceMesh, peers: PeerCollectives) -> None:
        self.devices, self._peers = devices, peers
        if (seconds := knobs.current().collective_seconds) is not None:
            for group in devices.get_all_groups():
                _set_pg_timeout(timedelta(seconds=seconds), group)

    def place(self, mesh: str) -> int:
        """The coordinate of this process."""
        return int(self.devices.get_local_rank(mesh))

    def peers(self, x: Tensor, mesh: str) -> Any:
        """What a kernel needs to exchange a tensor itself."""
        return self._peers.small(x, self.devices.get_group(mesh))

    def inboxes(self, x: Tensor, size: int, mesh: str) -> Any:
        """What matmuls need to store results for other ranks."""
        return self._peers.inboxes(x, size, self.devices.get_group(mesh))

    def all_reduce(self, x: Tensor, mesh: str) -> Tensor:
        """The sum of the tensors of all ranks."""
        group = self.devices.get_group(mesh)
        if (found := self._peers.all_reduce(x, group)) is not None:
            return found
        return _done(lambda: OPS.all_reduce(x.contiguous(), "sum", group.group_name))

    def all_gather(self, x: Tensor, mesh: str, axis: int) -> Tensor:
        """The tensors of all ranks along an axis."""
        group = self.devices.get_group(mesh)
        if (found := self._peers.all_gather(x, group)) is not None:
            return found.movedim(0, axis).flatten(axis, axis + 1)
        parts = _done(lambda: OPS.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))
        return parts if axis == 0 else torch.cat(parts.chunk(group.size()), axis)

    def reduce_scatter(self, x: Tensor, mesh: str, axis: int) -> Tensor:
        """This rank's part of the sum."""
        group = self.devices.get_group(mesh)
        parts = (x if axis == 0 else torch.cat(x.chunk(group.size(), axis))).contiguous()
        if (found := self._peers.reduce_scatter(parts, group)) is not None:
            return found
        return _done(lambda: OPS.reduce_scatter_tensor(parts, "sum", group.size(), group.group_name))

    def all_to_all(self, x: Tensor, mesh: str) -> Tensor:
        """This rank's parts of the tensors of all ranks."""
        group = self.devices.get_group(mesh)
        if (found := self._peers.all_to_all(x, group)) is not None:
            return found
        sizes = [x.shape[0] // group.size()] * group.size()
        return _done(lambda: OPS.all_to_all_single(x.contiguous(), sizes, sizes, group.group_name))

    def gather_chosen(self, x: Tensor, mesh: str, choices: Choices) -> Tensor:
        """The tokens that chose a group of this rank; torch sends all of them."""
        found = self._peers.gather_chosen(x, choices, self.devices.get_group(mesh))
        return super().gather_chosen(x, mesh, choices) if found is None else found

    def reduce_scatter_chosen(self, x: Tensor, mesh: str, choices: Choices) -> Tensor:
        """This rank's tokens of the sum; torch sends the terms of all of them."""
        found = self._peers.reduce_scatter_chosen(x, choices, self.devices.get_group(mesh))
        return super().reduce_scatter_chosen(x, mesh, choices) if found is None else found


def _done(collective: Callable[[], Tensor]) -> Tensor:
    """The result of a collective, when it has arrived. Raises QCompilerError if another rank does not take part."""
    try:
        result: Tensor = OPS.wait_tensor(collective())
    except RuntimeError as error:
        raise QCompilerError(
            "a collective has failed: another rank has ended or has not arrived in time",
            got=str(error).splitlines()[0],
            fix="Look for the first error of any rank; QCOMPILER_COLLECTIVE_SECONDS sets how long ranks wait.",
        ) from error
    return result
