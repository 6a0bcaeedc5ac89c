"""What a GPU generation can hold and address, as far as templates depend on it."""

from dataclasses import dataclass
from functools import cache

import torch

from codegen.driver import driver_version

MULTIPROCESSORS = 132
"""Multiprocessors of an H100 or H200 (SXM): the default device of problems."""


@dataclass(frozen=True)
class Limits:
    """The limits of a GPU generation.

    Attributes:
        multiprocessors: Of the device that operands without data are compiled for.
        shared_memory: Maximum bytes of shared memory per block of threads.
        reserved: Bytes of shared memory that each block uses besides.
        registers: Registers of a multiprocessor.
        register_unit: Registers are allocated to a warp in multiples of this number.
        warps: Maximum warps on a multiprocessor.
        blocks: Maximum blocks on a multiprocessor.
        copy_alignment: The copy engine reads and writes matrices that start, and whose rows start, at multiples of
            this number of bytes.
        overlap: Whether a kernel can start while the previous one still runs: see `codegen.kernels.overlap`.
    """

    multiprocessors: int
    shared_memory: int
    reserved: int = 1024
    registers: int = 65536
    register_unit: int = 256
    warps: int = 64
    blocks: int = 32
    copy_alignment: int = 16
    overlap: bool = False

    def multiprocessors_of(self, device: int | None) -> int:
        """How many multiprocessors the CUDA device of that index has."""
        return self.multiprocessors if device is None else _multiprocessors(device)

    def blocks_at_once(self, registers: int, warps: int, shared_memory: int) -> int:
        """How many blocks fit on a multiprocessor.

        Args:
            registers: Registers per thread.
            warps: Warps per block.
            shared_memory: Bytes per block.
        """
        unit = self.register_unit
        by_registers = self.registers // (-(-registers * 32 // unit) * unit * warps)
        by_memory = (self.shared_memory + self.reserved) // (shared_memory + self.reserved)
        return min(self.blocks, self.warps // warps, by_registers, by_memory)


RECORDS_OVERLAP = 12030
"""The first version of the CUDA driver, 12.3, that can record overlapping kernels in a CUDA graph."""


def driver_overlaps() -> bool:
    """Whether the CUDA driver is at least `RECORDS_OVERLAP`; True without one, as for compilation ahead of time."""
    version = driver_version()
    return version is None or version >= RECORDS_OVERLAP


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
