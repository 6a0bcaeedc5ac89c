"""The fused expression of a pointwise region, from a recipe for each element that is read in it.

    n[i0, 0] = rsqrt(mean(x0 * x0)) over the row x[i0, i1];  y[i0, i1] = x[i0, i1] * n[i0, 0]
  ->
    m0 = mean(x0[i0, i1] * x0[i0, i1]); x0[i0, i1] * rsqrt(m0)

Reductions over rows are always definitions, since they need all elements of a row, even where `where` chooses some.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from passes.analyses.element_moves import Place, Source
from passes.fusing.region_expressions import rounded
from qcompiler.dialects.expression_nodes import (
    Call,
    Expression,
    IndexNumber,
    Less,
    Load,
    Name,
    Where,
    parts,
    rebuilt,
    renamed,
)
from qcompiler.dialects.fused_expression import FUNCTIONS, FusedExpression, parse
from qcompiler.ir import Size, Value
from qcompiler.numerics.dtypes import torch_dtype


@dataclass(frozen=True)
class Computed:
    """An element that a term computes from others.

    Attributes:
        text: The term, over x0, x1, ….
        direct: Operand -> the element it is, outside of reductions.
        rows: Operand -> the element of the row it is, in reductions.
    """

    text: str
    direct: tuple[tuple[str, Place], ...]
    rows: tuple[tuple[str, Place], ...] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        """The elements that it reads."""
        return tuple(place for _, place in (*self.direct, *self.rows))


@dataclass(frozen=True)
class Moved:
    """An element that is another one, or one of several."""

    sources: tuple[Source, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        """The elements it may be."""
        return tuple(place for _, place in self.sources)


@dataclass(frozen=True)
class Counted:
    """An element that is an integer expression, rounded to FP32.

    Attributes:
        number: Over indices and elements of integer tensors.
    """

    number: Size
    places: ClassVar[tuple[Place, ...]] = ()


Recipe = Computed | Moved | Counted


def expression_of_region(
    root: Place, recipes: Mapping[Place, Recipe], operands: Sequence[Value]
) -> tuple[FusedExpression, tuple[str, ...]]:
    """The expression of an element, and the integer tensors, such as "%ids", that are its operands after `operands`.

    Elements without a recipe are loads of operands, x0 the first of them.
    """
    writer = _Writer(recipes, operands)
    return writer.written(root), tuple(writer.integers)


def operands_of(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """The operands that a term reads outside and inside of reductions."""
    found: tuple[set[str], set[str]] = set(), set()

    def walk(what: Expression, inside: bool) -> None:
        if isinstance(what, Name):
            found[inside].add(what.name)
        reduces = isinstance(what, Call) and what.function in FUNCTIONS and FUNCTIONS[what.function].across
        for part in parts(what):
            walk(part, inside or reduces)

    walk(parse(text).result, False)
    return frozenset(found[0]), frozenset(found[1])


class _Writer:
    """An element that is read more than once, and each reduction, gets a name."""

    def __init__(self, recipes: Mapping[Place, Recipe], operands: Sequence[Value]) -> None:
        self.recipes, self.operands = recipes, operands
        self.integers: dict[str, str] = {}  # integer tensor -> operand
        self.definitions: dict[str, Expression] = {}
        self.made: dict[Place, Expression] = {}
        self.reads = Counter(place for recipe in recipes.values() for place in recipe.places)

    def written(self, root: Place) -> FusedExpression:
        """The expression, rounded to the element type of the root."""
        dtype = root.value.tensor.dtype
        result = rounded(self.expression(root), dtype)
        made = FusedExpression(tuple(self.definitions.items()), result)
        if made.dtype() == torch_dtype(dtype):
            return made
        return replace(made, result=Call("f32", (result,)))  # a number that was rounded, and widened again

    def expression(self, place: Place) -> Expression:
        """The expression of an element."""
        if place not in self.made:
            made = self._written(place)
            # A definition is evaluated everywhere, but a guarded element exists only where its guard holds.
            if isinstance(made, Call) and self.reads[place] > 1 and not place.guard:
                made = self._named(made)
            self.made[place] = made
        return self.made[place]

    def _written(self, place: Place) -> Expression:
        recipe = self.recipes.get(place)
        if recipe is None:
            return Load(f"x{self.operands.index(place.value)}", tuple(map(self._index, place.at)))
        if isinstance(recipe, Counted):
            return IndexNumber(self._index(recipe.number))
        if isinstance(recipe, Computed):
            direct = {name: self.expression(read) for name, read in recipe.direct}
            rows = {name: self.expression(read) for name, read in recipe.rows}
            return rounded(self._filled(parse(recipe.text).result, direct, rows), place.value.tensor.dtype)
        (_, last), *before = reversed(recipe.sources)
        made = self.expression(last)
        for less, source in before:
            assert less is not None  # only the last source has no condition
            condition = Less(self._index(less.left), self._index(less.right))
            made = Where(condition, self.expression(source), made)
        return made

    def _index(self, size: Size) -> Size:
        """An index whose integer tensors are operands."""
        next_name = f"x{len(self.operands) + len(self.integers)}"
        return renamed(size, lambda tensor: self.integers.setdefault(tensor, next_name))

    def _filled(self, what: Expression, direct: Mapping[str, Expression], rows: Mapping[str, Expression]) -> Expression:
        """A term with expressions for its operands; its reductions are definitions."""
        if isinstance(what, Name):
            return direct[what.name]
        if isinstance(what, Call) and what.function in FUNCTIONS and FUNCTIONS[what.function].across:
            return self._named(Call(what.function, tuple(self._filled(arg, rows, rows) for arg in what.args)))
        return rebuilt(what, tuple(self._filled(part, direct, rows) for part in parts(what)))

    def _named(self, what: Expression) -> Name:
        """The definition of an expression, made if there is none yet."""
        name = next((name for name, known in self.definitions.items() if known == what), None)
        if name is None:
            name = f"t{len(self.definitions)}"
            self.definitions[name] = what
        return Name(name)
