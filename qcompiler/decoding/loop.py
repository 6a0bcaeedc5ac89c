"""The generation loop: a queue of prompts over the slots of a cache.

    waiting ──a free slot──▶ prefill, in chunks ──▶ decode all running sequences together ──ended──▶ the slot is free

The host launches the next decode step before it reads the tokens of the last one, so the device never waits. A
sequence that ends by its contents is therefore noticed one step late on such devices; the extra token is dropped.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qcompiler.decoding.graphs import Decode
from qcompiler.decoding.requests import Request
from qcompiler.decoding.sampling import Features
from qcompiler.decoding.slot_table import SlotTable
from qcompiler.errors import InputError

CHUNK = 2048
"""Positions that one prefill call computes, padding included."""


class Produced(NamedTuple):
    """A new token: the number of its request, the token, and whether the sequence ends with it."""

    request: int
    token: int
    ended: bool


@dataclass
class _Row:
    """A running sequence.

    Attributes:
        launched: Tokens whose computation was started.
        received: Tokens that the host has read.
    """

    number: int
    request: Request
    slot: int
    launched: int = 0
    received: int = 0
    ended: bool = False


class _Flight(NamedTuple):
    """Tokens under way to the host, one for each row."""

    rows: Sequence[_Row]
    read: Callable[[], list[int]]


class Loop:
    """Runs requests over the slots of a table.

    Args:
        table: The device state.
        decode: Runs one decode step.
        chunk: See CHUNK.
        lag: Decode steps launched before the oldest is read; by default 1 on a GPU, else 0.
    """

    def __init__(self, table: SlotTable, decode: Decode, *, chunk: int = CHUNK, lag: int | None = None) -> None:
        self._table, self._decode, self._chunk = table, decode, chunk
        self._lag = int(table.step.device.type == "cuda") if lag is None else lag
        self._busy = False
        self.runs = 0
        """Number of runs so far: each overwrites the cache."""

    def run(self, requests: Iterable[Request]) -> Iterator[Produced]:
        """Generates all requests and yields their tokens as they arrive, in order within each request.

        Raises:
            InputError: Another run is not finished.
        """
        if self._busy:
            raise InputError("the decoder is busy", got="another stream that is not finished",
                             fix="Read the other stream to its end, or close() it.")  # fmt: skip
        self._busy = True
        self.runs += 1
        try:
            yield from self._run(requests)
        finally:
            self._busy = False

    @torch.no_grad()  # for each step, not for what the caller does between two tokens
    def _run(self, requests: Iterable[Request]) -> Iterator[Produced]:
        waiting = deque(_Row(number, request, -1) for number, request in enumerate(requests))
        free = deque(range(self._table.step.slots))
        running: list[_Row] = []
        flights: deque[_Flight] = deque()
        while waiting or running or flights:
            entering = []
            while waiting and free:
                row = waiting.popleft()
                row.slot = free.popleft()
                entering.append(row)
            flights.extend(self._prefilled(entering))
            running += entering
            batch = [row for row in running if row.launched < row.request.limit]
            if batch:
                flights.append(self._decoded(batch))
            while len(flights) > (self._lag if batch else 0):
                yield from _received(flights.popleft())
            free.extend(row.slot for row in running if row.ended)
            running = [row for row in running if not row.ended]

    def _prefilled(self, entering: Sequence[_Row]) -> Iterator[_Flight]:
        """Prefills the prompts of new rows, and starts the copy of their first tokens."""
        for rows in prefill_groups(entering, self._chunk):
            slots, prompts = [row.slot for row in rows], [row.request.prompt for row in rows]
            for start in range(0, max(map(len, prompts)), self._chunk):
                logits = self._table.prefill(slots, [p[start : start + self._chunk] for p in prompts], start)
            new = self._table.first(slots, [row.request for row in rows], logits)
            yield _flight(rows, new)

    def _decoded(self, batch: Sequence[_Row]) -> _Flight:
        features = Features.of(row.request.sampling for row in batch)
        return _flight(batch, self._decode([row.slot for row in batch], features))


def prefill_groups(rows: Iterable[_Row], chunk: int) -> Iterator[list[_Row]]:
    """Yields rows to prefill together: several if their prompts, padded to the longest, fit into one chunk.

    A prompt longer than that is prefilled alone, so a padded row never reaches beyond the cache.
    """
    group: list[_Row] = []
    for row in sorted(rows, key=lambda row: -len(row.request.prompt)):
        if group and (len(group) + 1) * len(group[0].request.prompt) > chunk:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _received(flight: _Flight) -> Iterator[Produced]:
    for row, token in zip(flight.rows, flight.read(), strict=True):
        if row.ended:  # its end was read after this step was launched
            continue
        row.received += 1
        row.ended = row.request.ends(token) or row.received == row.request.limit
        yield Produced(row.number, token, row.ended)


def _flight(rows: Sequence[_Row], tokens: Tensor) -> _Flight:
    """Starts the copy of new tokens to the host."""
    for row in rows:
        row.launched += 1
    if tokens.device.type != "cuda":
        return _Flight(rows, tokens.clone().tolist)
    copy = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    copy.copy_(tokens, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[int]:
        arrived.synchronize()
        return copy.tolist()

    return _Flight(rows, read)
