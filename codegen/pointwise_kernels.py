"""Writes the Triton kernel of `kernel.pointwise`: several fused expressions over operands at indices of their own.

    expressions = ["bf16(x0[i0, i2, 64*i1 + i3] * x1[i0, i3])"]     shapes = ["x0.0, 4, x0.1, 64"]

    def pointwise_5ac1…(out0, x0, x1, n0, n1, x0_0, x0_1, x1_0, UNIT, ELEMENTS, WIDE):
        let_next_start()
        inputs_ready()
        …
        if program < tiles:
            i2 = rows % n1 …
            l0 = tl.load(x0 + (i0 * x0_0 * UNIT + …) + i3, mask=inside, other=0.0)
            tl.store(out0 + …, bf16_product(l0, l1).to(out0.dtype.element_ty), mask=inside)

The rows of a result are all its axes but the last, which is contiguous. A program computes a tile of one result. All
loads of a tile come first, so that they wait for memory together: elements of integer operands, which are parts of
indices, then all others. A load that `where` guards is masked, and so is one whose index depends on integer operands:
outside its operand it is NaN. The kernel of `state.fused_append` stores its first two results in a key-value cache
instead.
"""

import hashlib
import linecache
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import triton

from codegen.fused_expressions import SCOPE, Writer
from codegen.kernels.append_to_cache import store_rows
from codegen.kernels.overlap import inputs_ready, let_next_start
from codegen.pointwise_reads import (
    Guard,
    IndexWriter,
    Read,
    changes_within,
    computed_axes,
    moving_axes,
    needed,
    reads_of,
    source_of,
    terms_of,
)
from qcompiler.dialects.expression_nodes import Less, Load, indices
from qcompiler.dialects.fused_expression import FusedExpression, parse
from qcompiler.dialects.pointwise import AxisPart, AxisSize, read_shape
from qcompiler.ir.sizes import Size

WIDEST = 1024
"""Maximum columns of a tile."""

OVERLAP = {"inputs_ready": inputs_ready, "let_next_start": let_next_start}
"""Names that the source of a kernel uses, besides `SCOPE`."""

MOST_UNITS = 16
"""Maximum elements of a unit of strides: 16 bytes of codes."""

UNKNOWN_WIDTH = 256
"""Columns of a tile if a result has any number of columns."""

CACHE = ("key", "value", "key_scale", "value_scale", "slots", "lengths", "slot_count", "capacity")
ROUNDING = ("AMAX_FLOOR", "TOP", "RECIPROCAL", "UE8M0")
CACHE_CONSTANTS = (*ROUNDING, "RING")


