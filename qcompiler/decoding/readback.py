"""Copies new tokens to the host while the device continues.

read = Readback(device, most=16).start(tokens)      enqueues the copy, and returns at once
read()                                              waits for the copy: a list of ints
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class _Buffer(NamedTuple):
    """Pinned memory, and the event after the copy into it."""

    tokens: Tensor
    arrived: torch.cuda.Event


class Readback:
    """Starts copies of tokens to the host.

    Buffers and events are reused, because allocating them costs as much host time as the copy.

    Args:
        device: The device of the tokens.
        most: The largest number of tokens in a copy.
    """

    def __init__(self, device: torch.device, most: int) -> None:
        self._on_gpu, self._most = device.type == "cuda", most
        self._free: list[_Buffer] = []

    def start(self, tokens: Tensor) -> Callable[[], list[int]]:
        """Returns a function that waits for the tokens, i64[B], as they are now; call it once."""
        if not self._on_gpu:
            return tokens.clone().tolist
        buffer = self._free.pop() if self._free else self._new()
        count = len(tokens)
        target = buffer.tokens if count == self._most else buffer.tokens[:count]
        target.copy_(tokens, non_blocking=True)
        buffer.arrived.record()

        def read() -> list[int]:
            buffer.arrived.synchronize()
            found: list[int] = target.tolist()
            self._free.append(buffer)
            return found

        return read

    def _new(self) -> _Buffer:
        return _Buffer(torch.empty(self._most, dtype=torch.int64, pin_memory=True), torch.cuda.Event())
