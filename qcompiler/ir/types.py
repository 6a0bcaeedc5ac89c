"""Types of values, printed as torch prints them: `bf16[s0, 256]`, `f8e4m3fn[64, 256]`, `int(s0)`, `none`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal

from qcompiler.ir.sharding import Partial, Placement, Shard, Sharding, print_sharding
from qcompiler.ir.sizes import Size, ceildiv, product, symbols


class DType(Enum):
    """Element types; the value is (spelling, bits per element)."""

    f64 = ("f64", 64)
    f32 = ("f32", 32)
    f16 = ("f16", 16)
    bf16 = ("bf16", 16)
    f8e4m3fn = ("f8e4m3fn", 8)
    f8e5m2 = ("f8e5m2", 8)
    f8e8m0fnu = ("f8e8m0fnu", 8)
    f4e2m1fn = ("f4e2m1fn", 4)
    c64 = ("c64", 64)
    c128 = ("c128", 128)
    i64 = ("i64", 64)
    i32 = ("i32", 32)
    i16 = ("i16", 16)
    i8 = ("i8", 8)
    i4 = ("i4", 4)
    u64 = ("u64", 64)
    u32 = ("u32", 32)
    u16 = ("u16", 16)
    u8 = ("u8", 8)
    b8 = ("b8", 8)

    def __str__(self) -> str:
        return self.value[0]

    __repr__ = __str__

    @property
    def bits(self) -> int:
        """Bits per element."""
        return self.value[1]

    @property
    def is_float(self) -> bool:
        """Whether this is a real floating-point type."""
        return self.value[0].startswith(("f", "bf"))


LONG_NAMES = {
    "float64": DType.f64, "float32": DType.f32, "float16": DType.f16, "bfloat16": DType.bf16,
    "float8_e4m3fn": DType.f8e4m3fn, "float8_e5m2": DType.f8e5m2, "float8_e8m0fnu": DType.f8e8m0fnu,
    "complex64": DType.c64, "complex128": DType.c128,
    "int64": DType.i64, "int32": DType.i32, "int16": DType.i16, "int8": DType.i8,
    "uint64": DType.u64, "uint32": DType.u32, "uint16": DType.u16, "uint8": DType.u8, "bool": DType.b8,
}  # fmt: skip
"""Element types by the names that array libraries use."""


class Type(ABC):
    """The type of a value."""

    @property
    @abstractmethod
    def symbols(self) -> frozenset[str]:
        """The symbols in the sizes of the type."""


@dataclass(frozen=True)
class TensorType(Type):
    """A dense tensor: element type, shape, and how the ranks of a mesh hold it.

    Attributes:
        dtype: The type of an element.
        shape: The sizes of the whole tensor.
        sharding: Its placements, see `qcompiler.ir.sharding`; empty if each rank holds the whole tensor.
    """

    dtype: DType
    shape: tuple[Size, ...]
    sharding: Sharding = ()

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]{print_sharding(self.sharding)}"

    @classmethod
    def of(cls, array: Any) -> "TensorType | None":
        """The type of an object with `dtype` and `shape`, such as a torch tensor; None if the dtype is unknown."""
        dtype = LONG_NAMES.get(str(getattr(array, "dtype", None)).rpartition(".")[2])
        return None if dtype is None else cls(dtype, tuple(array.shape))

    @property
    def elements(self) -> Size:
        """The number of elements."""
        return product(self.shape)

    @property
    def stored(self) -> "TensorType":
        """The type in memory: elements below 8 bits are packed into bytes along the last dimension."""
        if self.dtype.bits >= 8 or not self.shape:
            return self.whole
        *lead, last = self.shape
        return TensorType(DType.u8, (*lead, ceildiv(last * self.dtype.bits, 8)))

    @property
    def bytes(self) -> Size:
        """Size in memory, in bytes."""
        return self.stored.elements * (self.stored.dtype.bits // 8)

    @property
    def whole(self) -> "TensorType":
        """The type without placements."""
        return replace(self, sharding=()) if self.sharding else self

    @property
    def local(self) -> "TensorType":
        """The type of what one rank holds."""
        shape = list(self.shape)
        for _, placement in self.sharding:
            if isinstance(placement, Shard):
                shape[placement.axis] = shape[placement.axis] // placement.parts
        return TensorType(self.dtype, tuple(shape))

    def placement(self, mesh: str) -> Placement | None:
        """The placement on an axis of the mesh; None if the tensor is replicated along it."""
        return dict(self.sharding).get(mesh)

    def placed(self, mesh: str, placement: Placement | None) -> "TensorType":
        """The type with another placement on an axis of the mesh; None replicates it."""
        others = [pair for pair in self.sharding if pair[0] != mesh]
        return replace(self, sharding=tuple(sorted([*others, *([(mesh, placement)] if placement else [])])))

    @property
    def partials(self) -> frozenset[str]:
        """The axes of the mesh along which the tensor is a sum of what the ranks hold."""
        return frozenset(mesh for mesh, placement in self.sharding if isinstance(placement, Partial))

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols in the shape."""
        return frozenset().union(*map(symbols, self.shape))


@dataclass(frozen=True)
class ScalarType(Type):
    """A number that is not in a tensor, such as a size; `value` is its symbolic value if known."""

    kind: Literal["int", "float", "bool"]
    value: Size | None = None

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind}({self.value})"

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols in the value."""
        return frozenset() if self.value is None else symbols(self.value)


@dataclass(frozen=True)
class NoneType(Type):
    """The type of a result that an operator does not return."""

    def __str__(self) -> str:
        return "none"

    @property
    def symbols(self) -> frozenset[str]:
        """No symbols."""
        return frozenset()


NONE = NoneType()
