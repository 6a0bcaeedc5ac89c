"""Returns freed memory to the operating system.

glibc keeps freed blocks of up to 32 MB for later allocations. Weights that are read, quantized and freed one after the
other leave such blocks behind, in sizes that the next ones do not fit: up to half of what a rank of a mesh holds.
"""

import ctypes
from collections.abc import Callable
from functools import cache

WORTHWHILE = 1 << 20
"""Bytes of an allocation before which it pays: a call takes up to a few milliseconds."""


def before_allocating(size: int) -> None:
    """Returns what is freed, before an allocation of `size` bytes if that is large. Without glibc, does nothing."""
    trim = _malloc_trim()
    if trim is not None and size >= WORTHWHILE:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # not on Windows
        return None
    return found
