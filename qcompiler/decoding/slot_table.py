"""The device state of the generation loop: the latest token, the length and the sampling settings of each slot.

The sequences that decode together also have their tokens and lengths in the order of the batch, so that a step of the
model reads them without a kernel that collects them. A step writes both.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from codegen.direct import kernels
from qcompiler.decoding.requests import Request
from qcompiler.decoding.sampling import Features, SamplingTable
from qcompiler.decoding.step import Logits, Step, step_inputs


@dataclass(frozen=True)
class Rows:
    """Sequences that decode together, in the order of a batch: what a step of the model reads, ready for it.

    Attributes:
        slots: i64[B], the slot of each sequence.
        tokens: i64[B], its latest token, which is not in the cache yet.
        lengths: i64[B], its positions in the cache.
        last: i64[B], zeros: a step has one token for each sequence.
    """

    slots: Tensor
    tokens: Tensor
    lengths: Tensor
    last: Tensor

    @classmethod
    def empty(cls, size: int, device: torch.device) -> "Rows":
        """Returns rows to be filled by `SlotTable.load`."""
        slots, tokens, lengths, last = (torch.zeros(size, dtype=torch.int64, device=device) for _ in range(4))
        return cls(slots, tokens, lengths, last)


class SlotTable:
    """The state of all slots as tensors, which one decode step reads and writes without the host.

    Attributes:
        tokens: i64[slots], the latest token, which is not in the cache yet.
        lengths: i64[slots], positions in the cache.
        active: i64[slots], 1 for slots whose sequence grows, 0 for others, such as those that pad a batch.
        sampling: How each slot's tokens are chosen.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.tokens = torch.zeros(step.slots, dtype=torch.int64, device=step.device)
        self.lengths = torch.zeros_like(self.tokens)
        self.active = torch.zeros_like(self.tokens)
        self.sampling = SamplingTable(step.slots, step.vocabulary, step.device)

    def activate(self, slots: Sequence[int]) -> None:
        """Selects the slots that grow from now on; forgets the lengths of all others."""
        self.active.zero_()
        if slots:
            self.active[self._tensor(slots)] = 1
        self.lengths.mul_(self.active)

    def prefill(self, slots: Sequence[int], rows: Sequence[Sequence[int]], start: int) -> Logits:
        """Appends tokens to slots that hold `start` positions, and returns the logits after each row, [B, V]."""
        return self.step(*step_inputs(slots, rows, [start] * len(rows), self.step.device), start)

    def first(self, slots: Sequence[int], requests: Sequence[Request], logits: Logits) -> Tensor:
        """Chooses the first new token of prefilled sequences, i64[B], and enters them in the table."""
        chosen, rows = self._tensor(slots), [request.sampling for request in requests]
        self.sampling.enter(chosen, rows, [request.prompt for request in requests])
        lengths = self._tensor([len(request.prompt) for request in requests])
        new = self.sampling.choose(logits, chosen, lengths - 1, Features.of(rows))
        self.tokens[chosen], self.lengths[chosen] = new, lengths
        return new

    def load(self, rows: Rows, slots: Sequence[int]) -> None:
        """Fills rows with the sequences in some slots, as they are now."""
        rows.slots.copy_(torch.tensor(slots))
        self.refresh(rows)

    def refresh(self, rows: Rows) -> None:
        """Copies the tokens and lengths of the slots to the rows, as they are now."""
        torch.index_select(self.tokens, 0, rows.slots, out=rows.tokens)
        torch.index_select(self.lengths, 0, rows.slots, out=rows.lengths)

    def advance(self, rows: Rows, features: Features) -> Tensor:
        """Appends the latest tokens to the cache; enters and returns the next ones, `rows.tokens`.

        Everything that it reads and writes is in the table, the cache, and the rows, so it can be recorded.
        """
        logits = self.step(rows.tokens[:, None], rows.slots, rows.lengths, rows.last)
        parts = self.sampling.ranked(logits, rows.slots, rows.lengths, features)
        table = (self.active, self.tokens, self.lengths)
        kernels.enter_tokens(parts, rows.slots, *table, rows.tokens, rows.lengths)
        self.sampling.note(rows.slots, rows.tokens, features)
        return rows.tokens

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Lets `advance` run without effect: no slot is active, and the table is restored afterwards.

        The cache is written at the next position of each slot, which the next real step overwrites.
        """
        kept = [(tensor, tensor.clone()) for tensor in (self.tokens, self.active, self.sampling.seen)]
        self.active.zero_()
        try:
            yield
        finally:
            for tensor, before in kept:
                tensor.copy_(before)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.step.device)
