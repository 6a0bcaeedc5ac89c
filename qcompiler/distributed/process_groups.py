"""Collectives of this process on torch.distributed, over the groups of a device mesh.

They are the operators of torch's functional collectives, which torch.compile supports.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import _functional_collectives  # noqa: F401  (defines the operators)
from torch.distributed.device_mesh import DeviceMesh

from qcompiler.distributed.communicator import Communicator
from qcompiler.errors import QCompilerError
from qcompiler.ir import Mesh

OPS: Any = torch.ops._c10d_functional
"""Operators that return new tensors, to be waited for; their Python wrappers differ between versions of torch."""


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


def _waited(x: Tensor) -> Tensor:
    """The result of a collective, when it has arrived."""
    result: Tensor = OPS.wait_tensor(x)
    return result


class ProcessGroups(Communicator):
    """This process as a rank of a device mesh."""

    def __init__(self, devices: DeviceMesh) -> None:
        self.devices = devices

    def all_reduce(self, x: Tensor, mesh: str) -> Tensor:
        """The sum of the tensors of all ranks."""
        return _waited(OPS.all_reduce(x.contiguous(), "sum", self.devices.get_group(mesh).group_name))

    def all_gather(self, x: Tensor, mesh: str, axis: int) -> Tensor:
        """The tensors of all ranks along an axis."""
        group = self.devices.get_group(mesh)
        parts = _waited(OPS.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))
        return parts if axis == 0 else torch.cat(parts.chunk(group.size()), axis)

    def reduce_scatter(self, x: Tensor, mesh: str, axis: int) -> Tensor:
        """This rank's part of the sum."""
        group = self.devices.get_group(mesh)
        parts = x if axis == 0 else torch.cat(x.chunk(group.size(), axis))
        return _waited(OPS.reduce_scatter_tensor(parts.contiguous(), "sum", group.size(), group.group_name))
