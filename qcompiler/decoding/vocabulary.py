"""Logits of which each rank holds the columns of its part of the vocabulary.

    logits = VocabularyParts(parts, run, "tp", 2)      # [B, V / 2] on each rank
    logits.largest(score)                              # i64[B]: ranks exchange one candidate for each row
    logits.whole()                                     # [B, V]: ranks exchange all logits

The choice has the bits of one that sees all logits: of equal scores, the first column wins.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from qcompiler.distributed.communicator import current

Runner = Callable[[Sequence[Callable[[], Tensor]]], Sequence[Tensor]]
"""Runs one function per rank of this process, with the collectives of the ranks connected."""

Score = Callable[[Tensor, int], Tensor]
"""Scores f[B, n] of logits f[B, n] whose first column has the given number."""


LONGEST_PART, SHORTEST_PART = 512, 32
"""Logits in a part of a row that a GPU reduces on its own: a power of two that divides the vocabulary."""


class VocabularyParts:
    """The logits of one step.

    Args:
        parts: The logits of the ranks in this process, float[B, V / ranks].
        run: Runs these ranks.
        mesh: The axis of the mesh along which the vocabulary is divided.
    """

    def __init__(self, parts: Sequence[Tensor], run: Runner, mesh: str) -> None:
        self._parts, self._run, self._mesh = parts, run, mesh

    def largest(self, score: Score) -> Tensor:
        """Returns the column with the largest score of each row, i64[B], of equal ones the first."""
        return self._run([partial(_largest, part, score, self._mesh) for part in self._parts])[0]

    def whole(self) -> Tensor:
        """Returns all logits, float[B, V]."""
        return self._run([partial(_gathered, part, self._mesh) for part in self._parts])[0]


def largest(logits: Tensor) -> Tensor:
    """Returns the first index of the largest logit of each row, i64[B], as `argmax(-1)` does; logits [B, V].

    On a GPU torch reduces each row with one block of threads, so long rows are reduced in parts first.
    """
    rows, columns = logits.shape
    width = math.gcd(columns, LONGEST_PART)
    if not logits.is_cuda or columns < 4 * width or width < SHORTEST_PART:
        return logits.argmax(-1)
    best, place = logits.view(rows, columns // width, width).max(-1)
    part = best.argmax(-1, keepdim=True)
    return (part * width + place.gather(1, part)).squeeze(1)


def _largest(part: Tensor, score: Score, mesh: str) -> Tensor:
    first = current().place(mesh) * part.shape[-1]
    scores = score(part, first)
    place = largest(scores)
    best = scores.gather(1, place[:, None]).squeeze(1)
    candidate = torch.stack([best.double(), (place + first).double()])  # one collective; both are exact in FP64
    bests, columns = current().all_gather(candidate[None], mesh, 0).unbind(1)
    rank = bests.argmax(0, keepdim=True)
    return columns.gather(0, rank).squeeze(0).long()


def _gathered(part: Tensor, mesh: str) -> Tensor:
    return current().all_gather(part, mesh, 1)
