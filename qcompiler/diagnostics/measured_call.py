"""One call of a graph whose values error attribution compares, and what one changed value does to its outputs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from qcompiler.diagnostics.error_report import ErrorRow, sqnr_of
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Op, Value


@dataclass(frozen=True)
class Measured:
    """A row, and the result of its operation in the float model with the row's own error.

    Attributes:
        row: Without the error of the outputs.
        value: The result in the float graph.
        got: The same result if only this operation is quantized.
    """

    row: ErrorRow
    value: Value
    got: Tensor


@dataclass(frozen=True)
class Call:
    """A graph with its weights, and the inputs of one call."""

    graph: Graph
    inputs: Sequence[Any]

    def observed(self, wanted: Iterable[Value]) -> dict[Value, Tensor]:
        """Runs the graph, and returns these of its values."""
        wanted = set(wanted)
        pairs = zip(self.graph.inputs, self.inputs, strict=True)
        found = {value: given for value, given in pairs if value in wanted}

        def keep(op: Op, results: tuple[Any, ...]) -> None:
            found.update((value, out) for value, out in zip(op.results, results, strict=True) if value in wanted)

        interpret(self.graph, self.inputs, observe=keep)
        return found

    def error_of_outputs(self, replaced: Mapping[Value, Tensor]) -> float:
        """Returns the error of all outputs in dB if some values are replaced."""
        outputs = _tensors(interpret(self.graph, self.inputs, replaced=replaced))
        return sqnr_of(zip(self._outputs, outputs, strict=True))

    @cached_property
    def _outputs(self) -> list[Tensor]:
        return _tensors(interpret(self.graph, self.inputs))


def _tensors(outputs: Sequence[Any]) -> list[Tensor]:
    return [output for output in outputs if isinstance(output, Tensor)]
