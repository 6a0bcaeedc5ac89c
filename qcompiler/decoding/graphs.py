"""Runs decode steps: directly, or as recorded CUDA graphs, one for each batch size and set of sampling features.

    step = RecordedDecode(table, recorder).prepare([3, 0, 5], features)
    tokens = step()        table.advance(…), recorded for 4 rows; the last one pads

A recorded step reads and writes the tensors of the slot table, and the rows of its batch size. A batch between two
recorded sizes is padded with a slot that is not active.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from qcompiler.decoding.sampling import Features
from qcompiler.decoding.slot_table import Rows, SlotTable


class Decode(Protocol):
    """Advances sequences by one token at a time."""

    @property
    def nbytes(self) -> int:
        """Device memory that recorded steps hold."""

    def prepare(self, slots: Sequence[int], features: Features) -> Callable[[], Tensor]:
        """Returns the step of the sequences in some slots, which is valid until the next call of `prepare`.

        A step returns the new tokens, i64[len(slots)], which the next step may overwrite. As long as the same sequences
        run, no other work of the host is needed.
        """

    def warm_up(self) -> None:
        """Does what would delay the first steps."""


class Recorder(Protocol):
    """Records device work.

    Attributes:
        nbytes: Device memory that the recorded work holds.
    """

    nbytes: int

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Records `run`, which may run some times before; the result repeats it, and returns the same tensor."""


class DirectDecode:
    """Runs each step operation by operation."""

    nbytes = 0  # nothing is recorded

    def __init__(self, table: SlotTable) -> None:
        self._table = table

    def prepare(self, slots: Sequence[int], features: Features) -> Callable[[], Tensor]:
        """Returns the step of the sequences in some slots: see `Decode`."""
        self._table.activate(slots)
        rows = Rows.empty(len(slots), self._table.step.device)
        self._table.load(rows, slots)
        return partial(self._table.advance, rows, features)

    def warm_up(self) -> None:
        """Does nothing."""


class RecordedDecode:
    """Replays recorded steps; records one when its batch size and features are first needed."""

    def __init__(self, table: SlotTable, recorder: Recorder) -> None:
        self._table, self._recorder = table, recorder
        self._rows = {size: Rows.empty(size, table.step.device) for size in batch_sizes(table.step.slots)}
        self._replays: dict[tuple[int, Features], Callable[[], Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Device memory that the recorded steps hold."""
        return self._recorder.nbytes

    def prepare(self, slots: Sequence[int], features: Features) -> Callable[[], Tensor]:
        """Returns the step of the sequences in some slots: see `Decode`."""
        count = len(slots)
        size = next(size for size in self._rows if size >= count)
        replay = self._replay(size, features)
        self._table.activate(slots)
        self._table.load(self._rows[size], padded(slots, size, self._table.step.slots))
        return replay if size == count else lambda: replay()[:count]

    def warm_up(self) -> None:
        """Records greedy steps of all batch sizes, the largest first, so that the others fit into its memory."""
        for size in reversed(self._rows):
            self._replay(size, Features())

    def _replay(self, size: int, features: Features) -> Callable[[], Tensor]:
        key = (size, features)
        if key not in self._replays:
            with self._table.unchanged():
                rows = self._rows[size]
                self._table.refresh(rows)  # recording writes the cache after these lengths
                self._replays[key] = self._recorder.record(lambda: self._table.advance(rows, features))
        return self._replays[key]


def batch_sizes(slots: int) -> list[int]:
    """Returns the batch sizes to record: powers of two, and the number of slots."""
    return [*(1 << power for power in range((slots - 1).bit_length())), slots]


def padded(slots: Sequence[int], size: int, count: int) -> list[int]:
    """Returns `slots`, extended to `size` entries with the first of `count` slots that is not among them."""
    padding = [slot for slot in range(count) if slot not in slots][:1]
    return [*slots, *padding * (size - len(slots))]


class CudaRecorder:
    """Records CUDA graphs in one memory pool, since only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.nbytes = 0
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Runs `run` on a side stream first, so that kernels are compiled and chosen before the capture."""
        torch.cuda.synchronize(self._device)
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.synchronize(self._device)
        free, _ = torch.cuda.mem_get_info(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()
        self.nbytes += max(0, free - torch.cuda.mem_get_info(self._device)[0])

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
