"""The type of a key-value cache: `cache<bf16, slots = 16, heads = 8, capacity = 8192, key = 128, value = 128>`.

A cache holds the keys and values of one attention layer for several sequences, one sequence per slot. Its element type
is a dtype, a format with one scale per token and head, `cache<#fp8_row, slots = 16, …>`, or one with static scales:
`cache<#fp8_tensor, slots = 16, …>` has one for all keys and one for all values, which are weights of the graph.
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
        capacity: Number of positions of each slot.
        key: Size of one head of a key.
        value: Size of one head of a value.
    """

    element: DType | Format
    slots: int
    heads: int
    capacity: int
    key: int
    value: int

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

    def __str__(self) -> str:
        sizes = (f"{name} = {getattr(self, name)}" for name in SIZES)
        return f"cache<{', '.join([str(self.element), *sizes])}>"

    @property
    def symbols(self) -> frozenset[str]:
        """No symbols: the sizes of a cache are fixed."""
        return frozenset()

    @property
    def tensors(self) -> tuple[TensorType, ...]:
        """The tensors of a cache: key `[slots, heads, capacity, key]`, value `[slots, heads, capacity, value]`.

        With a format, they hold codes. FP32 scales of keys and of values follow, each `[slots, heads, capacity]`,
        unless they are static.
        """
        lead = (self.slots, self.heads, self.capacity)
        if isinstance(self.element, DType):
            return tuple(TensorType(self.element, (*lead, size)) for size in (self.key, self.value))
        codes = tuple(TensorType(self.element.element, (*lead, size)) for size in (self.key, self.value))
        return codes if self.is_static else (*codes, *(TensorType(self.element.scale, lead),) * 2)

    @property
    def is_static(self) -> bool:
        """Whether keys and values have one static scale each."""
        return self.element in STATIC

    @property
    def bytes(self) -> int:
        """Size in memory, in bytes."""
        return sum(size for kind in self.tensors if isinstance(size := kind.bytes, int))


SIZES = tuple(field.name for field in fields(CacheType))[1:]
"""The sizes, in printing order."""


def read_cache(given: Mapping[str, Any]) -> CacheType:
    """The cache type with the fields `given`; raises QCompilerError if one is missing, unknown or invalid."""
    known = ("element", *SIZES)
    if strange := [key for key in given if key not in known]:
        raise QCompilerError(f"a cache has no field '{strange[0]}'", fix=did_you_mean(strange[0], known))
    if missing := [key for key in known if key not in given]:
        need = "cache<bf16, slots = 16, heads = 8, capacity = 8192, key = 128, value = 128>"
        raise QCompilerError(f"the {missing[0]} of a cache is missing", need=need)
    return CacheType(**given)
