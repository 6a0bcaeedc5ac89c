"""The generated kernel of `kernel.pointwise`: tiles of a few rows of each result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from codegen.launching.launch import KernelCall
from codegen.pointwise_kernels import pointwise_kernel
from codegen.templates.rounding import cache_rounding
from codegen.templates.template import KernelOp, Template, ceil_div
from qcompiler.dialects.pointwise import shape_of

FEW_ELEMENTS = 1 << 17
"""Elements of the results up to which small tiles are used, so that they occupy many multiprocessors."""

MOST_PER_WARP = 1024
"""Elements of a tile per warp, if whole rows make a tile larger than its configuration."""

NARROW = 2**31
"""Elements of a tensor that 32-bit offsets can address."""


class PointwiseProblem(NamedTuple):
    """Fused expressions to compute.

    Attributes:
        elements: Elements of all results.
        operands: Number of operands.
    """

    elements: int
    operands: int = 1


@dataclass(frozen=True)
class PointwiseConfig:
    """The tile of the kernel.

    Attributes:
        elements: Elements of a tile, a power of two; at least its width.
        warps: Warps that share the tile.
    """

    elements: int
    warps: int
    variant: ClassVar[str] = "pointwise"


class PointwiseOperands(NamedTuple):
    """The tensors of the operation.

    Attributes:
        expressions: One for each result.
        shapes: The shapes of the results, as in `kernel.pointwise`.
        operands: In a floating dtype, FP8 included, or int32 or int64 if they are parts of indices; any strides.
        out: The results, contiguous; overwritten. With a cache, those after the first two.
        cache: Where the first two results are appended.
    """

    expressions: tuple[str, ...]
    shapes: tuple[str, ...]
    operands: Sequence[Tensor]
    out: Sequence[Tensor]
    cache: "Appended | None" = None


class Appended(NamedTuple):
    """A key-value cache, and where in it a call appends.

    Attributes:
        tensors: Key, value, and their scales or None: [slots, heads, held, ...], contiguous; written in place. Static
            scales are [1] and only read.
        slots: int64 [batch], contiguous.
        lengths: int64 [batch], contiguous.
        capacity: Maximum length of a sequence if the cache is a ring of `held` positions; None if it is not.
    """

    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    slots: Tensor
    lengths: Tensor
    capacity: int | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of a kernel, as in `pointwise_kernels.CACHE`."""
        slot_count, _, held, _ = self.tensors[0].shape
        return (*self.tensors, self.slots, self.lengths, slot_count, self.capacity or held)

    @property
    def constants(self) -> dict[str, Any]:
        """The constants of a kernel, as in `pointwise_kernels.CACHE_CONSTANTS`."""
        return {**cache_rounding(self.tensors), "RING": self.tensors[0].shape[2] if self.capacity else None}


def pointwise_configs(problem: PointwiseProblem) -> Mapping[PointwiseConfig, None]:
    """The configuration for a problem: 8 elements per thread (16 bytes of bfloat16), or 16 if there are many."""
    return {PointwiseConfig(256, 1) if problem.elements <= FEW_ELEMENTS else PointwiseConfig(2048, 4): None}


class Pointwise(Template[PointwiseConfig, PointwiseProblem, PointwiseOperands]):
    """The one variant."""

    variant = PointwiseConfig.variant
    overlaps = True

    def why_not(self, config: PointwiseConfig, problem: PointwiseProblem) -> str | None:
        """See `Template`."""
        return None

    def time(self, config: PointwiseConfig, problem: PointwiseProblem, pace: None) -> float:
        """See `Template`."""
        return 0.0

    def calls(self, config: PointwiseConfig, operands: PointwiseOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        expressions, shapes, given, out, cache = operands
        kernel = pointwise_kernel(expressions, shapes, adjacent_axes(given), cache is not None)
        elements = max(config.elements, *kernel.widths)
        exact = kernel.given.exact
        read = [given[place] for place in kernel.given.read]
        wide = [given[place] for place in kernel.given.read if place not in exact]
        strides = [(place in exact, given[place].stride(axis)) for place, axis in kernel.given.strides]
        unit = 16 // min(each.element_size() for each in (*wide, *out))
        unit = unit if all(one or stride % unit == 0 for one, stride in strides) else 1
        sizes = (given[place].shape[axis] for place, axis in kernel.given.sizes)
        appended = () if cache is None else cache.arguments
        steps = (stride if one else stride // unit for one, stride in strides)
        arguments = (*out, *appended, *read, *sizes, *steps)
        constants = {"UNIT": unit, "ELEMENTS": elements, "WIDE": max(map(_extent, (*read, *out))) >= NARROW}
        if cache is not None:
            constants |= cache.constants
        shaped = [shape_of(shape, given) for shape in shapes]
        programs = sum(
            ceil_div(prod(shape[:-1]), elements // width) * ceil_div(shape[-1] if shape else 1, width)
            for shape, width in zip(shaped, kernel.widths, strict=True)
        )
        warps = min(max(config.warps, elements // MOST_PER_WARP), 16)
        options = {"num_warps": warps, "enable_fp_fusion": False}
        return (KernelCall(kernel.function, programs, arguments, constants, options),)


def adjacent_axes(operands: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """The last axis of each operand whose elements are next to each other along it."""
    return tuple(
        (place, x.dim() - 1) for place, x in enumerate(operands) if x.dim() and (x.stride(-1) == 1 or x.shape[-1] == 1)
    )


def _extent(tensor: Tensor) -> int:
    """One more than the largest offset of an element."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


POINTWISE = KernelOp[PointwiseConfig, PointwiseProblem, PointwiseOperands]("pointwise kernel")
POINTWISE.add(Pointwise, pointwise_configs)
