"""One operation while labels along the sequence are computed: the labels of its operands, and how to make its own."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from passes.analyses.sequence_labels import (
    TOKENS,
    Axis,
    Extent,
    Fact,
    Groups,
    Iota,
    Kind,
    Known,
    Label,
    Mixed,
    Mixes,
    Order,
    axis_of,
    counted,
    plain,
)
from qcompiler.ir import Argument, Op, Size, TensorType, Value

NOT_A_LABEL = {
    Order: "the order of all tokens, which is legal only as an index",
    Groups: "counts over all tokens, which are legal only as the groups of a grouped matmul",
    Iota: "numbers that count across tokens",
    Extent: "a size, which is legal only as a size",
}
"""Why a value that is not position-wise cannot be an ordinary operand."""


NAMES: Mapping[Kind, str] = {"batch": "row of the batch", "positions": "position", "sorted": "token"}


@dataclass(frozen=True)
class Site:
    """An operation and the facts known about its operands."""

    op: Op
    facts: Mapping[Value, Fact]
    length: Size
    """The number of positions."""

    # Operands

    def fact(self, value: Value) -> Fact:
        """What is known about an operand."""
        return self.facts[value]

    def label(self, arg: Argument | str) -> Label:
        """The label of a tensor operand, given as a value or by name; raises Mixes if it is not position-wise."""
        value = self.op[arg] if isinstance(arg, str) else arg
        fact = self.facts[value] if isinstance(value, Value) else Label(())
        if isinstance(fact, Label):
            return fact
        why = f"is not position-wise: {fact.why}" if isinstance(fact, Mixed) else f"is {NOT_A_LABEL[type(fact)]}"
        raise Mixes(f"{self.op.name} reads {value}, which {why}")

    def free(self, name: str) -> Label | None:
        """The label of an operand that must not depend on tokens; None if it is absent."""
        if (value := self.op.get(name)) is None:
            return None
        if not (label := self.label(value)).free:
            raise Mixes(f"the operand '{name}' of {self.op.name} depends on the tokens")
        return label

    @cached_property
    def tensors(self) -> list[Label]:
        """The labels of all tensor operands; raises Mixes if a size is used as a number."""
        return [self.label(value) for _, value in self.op.operands()]

    # Axes

    def axis(self, label: Label, name: str = "dim") -> int:
        """An argument that is an axis of a labeled value, as a nonnegative index."""
        axis = self.op.argument(name)
        if not isinstance(axis, int):
            raise Mixes(f"the axis of {self.op.name} is not fixed")
        return axis % max(1, len(label.axes))

    def axes(self, label: Label, name: str = "dim") -> list[int]:
        """An argument that is one axis or several, as nonnegative indices; all axes if it is absent or empty."""
        dims, rank = self.op.argument(name), len(label.axes)
        chosen = dims if isinstance(dims, tuple) and dims else range(rank) if dims in (None, ()) else (dims,)
        if not all(isinstance(axis, int) for axis in chosen):
            raise Mixes(f"the axes of {self.op.name} are not fixed")
        return [axis % max(1, rank) for axis in chosen if isinstance(axis, int)]

    def within(self, axis: Axis, what: str) -> None:
        """Raises Mixes if elements along an axis, which the operation combines, belong to different tokens.

        Args:
            axis: The axis.
            what: The verb and its preposition, such as "sums over".
        """
        if (name := counted(axis)) is not None:
            raise Mixes(f"{self.op.name} {what} {name}")

    # Results

    def shape(self, index: int = 0) -> tuple[Size, ...]:
        """The shape of a result."""
        return self.op.results[index].tensor.shape

    def fixed(self, size: Size) -> Axis:
        """An axis whose elements differ, so that its size must be fixed."""
        if not isinstance(size, int):
            raise Mixes(f"{self.op.name} makes an axis of {size} elements, a number that depends on the other tokens")
        return axis_of(size)

    def made(self, axes: Sequence[Axis], *sources: Label, known: Known = None) -> Label:
        """The label of a result with these axes that is computed from values with the labels `sources`.

        Raises Mixes if two axes say which token an element belongs to, as in a matrix of scores.
        """
        kinds = Counter(digit.kind for axis in axes for digit in axis if digit.kind in TOKENS)
        for kind in TOKENS:
            if kinds[kind] > 1 or (kind == "sorted" and 0 < kinds[kind] < kinds.total()):
                raise Mixes(f"{self.op.name} pairs each {NAMES[kind]} with every other {NAMES[kind]}")
        content = any(label.content for label in sources)
        return Label(tuple(axes), content, frozenset().union(*(label.numbers for label in sources)), known)

    def plain(self) -> tuple[Fact, ...]:
        """Labels of results that depend on nothing but their shapes."""
        return tuple(plain(value.tensor.shape) for value in self.op.results if isinstance(value.type, TensorType))


Answer = Fact | tuple[Fact, ...]


@dataclass(frozen=True)
class Row:
    """One row of the tables: why an operation is position-wise, and the facts of its results.

    Attributes:
        proof: Why each element of a result depends on one token only, under the conditions that `apply` checks.
        apply: Returns the fact of each result, or raises Mixes.
    """

    proof: str
    apply: Callable[[Site], Answer]


Table = Mapping[str, Row]
