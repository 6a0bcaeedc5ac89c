"""Evaluates index expressions and conditions at given indices, for tests."""

from collections.abc import Mapping

from torch import Tensor

from passes.analyses.index_expressions import Element
from passes.analyses.inequalities import Condition
from passes.analyses.real_numbers import Real
from qcompiler.ir import Size
from qcompiler.ir.sizes import FUNCTIONS, Call


class At:
    """Numbers for the symbols and unknowns of an expression."""

    def __init__(self, bindings: Mapping[str, int], tensors: Mapping[str, Tensor] | None = None) -> None:
        self.bindings, self.tensors = bindings, tensors or {}

    def size(self, size: Size) -> int:
        if isinstance(size, int):
            return size
        total = 0
        for atoms, factor in size.terms:
            for atom in atoms:
                factor *= self.bindings[atom] if isinstance(atom, str) else self.call(atom)
            total += factor
        return total

    def call(self, call: Call) -> int:
        args = [self.size(arg) for arg in call.args]
        if call.function in FUNCTIONS:
            return FUNCTIONS[call.function](*args)
        tensor = self.tensors[call.function.removeprefix("%")]
        inside = all(0 <= arg < size for arg, size in zip(args, tensor.shape, strict=True))
        return int(tensor[tuple(args)]) if inside else 0  # the element of a case that does not apply

    def holds(self, condition: Condition) -> bool:
        return any(all(self.size(size) >= 0 for size in each) for each in condition)

    def element(self, element: Element) -> float:
        (number,) = (number for condition, number in element.cases if self.holds(condition))
        assert not isinstance(number, Real), "it ignores rounding"
        return number if isinstance(number, float) else self.size(number)
