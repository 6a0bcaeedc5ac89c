"""The generation loop: a queue of prompts over the slots of a cache.

    waiting ──a free slot──▶ prefill, in chunks ──▶ decode all running sequences together ──ended──▶ the slot is free

On a GPU, the host launches the next decode step before it reads the tokens of the last one, so the device never waits.
A sequence that ends by its contents is therefore noticed one step late; the extra token is dropped. As long as the same
sequences run, the host only launches a prepared step, starts the copy of its tokens, and reads the last step's.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from qcompiler.decoding.graphs import Decode
from qcompiler.decoding.readback import Readback
from qcompiler.decoding.requests import Request
from qcompiler.decoding.sampling import Features
from qcompiler.decoding.slot_table import SlotTable
from qcompiler.decoding.step import Step
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


@dataclass
class _Batch:
    """Sequences that decode together.

    Attributes:
        rows: The sequences.
        step: Computes their next tokens.
        left: Steps until one of them reaches its limit.
    """

    rows: Sequence[_Row]
    step: Callable[[], Tensor]
    left: int


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
        self._table, self._decode, self._chunk = table, decode, positions_of_call(table.step, chunk)
        self._lag = int(table.step.device.type == "cuda") if lag is None else lag
        self._readback = Readback(table.step.device, table.step.slots)
        self._busy = Lock()  # of one run, which may end in another thread
        self.runs = 0
        """Number of runs so far: each overwrites the cache."""

    def run(self, requests: Iterable[Request]) -> Iterator[Produced]:
        """Generates all requests and yields their tokens as they arrive, in order within each request.

        Raises:
            InputError: Another run is not finished.
        """
        if not self._busy.acquire(blocking=False):
            raise InputError("the decoder is busy", got="another stream that is not finished",
                             fix="Read the other stream to its end, or close() it.")  # fmt: skip
        self.runs += 1
        try:
            yield from self._run(requests)
        finally:
            self._busy.release()

    def _run(self, requests: Iterable[Request]) -> Iterator[Produced]:
        waiting = deque(_Row(number, request, -1) for number, request in enumerate(requests))
        free = deque(range(self._table.step.slots))
        running: list[_Row] = []
        flights: deque[_Flight] = deque()
        batch: _Batch | None = None
        while waiting or running or flights:
            if waiting and free:
                entering = [waiting.popleft() for _ in range(min(len(waiting), len(free)))]
                for row in entering:
                    row.slot = free.popleft()
                flights.extend(self._prefilled(entering))
                running += entering
                batch = None
            if batch is None or not batch.left:
                batch = self._batch([row for row in running if row.launched < row.request.limit])
            if batch is not None:
                flights.append(self._decoded(batch))
            ended = False
            while len(flights) > (0 if batch is None else self._lag):
                for produced in _received(flights.popleft()):
                    ended |= produced.ended
                    yield produced
            if ended:
                free.extend(row.slot for row in running if row.ended)
                running = [row for row in running if not row.ended]
                batch = None

    # Gradients are disabled here for each step, and not for what the caller does between two tokens.

    @torch.no_grad()
    def _prefilled(self, entering: Sequence[_Row]) -> list[_Flight]:
        """Prefills the prompts of new rows, and starts the copy of their first tokens."""
        flights = []
        for rows in prefill_groups(entering, self._chunk):
            slots, prompts = [row.slot for row in rows], [row.request.prompt for row in rows]
            for start in range(0, max(map(len, prompts)), self._chunk):
                logits = self._table.prefill(slots, [p[start : start + self._chunk] for p in prompts], start)
            new = self._table.first(slots, [row.request for row in rows], logits)
            flights.append(self._flight(rows, new))
        return flights

    @torch.no_grad()
    def _batch(self, rows: Sequence[_Row]) -> _Batch | None:
        """Prepares the step of some rows; returns None if there are none."""
        if not rows:
            return None
        step = self._decode.prepare([row.slot for row in rows], Features.of(row.request.sampling for row in rows))
        return _Batch(rows, step, min(row.request.limit - row.launched for row in rows))

    @torch.no_grad()
    def _decoded(self, batch: _Batch) -> _Flight:
        batch.left -= 1
        return self._flight(batch.rows, batch.step())

    def _flight(self, rows: Sequence[_Row], tokens: Tensor) -> _Flight:
        """Starts the copy of new tokens to the host."""
        for row in rows:
            row.launched += 1
        return _Flight(rows, self._readback.start(tokens))


def positions_of_call(step: Step, chunk: int = CHUNK) -> int:
    """Returns how many positions a call may compute: `chunk`, or fewer if the step does not take such a long row."""
    return min(chunk, step.chunk) if step.chunk < step.capacity else chunk


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
