"""Logits of which each rank holds the columns of its part of the vocabulary.

    logits = VocabularyParts(parts, run, "tp", 2)      # [B, V / 2] on each rank
    logits.ranked(score)                               # i64[N, B]: ranks exchange candidates of each row
    logits.whole()                                     # [B, V]: ranks exchange all logits

The choice has the bits of one that sees all logits: of equal scores, the first column wins.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from codegen.direct import kernels
from qcompiler.distributed.communicator import current

Runner = Callable[[Sequence[Callable[[], Tensor]]], Sequence[Tensor]]
"""Runs one function per rank of this process, with the collectives of the ranks connected."""

Score = Callable[[Tensor, int], Tensor]
"""Scores f[B, n] of logits f[B, n] whose first column has the given number."""


class VocabularyParts:
    """The logits of one step.

    Args:
        parts: The logits of the ranks in this process, float[B, V / ranks].
        run: Runs these ranks.
        mesh: The axis of the mesh along which the vocabulary is divided.
    """

    def __init__(self, parts: Sequence[Tensor], run: Runner, mesh: str) -> None:
        self._parts, self._run, self._mesh = parts, run, mesh

    def ranked(self, score: Score) -> Tensor:
        """Returns the largest scores of all ranks with their columns, i64[N, B], as `rank_parts` does."""
        return self._run([partial(_ranked, part, score, self._mesh) for part in self._parts])[0]

    def whole(self) -> Tensor:
        """Returns all logits, float[B, V]."""
        return self._run([partial(_gathered, part, self._mesh) for part in self._parts])[0]


def _ranked(part: Tensor, score: Score, mesh: str) -> Tensor:
    first = current().place(mesh) * part.shape[-1]
    found: Tensor = kernels.rank_parts(score(part, first), first)
    return current().all_gather(found, mesh, 0)


def _gathered(part: Tensor, mesh: str) -> Tensor:
    return current().all_gather(part, mesh, 1)
