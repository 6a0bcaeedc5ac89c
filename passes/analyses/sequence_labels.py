"""Labels along the sequence: which token each element of a value belongs to, and how labels pass through operations.

    %x = aten.embedding(%w, %input_ids) : f32[s0, s1, 32]              [batch, positions, 32]
    %q = aten.transpose.int(%heads, 1, 2) : f32[s0, 4, s1, 8]          [batch, 4, positions, 8]
    %t = aten.view(%x, [-1, 32]) : f32[s0*s1, 32]                      [batch*positions, 32]
    %e = aten.index.Tensor(%t, [%token]) : f32[2*s0*s1, 32]            [sorted, 32]

The index along an axis is a number of several digits, most significant first: `batch*positions` counts the tokens of
one row after the other. Digits are followed explicitly, so two axes of the same size are never confused.

A value has a label if each of its elements depends on one token only, in the same way for all tokens: the value is
*position-wise*. An operation that would break this raises `Mixes`.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from qcompiler.ir import Op, Size, Value
from qcompiler.ir.sizes import Expr

Kind = Literal["batch", "positions", "sorted", "same", "other"]
TOKENS: tuple[Kind, ...] = ("batch", "positions", "sorted")
"""Digits that say which token an element belongs to. The value does not vary along "same"."""


@dataclass(frozen=True)
class Digit:
    """One digit of an axis.

    Attributes:
        kind: What the digit counts.
        size: The number of its values.
        order: For "sorted": the permutation by which the entries are sorted.
    """

    kind: Kind
    size: Size
    order: Value | None = None

    def __str__(self) -> str:
        return {"other": f"{self.size}", "same": f"={self.size}"}.get(self.kind, self.kind)


Axis = tuple[Digit, ...]
"""The digits of an axis; empty for an axis of size 1."""


@dataclass(frozen=True)
class Number:
    """Known elements: at position p, p + offset."""

    offset: int


@dataclass(frozen=True)
class Fill:
    """Known elements: all equal `value`."""

    value: float


@dataclass(frozen=True)
class Below:
    """Known elements: integers from 0 to limit - 1."""

    limit: int


@dataclass(frozen=True)
class Keys:
    """Known elements: integers from 0 to limit - 1 that ascend; `order` is the permutation that sorted them."""

    order: Value
    limit: int


Known = Number | Fill | Below | Keys | None


@dataclass(frozen=True)
class Label:
    """What a position-wise value depends on.

    Attributes:
        axes: The digits of each axis.
        content: Whether it depends on token ids. Otherwise it depends on position numbers, or on neither.
        numbers: The position numbers that it depends on: the values with `Number` that have no such operand.
        known: What is known about its elements.
    """

    axes: tuple[Axis, ...]
    content: bool = False
    numbers: frozenset[Value] = frozenset()
    known: Known = None

    @property
    def free(self) -> bool:
        """Whether it depends on neither token ids nor position numbers, such as a weight."""
        return not self.content and not any(map(has_tokens, self.axes))

    def __str__(self) -> str:
        return f"[{', '.join('*'.join(map(str, axis)) or '1' for axis in self.axes)}]"


@dataclass(frozen=True)
class Order:
    """A permutation of entries, such as the tokens' choices of experts sorted by expert: an index, not a result.

    Attributes:
        by: The value that holds the permutation: its element i is the entry at place i.
        entries: The digits of an entry.
        reach: The digits of the elements: fewer than `entries` after a division, which makes entries into tokens.
        inverse: Whether this is the inverse: element e is the place of entry e.
    """

    by: Value
    entries: Axis
    reach: Axis
    inverse: bool = False


@dataclass(frozen=True)
class Groups:
    """How many of the keys that `order` sorts equal 0, 1, … limit - 1; `ends` after the cumulative sum."""

    order: Value
    limit: int
    ends: bool = False


@dataclass(frozen=True)
class Iota:
    """The numbers 0, 1, … size - 1, where the size is neither fixed nor the number of positions."""

    size: Size


@dataclass(frozen=True)
class Extent:
    """A number computed from sizes: legal as a size, but not in arithmetic on tensors."""


@dataclass(frozen=True)
class Mixed:
    """A value without token ids that mixes positions, such as a mask: legal only while no result depends on it."""

    why: str
    op: Op


Fact = Label | Order | Groups | Iota | Extent | Mixed


class Mixes(Exception):
    """The operation is not position-wise: the reason."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Unplaced(Mixes):
    """A reason that does not name the operation yet."""


