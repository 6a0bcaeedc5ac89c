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
loads of a tile come first, so that they wait for memory together; a load that `where` guards is masked. The kernel of
`state.fused_append` stores its first two results in a key-value cache instead.
"""

import hashlib
import linecache
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import triton

from codegen.fused_expressions import SCOPE, Writer
from codegen.kernels.append_to_cache import store_rows
from codegen.kernels.overlap import inputs_ready, let_next_start
from qcompiler.dialects.expression_nodes import Expression, Less, Load, Where, indices, parts
from qcompiler.dialects.fused_expression import FusedExpression, parse
from qcompiler.dialects.pointwise import AxisSize, read_shape
from qcompiler.ir.sizes import Call, Size

WIDEST = 1024
"""Maximum columns of a tile."""

OVERLAP = {"inputs_ready": inputs_ready, "let_next_start": let_next_start}
"""Names that the source of a kernel uses, besides `SCOPE`."""

UNKNOWN_WIDTH = 256
"""Columns of a tile if a result has any number of columns."""


Guard = tuple[tuple[Less, bool], ...]
"""Conditions that all have to hold, or not."""


CACHE = ("key", "value", "key_scale", "value_scale", "slots", "lengths", "slot_count", "capacity")
ROUNDING = ("AMAX_FLOOR", "TOP", "RECIPROCAL", "UE8M0")


class PointwiseKernel(NamedTuple):
    """A generated kernel, and how its arguments follow from its operands.

    Attributes:
        function: The Triton function; takes results, operands, sizes, strides, then its constants.
        sizes: The axes of operands that are sizes of results.
        strides: The axes of operands whose strides it takes, in units of `UNIT` elements.
        widths: Columns of a tile of each result.

    If it appends to a cache, it takes the arguments in `CACHE` after the results, and the constants in `ROUNDING` last.
    """

    function: Any
    sizes: tuple[tuple[int, int], ...]
    strides: tuple[tuple[int, int], ...]
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
    named = tuple(dict.fromkeys(size for shape in sizes for size in shape if not isinstance(size, int)))
    loads = [load for each in made for load in each.loads]
    strides = tuple(sorted({pair for load in loads for pair in _moving(load)} - {*adjacent}))
    digest = hashlib.sha256("|".join([*expressions, *shapes, str((adjacent, append))]).encode()).hexdigest()[:16]
    name = f"pointwise_{digest}"
    text = _source(name, made, sizes, named, strides, {*adjacent}, append)
    file = f"<{name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # where Triton reads the source
    scope: dict[str, Any] = {"__name__": __name__, "store_rows": store_rows, **SCOPE, **OVERLAP}
    exec(compile(text, file, "exec"), scope)
    numbers = [*(f"n{place}" for place in range(len(named))), *map(_stride, strides)]
    function = triton.jit(scope[name], do_not_specialize=[*numbers, *(CACHE[-2:] if append else ())])
    widths = tuple(
        _width(shape, each.across or (append and place < 2))
        for place, (each, shape) in enumerate(zip(made, sizes, strict=True))
    )
    return PointwiseKernel(function, named, strides, widths)


def _moving(load: Load) -> Iterator[tuple[int, int]]:
    """The axes along which the index of a load is not zero."""
    return ((int(load.name[1:]), axis) for axis, index in enumerate(load.index) if index != 0)


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
    name: str, made: Sequence[FusedExpression], shapes: Sequence[Sequence[AxisSize]],
    named: Sequence[tuple[int, int]], strides: Sequence[tuple[int, int]], adjacent: set[tuple[int, int]], append: bool,
) -> str:  # fmt: skip
    """The source of the function."""
    results = [f"out{place}" for place in range(2 if append else 0, len(made))] + [*(CACHE if append else ())]
    operands = sorted({load.name for each in made for load in each.loads}, key=lambda name: int(name[1:]))
    numbers = [*(f"n{place}" for place in range(len(named))), *map(_stride, strides)]
    constants = [
        f"{constant}: tl.constexpr" for constant in ("UNIT", "ELEMENTS", "WIDE", *(ROUNDING if append else ()))
    ]
    lines = [*_overlap(made), "program = tl.program_id(0)"]
    for place, (each, shape) in enumerate(zip(made, shapes, strict=True)):
        sizes = [size if isinstance(size, int) else f"n{named.index(size)}" for size in shape]
        cache = CACHE[place] if append and place < 2 else None
        width = _width(shape, each.across or cache is not None)
        lines += _Tile(place, each, sizes, width, adjacent, cache).lines()
    parameters = ", ".join([*results, *operands, *numbers, *constants])
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
    adjacent: set[tuple[int, int]]
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
        guards: dict[Load, dict[Guard, None]] = {}
        for what in (*(what for _, what in self.made.definitions), self.made.result):
            for load, guard in _guarded(what, ()):
                guards.setdefault(load, {})[guard] = None
        loads = {load: f"l{place}" for place, load in enumerate(guards)}
        for load, name in loads.items():
            yield f"{name} = {self.load(load, () if () in guards[load] else tuple(guards[load]))}"
        if self.made.across:
            yield f"inside = {'None' if columns == self.width else 'column_inside'}"
            yield f"columns = {columns}"
        local = {name: f"v_{name}" for name, _ in self.made.definitions}
        writer = Writer(local, dict(self.made.definitions), "triton", loads, condition)
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
        yield f"places = (slot * {heads} + i1) * capacity + position"
        yield f"values = tl.where(column_inside, {result}.to(tl.float32), 0.0)"
        arguments = ["values", cache, f"{cache}_scale", "places", "fits", "column", *ROUNDING, str(size)]
        yield f"store_rows({', '.join(arguments)})"

    def load(self, load: Load, guards: Sequence[Guard]) -> str:
        """The elements of a load where one of the guards holds, of the shape of the tile or one that broadcasts."""
        read = {index for size in load.index for index in indices(size)}
        read |= {index for guard in guards for less, _ in guard for index in _indices_of(less)}
        masks = ["row_inside"] if read - {self.column} else []
        masks += ["column_inside"] if self.column in read else []
        if guards:
            masks.append(f"({' | '.join(map(_guard_text, guards))})")
            # The guards may vary where the address does not.
            whole = " + ".join([*(["row * 0"] if read - {self.column} else []),
                                *(["column * 0"] if self.column in read else [])])  # fmt: skip
            return f"tl.load({self.address(load)} + ({whole}), mask={' & '.join(masks)}, other=0.0)"
        if not masks:
            return f"tl.load({self.address(load)})"
        return f"tl.load({self.address(load)}, mask={' & '.join(masks)}, other=0.0)"

    def address(self, load: Load) -> str:
        """The addresses of a load: first what is equal in a row, then what varies along it."""
        operand = int(load.name[1:])
        equal, varying = [load.name], list[str]()
        for axis, index in enumerate(load.index):
            step = "" if (operand, axis) in self.adjacent else f" * ({_stride((operand, axis))} * UNIT)"
            for term in _terms(index):
                text = f"{_text(term)}{step}"
                (varying if self.column in indices(term) else equal).append(text)
        return " + ".join([f"({' + '.join(equal)})", *([f"({' + '.join(varying)})"] if varying else [])])


def _guarded(what: Expression, guard: Guard) -> Iterator[tuple[Load, Guard]]:
    """The loads of an expression, each with the conditions under which it is evaluated."""
    if isinstance(what, Load):
        yield what, guard
    elif isinstance(what, Where):
        yield from _guarded(what.then, (*guard, (what.condition, True)))
        yield from _guarded(what.other, (*guard, (what.condition, False)))
    else:
        for part in parts(what):
            yield from _guarded(part, guard)


def _guard_text(guard: Guard) -> str:
    return f"({' & '.join(f'({condition(less, holds)})' for less, holds in guard)})"


def condition(less: Less, holds: bool = True) -> str:
    """A condition, or its opposite, as Triton code."""
    return f"{_text(less.left)} {'<' if holds else '>='} {_text(less.right)}"


def _indices_of(less: Less) -> Iterator[str]:
    yield from indices(less.left)
    yield from indices(less.right)


def _terms(size: Size) -> list[Size]:
    """The terms of a sum."""
    if isinstance(size, int):
        return [size] if size else []
    return [type(size)(((atoms, factor),)) if atoms else factor for atoms, factor in size.terms]


def _text(size: Size) -> str:
    """An index expression as Triton code; operands of // and % are not negative."""
    if isinstance(size, int):
        return str(size)
    terms = []
    for atoms, factor in size.terms:
        factors = [_function(atom) if isinstance(atom, Call) else atom for atom in atoms]
        terms.append(" * ".join([*([] if factor == 1 and atoms else [str(factor)]), *factors]))
    return f"({' + '.join(terms)})"


def _function(atom: Call) -> str:
    inner, by = atom.args
    return f"({_text(inner)} {'//' if atom.function == 'floordiv' else '%'} {by})"
