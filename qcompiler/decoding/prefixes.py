"""Sequences that grow from call to call: computes only what the cache does not hold yet.

rows [[1, 2, 3], [7]]          slot 0: 1 2 3     slot 1: 7
rows [[1, 2, 3, 4], [7, 9]]    computes 4 and 9
rows [[1, 2, 5], [8]]          slot 0 keeps 1 2, and everything else is computed
"""

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from qcompiler.decoding.loop import positions_of_call
from qcompiler.decoding.step import Step, all_logits, step_inputs


class Prefixes:
    """Runs a step over whole sequences, row i in slot i modulo the number of slots."""

    def __init__(self, step: Step) -> None:
        self._step, self._chunk = step, positions_of_call(step)
        self._held: list[list[int]] = [[] for _ in range(step.slots)]
        self._written = [0] * step.slots  # positions of each slot that were written, padding included

    def forget(self) -> None:
        """Computes everything again, after other code wrote to the cache."""
        self._held = [[] for _ in self._held]

    def last_logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Returns the logits after each row, float[B, V]; no row may be empty or longer than the cache."""
        parts = [rows[at : at + self._step.slots] for at in range(0, len(rows), self._step.slots)]
        return torch.cat([self._part(part) for part in parts])

    def _part(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The logits of rows in the first slots."""
        starts = [self._start(slot, row) for slot, row in enumerate(rows)]
        rest = [row[start:] for row, start in zip(rows, starts, strict=True)]
        width = max(map(len, rest))
        try:
            if len(rows) * width <= self._chunk and max(starts) + width <= self._step.capacity:
                logits = self._appended(range(len(rows)), rest, starts)
            else:
                logits = torch.cat([self._alone(*each) for each in zip(range(len(rows)), rest, starts, strict=True)])
        except BaseException:
            self.forget()
            raise
        self._held[: len(rows)] = [list(row) for row in rows]
        return logits

    def _start(self, slot: int, row: Sequence[int]) -> int:
        """How many tokens of a row its slot holds, without the last one; 0 if the cache has lost what they need."""
        start = min(common(row, self._held[slot]), len(row) - 1)
        return start if self._step.keeps(start, self._written[slot]) else 0

    def _alone(self, slot: int, row: Sequence[int], start: int) -> Tensor:
        for at in range(0, len(row), self._chunk):
            logits = self._appended([slot], [row[at : at + self._chunk]], [start + at])
        return logits

    def _appended(self, slots: Sequence[int], rows: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        width = max(map(len, rows))
        for slot, start in zip(slots, starts, strict=True):
            self._written[slot] = max(self._written[slot] if start else 0, start + width)
        return all_logits(self._step(*step_inputs(slots, rows, starts, self._step.device)))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
