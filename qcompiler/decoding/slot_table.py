"""The device state of the generation loop: the latest token, the length and the sampling settings of each slot."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qcompiler.decoding.requests import Request
from qcompiler.decoding.sampling import Features, SamplingTable
from qcompiler.decoding.step import Step, step_inputs


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

    def prefill(self, slots: Sequence[int], rows: Sequence[Sequence[int]], start: int) -> Tensor:
        """Appends tokens to slots that hold `start` positions, and returns the logits after each row, [B, V]."""
        return self.step(*step_inputs(slots, rows, [start] * len(rows), self.step.device), start)

    def first(self, slots: Sequence[int], requests: Sequence[Request], logits: Tensor) -> Tensor:
        """Chooses the first new token of prefilled sequences, i64[B], and enters them in the table."""
        chosen, rows = self._tensor(slots), [request.sampling for request in requests]
        self.sampling.enter(chosen, rows, [request.prompt for request in requests])
        lengths = self._tensor([len(request.prompt) for request in requests])
        new = self.sampling.choose(logits, chosen, lengths, Features.of(rows))
        self.tokens[chosen], self.lengths[chosen] = new, lengths
        return new

    def advance(self, slots: Tensor, features: Features) -> Tensor:
        """Appends the latest tokens to the cache, and returns the next ones, i64[B]; slots i64[B].

        Everything that it reads and writes is in the table, the cache, and the arguments, so it can be recorded.
        """
        lengths = self.lengths[slots]
        logits = self.step(self.tokens[slots, None], slots, lengths, torch.zeros_like(slots))
        new = self.sampling.choose(logits, slots, lengths + 1, features)
        self.tokens[slots] = new
        self.lengths[slots] = lengths + self.active[slots]
        return new

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
