"""The memory of a decoder, by purpose."""

import os
from dataclasses import dataclass

import torch

from qcompiler.errors import InputError

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Memory:
    """Bytes of a decoder on its device.

    Attributes:
        weights: The weights of the compiled graph.
        cache: Keys, values and scales of all slots.
        graphs: Memory that recorded CUDA graphs hold, so far.
        copies: Dequantized weights that the target cpu keeps between calls, so far; shown if there are any.
    """

    weights: int
    cache: int
    graphs: int = 0
    copies: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.cache + self.graphs + self.copies

    def __str__(self) -> str:
        parts = {"weights": self.weights, "cache": self.cache, "graphs": self.graphs}
        parts |= {"copies": self.copies} if self.copies else {}
        parts["total"] = self.total
        return "\n".join(f"{name:<8}{shown(nbytes):>12}" for name, nbytes in parts.items())

    __repr__ = __str__


def shown(nbytes: int) -> str:
    """Returns a size with its unit, such as `1.5 GiB`."""
    size, unit = float(nbytes), 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{nbytes} bytes" if unit == 0 else f"{size:.1f} {UNITS[unit]}"


def check_fits(nbytes: int, device: torch.device, slots: int, capacity: int, fixed: int = 0) -> None:
    """Raises InputError unless a cache of `nbytes` fits into the device's free memory (on a CPU, its memory).

    Args:
        nbytes: Bytes of all caches.
        device: Where they will be.
        slots: Sequences that they hold.
        capacity: Positions of each sequence.
        fixed: Bytes of those caches that do not grow with the capacity.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if nbytes <= free:
        return
    fits = max(capacity * (free - fixed) // (nbytes - fixed), 0) if nbytes > fixed else 0
    raise InputError(
        "the cache does not fit into memory",
        got=f"{shown(nbytes)} for max_batch={slots} and max_length={capacity}",
        need=f"at most {shown(free)} on {device}" + (f", such as max_length={fits}" if fits else ""),
        fix='Lower max_batch or max_length, or choose a smaller format, such as kv_cache="fp8".',
    )
