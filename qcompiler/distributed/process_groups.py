"""Collectives of this process on torch.distributed, over the groups of a device mesh.

They are the operators of torch's functional collectives, which torch.compile supports.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import _functional_collectives  # noqa: F401  (defines the operators)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from qcompiler import knobs
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


class ProcessGroups(Communicator):
    """This process as a rank of a device mesh.

    A rank that waits longer than `QCOMPILER_COLLECTIVE_SECONDS` for the others raises an error; by default, torch's own
    limits hold. With NCCL, torch ends the process then.
    """

    def __init__(self, devices: DeviceMesh) -> None:
        self.devices = devices
        if (seconds := knobs.current().collective_seconds) is not None:
            for group in devices.get_all_groups():
                _set_pg_timeout(timedelta(seconds=seconds), group)

    def place(self, mesh: str) -> int:
        """The coordinate of this process."""
        return int(self.devices.get_local_rank(mesh))

    def all_reduce(self, x: Tensor, mesh: str) -> Tensor:
        """The sum of the tensors of all ranks."""
        return _done(lambda: OPS.all_reduce(x.contiguous(), "sum", self.devices.get_group(mesh).group_name))

    def all_gather(self, x: Tensor, mesh: str, axis: int) -> Tensor:
        """The tensors of all ranks along an axis."""
        group = self.devices.get_group(mesh)
        parts = _done(lambda: OPS.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))
        return parts if axis == 0 else torch.cat(parts.chunk(group.size()), axis)

    def reduce_scatter(self, x: Tensor, mesh: str, axis: int) -> Tensor:
        """This rank's part of the sum."""
        group = self.devices.get_group(mesh)
        parts = x if axis == 0 else torch.cat(x.chunk(group.size(), axis))
        return _done(lambda: OPS.reduce_scatter_tensor(parts.contiguous(), "sum", group.size(), group.group_name))


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
