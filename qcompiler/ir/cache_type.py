"""The type of a key-value cache: `cache<bf16, slots = 16, heads = 8, capacity = 8192, key = 128, value = 128>`.

A cache holds the keys and values of one attention layer for several sequences, one sequence per slot. Its element type
is a dtype, a format with one scale per token and head, `cache<#fp8_row, slots = 16, …>`, or one with static scales:
`cache<#fp8_tensor, slots = 16, …>` has one for all keys and one for all values, which are weights of the graph.

The cache of a layer with a window may be a ring: `cache<bf16, …, capacity = 8192, …, ring = 3072>` holds the latest
3072 positions of up to 8192.

In `cache<bf16, …, heads = 1, …, key = 576, value = 512, within = true>`, the values are the first 512 elements of the
keys, as in attention over a latent: only keys are stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qcompiler.errors import QCompilerError, did_you_mean
from qcompiler.ir.formats import FP8_ROW, FP8_TENSOR, INT8_ROW, INT8_TENSOR, Format
from qcompiler.ir.types import DType, TensorType, Type

STATIC = (FP8_TENSOR, INT8_TENSOR)
"""Formats with static scales."""

QUANTIZED = (FP8_ROW, INT8_ROW, *STATIC)
"""Formats of a cache: a row is one head of one token."""


@dataclass(frozen=True)
class CacheType(Type):
    """Keys and values of one attention layer, which operations append to in place.

    Attributes:
        element: The dtype of keys and values, or the format of their codes and scales, one of `QUANTIZED`.
        slots: Number of sequences.
        heads: Number of key heads, which is also the number of value heads.
        capacity: Maximum length of a sequence.
        key: Size of one head of a key.
        value: Size of one head of a value.
        ring: Number of positions that a slot holds, fewer than `capacity`: position p is stored at p % ring, where it
            overwrites position p - ring. None: a slot holds all positions.
        within: Whether a value is the first elements of its key, so that only keys, and their scales, are stored.
    """

    element: DType | Format
    slots: int
    heads: int
    capacity: int
    key: int
    value: int
    ring: int | None = None
    within: bool = False

    def __post_init__(self) -> None:
        """Raises QCompilerError for an element type that caches do not support, and for sizes that are not positive."""
        dtype = isinstance(self.element, DType) and self.element.is_float and self.element.bits >= 16
        if not dtype and self.element not in QUANTIZED:
            need = f"a floating-point dtype of 16 bits or more, or {' or '.join(map(str, QUANTIZED))}"
            raise QCompilerError("a cache cannot have this element type", got=self.element, need=need)
        for name in SIZES:
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise QCompilerError(f"the size '{name}' of a cache is wrong", got=size, need="a positive integer")
        if self.ring is not None and not (type(self.ring) is int and 0 < self.ring < self.capacity):
            need = f"a positive integer below the capacity, {self.capacity}"
            raise QCompilerError("the size 'ring' of a cache is wrong", got=self.ring, need=need)
        if not isinstance(self.within, bool):
            raise QCompilerError("'within' of a cache is wrong", got=self.within, need="true or false")
        if self.within and self.value >= self.key:
            got, need = f"key = {self.key}, value = {self.value}", "values that are smaller than the keys"
            raise QCompilerError("values within the keys of a cache must be a part of them", got=got, need=need)

    def __str__(self) -> str:
        names = SIZES if self.ring is None else (*SIZES, "ring")
        sizes = (f"{name} = {getattr(self, name)}" for name in names)
        return f"cache<{', '.join([str(self.element), *sizes, *['within = true'] * self.within])}>"

    @property
    def symbols(self) -> frozenset[str]:
        """No symbols: the sizes of a cache are fixed."""
        return frozenset()

    @property
    def held(self) -> int:
        """Number of positions that a slot holds at once."""
        return self.ring or self.capacity

    @property
    def tensors(self) -> tuple[TensorType, ...]:
        """The stored tensors: key `[slots, heads, held, key]`, value `[slots, heads, held, value]`.

        With a format, they hold codes. FP32 scales of keys and of values follow, each `[slots, heads, held]`, unless
        they are static. Values within the keys, and their scales, are not stored.
        """
        lead, stored = (self.slots, self.heads, self.held), (self.key,) if self.within else (self.key, self.value)
        if isinstance(self.element, DType):
            return tuple(TensorType(self.element, (*lead, size)) for size in stored)
        codes = tuple(TensorType(self.element.element, (*lead, size)) for size in stored)
        return codes if self.is_static else (*codes, *(TensorType(self.element.scale, lead),) * len(stored))

    @property
    def is_static(self) -> bool:
        """Whether keys and values have one static scale each."""
        return self.element in STATIC

    @property
    def bytes(self) -> int:
        """Size in memory, in bytes."""
        return sum(size for kind in self.tensors if isinstance(size := kind.bytes, int))


SIZES = tuple(field.name for field in fields(CacheType))[1:-2]
"""The sizes that each cache has, in printing order."""


def read_cache(given: Mapping[str, Any]) -> CacheType:
    """The cache type with the fields `given`; raises QCompilerError if one is missing, unknown or invalid."""
    needed = ("element", *SIZES)
    known = (*needed, "ring", "within")
    if strange := [key for key in given if key not in known]:
        raise QCompilerError(f"a cache has no field '{strange[0]}'", fix=did_you_mean(strange[0], known))
    if missing := [key for key in needed if key not in given]:
        need = "cache<bf16, slots = 16, heads = 8, capacity = 8192, key = 128, value = 128>"
        raise QCompilerError(f"the {missing[0]} of a cache is missing", need=need)
    return CacheType(**given)
