"""Freed memory returns to the operating system."""

import ctypes
import sys
from pathlib import Path

import pytest

from qcompiler.files.freed_memory import WORTHWHILE, before_allocating

BLOCK, COUNT = 100_000, 1000
"""Blocks that glibc keeps in its heap when they are freed."""


def resident() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_freed_blocks_are_returned_before_a_large_allocation() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("needs glibc")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    blocks = [libc.malloc(BLOCK) for _ in range(COUNT)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
        libc.free(block)
    before = resident()
    before_allocating(WORTHWHILE - 1)
    assert resident() > before - BLOCK * COUNT // 4
    before_allocating(WORTHWHILE)
    assert resident() < before - BLOCK * COUNT // 2
    libc.free(blocks[-1])