class Operands(NamedTuple):
    """How a kernel reads its operands; an axis is (operand, axis).

    Attributes:
        read: The operands that are arguments; shapes may name others.
        integers: Those that are parts of indices.
        exact: Those whose strides are not in units of `UNIT`: integers, and those read at one place in a row of a tile,
            or at one place for `MOST_UNITS` columns or more, such as scales of tiles.
        sizes: The axes that are sizes of results, or limits of indices that depend on integers.
        strides: The axes whose strides are arguments, in units of `UNIT` elements.
        adjacent: The axes whose elements are next to each other.
    """

    read: tuple[int, ...]
    integers: frozenset[int]
    exact: frozenset[int]
    sizes: tuple[tuple[int, int], ...]
    strides: tuple[tuple[int, int], ...]
    adjacent: frozenset[tuple[int, int]]

    def size(self, size: AxisSize) -> int | str:
        """A number, or the argument that is a size, or a part of it."""
        if isinstance(size, int):
            return size
        name = f"n{self.sizes.index((size.operand, size.axis))}"
        return name if size.by == 1 else f"({name} // {size.by})"

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of the arguments that are sizes and strides."""
        return (*(f"n{place}" for place in range(len(self.sizes))), *map(_stride, self.strides))


class PointwiseKernel(NamedTuple):
    """A generated kernel, and how its arguments follow from its operands.

    Attributes:
        function: The Triton function; takes results, operands, sizes, strides, then its constants.
        given: Its operands, sizes and strides.
        widths: Columns of a tile of each result.

    If it appends to a cache, it takes the arguments in `CACHE` after the results, and the constants in
    `CACHE_CONSTANTS` last.
    """

    function: Any
    given: Operands
    widths: tuple[int, ...]


@cache
def pointwise_kernel(
    expressions: tuple[str, ...], shapes: tuple[str, ...], adjacent: tuple[tuple[int, int], ...], append: bool = False
) -> PointwiseKernel:
    """The kernel of an operation; the same object for the same arguments.

    Args:
        expressions: One for each result.
        shapes: The shapes of the results, as in `kernel.pointwise`.
        adjacent: The axes of operands whose elements are next to each other, each as (operand, axis).
        append: Whether the first two results are keys and values that go to a cache.
    """
    made = [parse(text) for text in expressions]
    sizes = [read_shape(text) for text in shapes]
    given = _operands(made, sizes, adjacent)
    digest = hashlib.sha256("|".join([*expressions, *shapes, str((adjacent, append))]).encode()).hexdigest()[:16]
    name = f"pointwise_{digest}"
    text = _source(name, made, sizes, given, append)
    file = f"<{name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # where Triton reads the source
    scope: dict[str, Any] = {"__name__": __name__, "store_rows": store_rows, **SCOPE, **OVERLAP}
    exec(compile(text, file, "exec"), scope)
    function = triton.jit(scope[name], do_not_specialize=[*given.numbers, *(CACHE[-2:] if append else ())])
    widths = tuple(
        _width(shape, each.across or (append and place < 2))
        for place, (each, shape) in enumerate(zip(made, sizes, strict=True))
    )
    return PointwiseKernel(function, given, widths)


def _operands(
    made: Sequence[FusedExpression], shapes: Sequence[Sequence[AxisSize]], adjacent: Sequence[tuple[int, int]]
) -> Operands:
    reads: list[Read] = [*chain.from_iterable(each.elements for each in made)]
    reads += chain.from_iterable(each.loads for each in made)
    lengths = [(size.operand, size.axis) for shape in shapes for size in shape if not isinstance(size, int)]
    read = {source_of(each)[0] for each in reads}
    integers = frozenset(source_of(each)[0] for each in reads if not isinstance(each, Load))
    along = {
        source_of(each)[0] for one, shape in zip(made, shapes, strict=True) for each in one.loads
        if any(changes_within(size, f"i{len(shape) - 1}", MOST_UNITS) for size in each.index)
    }  # fmt: skip
    return Operands(
        read=tuple(sorted(read)),
        integers=integers,
        exact=frozenset(read) - along | integers,
        sizes=tuple(dict.fromkeys([*lengths, *(axis for read in reads for axis in computed_axes(read))])),
        strides=tuple(sorted({axis for read in reads for axis in moving_axes(read)} - {*adjacent})),
        adjacent=frozenset(adjacent),
    )


def _stride(axis: tuple[int, int]) -> str:
    return f"x{axis[0]}_{axis[1]}"


def _width(shape: Sequence[AxisSize], whole: bool) -> int:
    """Columns of a tile, which holds `whole` rows, or parts of them."""
    columns = shape[-1] if shape else 1
    if not isinstance(columns, int):
        return UNKNOWN_WIDTH
    width: int = triton.next_power_of_2(columns)
    return width if whole else min(width, WIDEST)


def _source(
    name: str, made: Sequence[FusedExpression], shapes: Sequence[Sequence[AxisSize]], given: Operands, append: bool
) -> str:  # fmt: skip
    """The source of the function."""
    results = [f"out{place}" for place in range(2 if append else 0, len(made))] + [*(CACHE if append else ())]
    operands = [f"x{place}" for place in given.read]
    constants = [
        f"{constant}: tl.constexpr" for constant in ("UNIT", "ELEMENTS", "WIDE", *(CACHE_CONSTANTS if append else ()))
    ]
    lines = [*_overlap(made), "program = tl.program_id(0)"]
    for place, (each, shape) in enumerate(zip(made, shapes, strict=True)):
        sizes = [given.size(size) for size in shape]
        cache = CACHE[place] if append and place < 2 else None
        width = _width(shape, each.across or cache is not None)
        lines += _Tile(place, each, sizes, width, given, cache).lines()
    parameters = ", ".join([*results, *operands, *given.numbers, *constants])
    return f"def {name}({parameters}):\n" + "".join(f"    {line}\n" for line in lines)


def _overlap(made: Sequence[FusedExpression]) -> list[str]:
    """How the kernel overlaps with others: the results may be scales of a weight only if they are FP32."""
    scales = any(each.dtype().itemsize > 2 for each in made)
    return ["inputs_ready()"] if scales else ["let_next_start()", "inputs_ready()"]


@dataclass(frozen=True)
class _Tile:
    """Writes the code of one result."""

    place: int
    made: FusedExpression
    sizes: Sequence[int | str]
    width: int
    given: Operands
    cache: str | None

    @property
    def column(self) -> str:
        """The index of the last axis."""
        return f"i{len(self.sizes) - 1}"

    def lines(self) -> Iterator[str]:
        """The code; `program` counts from the first tile of this result."""
        columns = self.sizes[-1] if self.sizes else 1
        rows = " * ".join(map(str, self.sizes[:-1])) or "1"
        yield f"rows{self.place} = {rows}"
        yield f"across{self.place} = tl.cdiv({columns}, {self.width})"
        yield f"tiles{self.place} = tl.cdiv(rows{self.place}, ELEMENTS // {self.width}) * across{self.place}"
        body = [*self.indices(columns), *self.computed(columns)]
        yield f"if (program >= 0) & (program < tiles{self.place}):"
        yield from (f"    {line}" for line in body)
        yield f"program -= tiles{self.place}"

    def indices(self, columns: int | str) -> Iterator[str]:
        """The indices of the elements of the tile."""
        yield f"row = program // across{self.place}"
        yield "row = row.to(tl.int64) if WIDE else row"
        yield f"row = row * (ELEMENTS // {self.width}) + tl.arange(0, ELEMENTS // {self.width})[:, None]"
        yield f"column = program % across{self.place} * {self.width} + tl.arange(0, {self.width})[None, :]"
        yield f"row_inside = row < rows{self.place}"
        yield f"column_inside = column < {columns}"
        rest = "row"
        for axis in reversed(range(len(self.sizes) - 1)):
            size = self.sizes[axis]
            yield f"i{axis} = {rest} % {size}" if axis else f"i{axis} = {rest}"
            rest = f"({rest} // {size})"
        if self.sizes:
            yield f"{self.column} = column"

    def computed(self, columns: int | str) -> Iterator[str]:
        """Loads, arithmetic, and the store."""
        reads = reads_of([*(what for _, what in self.made.definitions), self.made.result])
        names = {read: f"{'l' if isinstance(read, Load) else 'e'}{place}" for place, read in enumerate(reads)}
        index = IndexWriter(names)
        for read, guards in reads.items():
            yield f"{names[read]} = {self.load(read, needed(guards), index)}"
        if self.made.across:
            yield f"inside = {'None' if columns == self.width else 'column_inside'}"
            yield f"columns = {columns}"
        local = {name: f"v_{name}" for name, _ in self.made.definitions}
        writer = Writer(local, dict(self.made.definitions), "triton", names, index)
        for name, what in self.made.definitions:
            yield f"{local[name]} = {writer.text(what)}"
        result = f"({writer.text(self.made.result)})"
        if self.cache is not None:
            yield from self.appended(self.cache, result)
            return
        out, mask = f"out{self.place}", "row_inside & column_inside"
        yield f"tl.store({out} + row * {columns} + column, {result}.to({out}.dtype.element_ty), mask={mask})"

    def appended(self, cache: str, result: str) -> Iterator[str]:
        """Stores a row for each token and head of [batch, heads, tokens, size]; never outside the cache."""
        _, heads, _, size = self.sizes
        yield "slot = tl.load(slots + i0, mask=row_inside, other=-1)"
        yield "position = tl.load(lengths + i0, mask=row_inside, other=-1) + i2"
        yield "fits = (slot >= 0) & (slot < slot_count) & (position >= 0) & (position < capacity)"
        yield "held = capacity if RING is None else RING"
        yield "stored = position if RING is None else position % RING"
        yield f"places = (slot * {heads} + i1) * held + stored"
        yield f"values = tl.where(column_inside, {result}.to(tl.float32), 0.0)"
        arguments = ["values", cache, f"{cache}_scale", "places", "fits", "column", *ROUNDING, str(size)]
        yield f"store_rows({', '.join(arguments)})"

    def load(self, read: Read, guards: Sequence[Guard], writer: IndexWriter) -> str:
        """The elements of a read where one of the guards holds, of the shape of the tile or one that broadcasts."""
        operand, index = source_of(read)
        used = {each for size in index for each in indices(size)}
        used |= {each for guard in guards for less, _ in guard for each in _indices_of(less)}
        masks = ["row_inside"] if used - {self.column} else []
        masks += ["column_inside"] if self.column in used else []
        for axis in computed_axes(read):
            place = writer.text(index[axis[1]])
            masks.append(f"({place} >= 0) & ({place} < {self.given.size(AxisPart(*axis))})")
        other = "0" if not isinstance(read, Load) else 'float("nan")' if any(computed_axes(read)) else "0.0"
        address = self.address(operand, index, writer)
        if guards:
            masks.append(writer.any_of(guards))
            # The guards may vary where the address does not.
            address += " + (" + " + ".join([*(["row * 0"] if used - {self.column} else []),
                                           *(["column * 0"] if self.column in used else [])]) + ")"  # fmt: skip
        text = f"tl.load({address}, mask={' & '.join(masks)}, other={other})" if masks else f"tl.load({address})"
        return text if isinstance(read, Load) else f"{text}.to(tl.int64)"

    def address(self, operand: int, index: Sequence[Size], writer: IndexWriter) -> str:
        """The addresses of a read: first what is equal in a row, then what varies along it."""
        equal, varying = [f"x{operand}"], list[str]()
        unit = "" if operand in self.given.exact else " * UNIT"
        for axis, size in enumerate(index):
            step = "" if (operand, axis) in self.given.adjacent else f" * ({_stride((operand, axis))}{unit})"
            for term in terms_of(size):
                text = f"{writer.text(term)}{step}"
                (varying if self.column in indices(term) else equal).append(text)
        return " + ".join([f"({' + '.join(equal)})", *([f"({' + '.join(varying)})"] if varying else [])])


def _indices_of(less: Less) -> Iterator[str]:
    yield from indices(less.left)
    yield from indices(less.right)
