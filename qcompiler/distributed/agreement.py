"""Checks that all ranks have the same program before they run it: different collectives would wait for each other."""

from hashlib import sha256

import torch

from qcompiler.distributed.communicator import Communicator
from qcompiler.errors import QCompilerError
from qcompiler.ir import Mesh


def check_same(text: str, communicator: Communicator, mesh: Mesh, device: torch.device) -> None:
    """Compares the texts of all ranks' programs, by their hashes.

    Args:
        text: The text of this rank's program.
        communicator: This rank's connection to the others, all of which must make this call.
        mesh: The mesh.
        device: A device whose tensors the communicator can send.

    Raises:
        QCompilerError: The programs differ; on each rank.
    """
    number = int.from_bytes(sha256(text.encode()).digest()[:8], "big", signed=True)
    found = torch.tensor([number], device=device)
    for axis, _ in mesh.axes:
        found = communicator.all_gather(found, axis, 0)
    if found.unique().numel() > 1:
        raise QCompilerError(
            "the ranks have compiled different programs", got=f"{found.unique().numel()} programs on {mesh.size} ranks",
            need="the same program", fix="Give all ranks the same model, options, and versions of packages.",
        )  # fmt: skip