# Axes


def axis_of(size: Size) -> Axis:
    """An axis that has nothing to do with tokens; along one of symbolic size, the value does not vary."""
    if isinstance(size, int):
        return () if size == 1 else (Digit("other", size),)
    return (Digit("same", size),)


def plain(shape: Iterable[Size]) -> Label:
    """The label of a weight or of a constant fill."""
    return Label(tuple(map(axis_of, shape)))


def has_tokens(axis: Axis) -> bool:
    """Whether elements along the axis belong to different tokens."""
    return any(digit.kind in TOKENS for digit in axis)


def counted(axis: Axis) -> str | None:
    """What the axis counts, if a result that combines its elements is not position-wise; None if it is."""
    kinds = {digit.kind for digit in axis}
    if "sorted" in kinds or kinds >= {"batch", "positions"}:
        return "all tokens"
    if "positions" in kinds:
        return "the positions"
    if "batch" in kinds:
        return "the rows of the batch"
    sizes = [str(digit.size) for digit in axis if not isinstance(digit.size, int)]
    return f"an axis of {sizes[0]} elements, a number that depends on the other tokens" if sizes else None


def join(first: Axis, second: Axis) -> Axis:
    """The axis of an elementwise result; raises Mixes if it would pair elements of different tokens."""
    for one, other in ((first, second), (second, first)):
        if one == other or all(digit.kind == "same" for digit in one):
            return other
    raise Unplaced(f"it pairs elements along {_spelled(first)} with elements along {_spelled(second)}")


def _spelled(axis: Axis) -> str:
    return "*".join(map(str, axis))


def broadcast(*labels: Label) -> tuple[Axis, ...]:
    """The axes of an elementwise result, aligned on the right."""
    rank = max((len(label.axes) for label in labels), default=0)
    axes: list[Axis] = [()] * rank
    for label in labels:
        for at, axis in enumerate(label.axes, rank - len(label.axes)):
            axes[at] = join(axes[at], axis)
    return tuple(axes)


def regroup(axes: Sequence[Axis], shape: Sequence[Size]) -> tuple[Axis, ...]:
    """The axes after a reshape: the same digits in the same order; raises Mixes if an axis would cut through a token.

    [batch, positions, 32] to [s0*s1, 4, 8]  ->  [batch*positions, 4, 8]
    """
    digits = deque(merged(digit for axis in axes for digit in axis))
    made = []
    for size in shape:
        axis, left = [], size
        while left != 1:
            digit = digits.popleft() if digits else None
            if digit is not None and (rest := divide(left, digit.size)) is not None:
                axis.append(digit)
                left = rest
            elif digit is not None and digit.kind not in TOKENS and (rest := divide(digit.size, left)) is not None:
                axis.append(Digit(_kind(digit, left), left))
                digits.appendleft(Digit(_kind(digit, rest), rest))
                left = 1
            else:
                raise Unplaced("it splits or merges axes across the boundaries of tokens")
        made.append(merged(axis))
    return tuple(made)


def _kind(digit: Digit, size: Size) -> Kind:
    return "other" if isinstance(size, int) else digit.kind


def merged(digits: Iterable[Digit]) -> Axis:
    """The digits with neighbors of kind "other" multiplied into one."""
    made: list[Digit] = []
    for digit in digits:
        if made and made[-1].kind == digit.kind == "other":
            made[-1] = Digit("other", made[-1].size * digit.size)
        else:
            made.append(digit)
    return tuple(made)


def divide(size: Size, by: Size) -> Size | None:
    """size / by, if that is exact and both are integers or products of symbols; else None."""
    if size == by:
        return 1
    (whole, atoms), (part, others) = _product(size), _product(by)
    left = [*atoms]
    for atom in others:
        if atom not in left:
            return None
        left.remove(atom)
    if part == 0 or whole % part:
        return None
    return Expr(((tuple(left), whole // part),)) if left else whole // part  # type: ignore[arg-type]  # atoms of a size


def _product(size: Size) -> tuple[int, tuple[object, ...]]:
    """A size as an integer times atoms; a sum is one atom."""
    if isinstance(size, int):
        return size, ()
    if len(size.terms) > 1:
        return 1, (size,)
    atoms, factor = size.terms[0]
    return factor, atoms
