"""Steps that all ranks of a mesh take together: each learns what the others found, and fails if one of them failed.

    texts = ranks.each(lambda: write(rank))     the text of each rank; an error on one rank is an error on all
    name = ranks.first(lambda: make_folder())   rank 0 does it; all ranks get the text

Without this, a rank that fails would leave the others waiting for it at their next collective.
"""

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256

import torch
from torch import Tensor

from qcompiler.distributed.communicator import Communicator
from qcompiler.errors import QCompilerError
from qcompiler.ir import Mesh

TOLD = "_qcompiler_told"
"""Attribute of an error that all ranks know."""


class Ranks:
    """All ranks of a mesh, as one of them sees them; all must make the same calls in the same order.

    Args:
        communicator: This rank's connection to the others.
        mesh: The mesh.
        rank: The number of this rank.
        device: A device whose tensors the communicator can send.
    """

    def __init__(self, communicator: Communicator, mesh: Mesh, rank: int, device: torch.device) -> None:
        self.communicator, self.mesh, self.rank, self.device = communicator, mesh, rank, device

    def texts(self, text: str) -> list[str]:
        """The texts of all ranks, in order. Raises QCompilerError if a rank has ended or does not arrive."""
        try:
            return self._texts(text)
        except QCompilerError as error:
            raise _told(error) from error.__cause__  # no rank waits for this one

    def _texts(self, text: str) -> list[str]:
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        lengths = self._gathered(torch.tensor([len(data)])).tolist()
        padded = torch.zeros(max(*lengths, 1), dtype=torch.uint8)
        padded[: len(data)] = data
        rows = self._gathered(padded).reshape(self.mesh.size, -1)
        return [bytes(row[:length].tolist()).decode() for row, length in zip(rows, lengths, strict=True)]

    def each(self, step: Callable[[], str]) -> list[str]:
        """Takes a step on each rank; returns the text of each.

        Raises:
            QCompilerError: The step failed on a rank: its own error there, one that names the rank on the others.
        """
        with self.together():
            text = step()
        found = [json.loads(each) for each in self.texts(json.dumps({"text": text}))]
        failed = [rank for rank, each in enumerate(found) if "error" in each]
        if failed:
            raise _told(QCompilerError(f"rank {failed[0]} has failed: {found[failed[0]]['error']}"))
        return [str(each["text"]) for each in found]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Tells the other ranks, in the next step that they take, if the block raises an error on this rank."""
        try:
            yield
        except Exception as error:  # whatever it is, the others must not wait
            if not getattr(error, TOLD, False):
                with suppress(QCompilerError):  # they have ended
                    self.texts(json.dumps({"error": str(error)}))
            raise _told(error) from error.__cause__

    def first(self, step: Callable[[], str]) -> str:
        """Takes a step on rank 0; all ranks get its text. Raises QCompilerError on all ranks if it fails."""
        return self.each(step if self.rank == 0 else str)[0]

    def check_same(self, text: str) -> None:
        """Compares the texts of all ranks' programs, by their hashes.

        Raises:
            QCompilerError: The programs differ; on each rank.
        """
        self.check_same_hash(self.each(lambda: hash_of(text)))

    def check_same_hash(self, hashes: Collection[str]) -> None:
        """Raises QCompilerError if the hashes of the programs of all ranks differ."""
        if (number := len({*hashes})) > 1:
            error = QCompilerError(
                "the ranks have different programs", got=f"{number} programs on {self.mesh.size} ranks",
                need="the same program",
                fix="Give all ranks the same model, options, calibration data, and versions of packages.",
            )  # fmt: skip
            raise _told(error)

    def _gathered(self, x: Tensor) -> Tensor:
        """One tensor of each rank, side by side in the order of the ranks; all have the same shape."""
        x = x.to(self.device)
        for axis, _ in reversed(self.mesh.axes):
            x = self.communicator.all_gather(x, axis, 0)
        return x.cpu()


def hash_of(text: str) -> str:
    """The hash of a text."""
    return sha256(text.encode()).hexdigest()


def _told(error: Exception) -> Exception:
    """Marks an error that all ranks know."""
    setattr(error, TOLD, True)
    return error
