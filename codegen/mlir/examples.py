"""Example tensors without data for the types of a graph, used for tracing."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from qcompiler.errors import QCompilerError
from qcompiler.ir import Graph, TensorType
from qcompiler.ir.ranges import Range
from qcompiler.ir.sizes import evaluate
from qcompiler.ir.types import NoneType, ScalarType, Type
from qcompiler.numerics.dtypes import torch_dtype

LEAST = 2
"""Torch specializes on the sizes 0 and 1; a trace for larger sizes is valid for these as well."""


class Examples:
    """Examples over the symbols of one graph.

    Attributes:
        mode: Mode in which tensors have no data.
    """

    def __init__(self, graph: Graph) -> None:
        self._environment = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self._environment)
        self._known: dict[Type, Any] = {}
        used = {name for op in graph for value in op.results for name in value.type.symbols}
        limits = {name: graph.symbols.get(name, Range()) for name in sorted(used | graph.symbols.keys())}
        self._sizes = {name: self._size(name, limits[name], 5 + 2 * n) for n, name in enumerate(limits)}

    def of(self, kind: Type) -> Any:
        """A tensor without data, a size (an integer if known), or None; the same object for equal types."""
        if kind not in self._known:
            self._known[kind] = self.fresh(kind)
        return self._known[kind]

    def fresh(self, kind: Type) -> Any:
        """As `of`, but a new tensor each time: a trace distinguishes its operands by identity."""
        match kind:
            case TensorType():
                with self.mode:
                    return torch.empty([self._at(size) for size in kind.shape], dtype=torch_dtype(kind.dtype))
            case NoneType():
                return None
            case ScalarType(kind="int", value=value) if value is not None:
                return self._at(value)
        raise QCompilerError("a number that is not a size cannot be passed on", got=kind)

    def check_guards(self) -> None:
        """Raises if a trace holds for some sizes only."""
        if guards := self._environment.guards:
            shown = [self._shown(str(guard.expr)) for guard in guards]
            guards.clear()
            raise QCompilerError("it behaves differently for other sizes", got=f"what holds where {', '.join(shown)}")

    def _at(self, size: Any) -> Any:
        return size if isinstance(size, int) else evaluate(size, self._sizes)

    def _size(self, name: str, limits: Range, wish: int) -> Any:
        """A symbolic size; `wish` is its value during a trace, within the limits."""
        from torch._dynamo.source import ConstantSource

        low = max(limits.low, LEAST)
        if limits.high is not None and limits.high <= low:
            return limits.high
        hint = max(low, wish) if limits.high is None else min(max(low, wish), limits.high)
        bounds: ValueRanges[Any] = ValueRanges(low, int_oo if limits.high is None else limits.high)
        symbol = self._environment.create_symbol(
            hint,
            ConstantSource(name),
            dynamic_dim=DimDynamic.DYNAMIC,
            constraint_dim=StrictMinMaxConstraint(False, bounds),
        )
        return self._environment.create_symintnode(symbol, hint=hint)

    @cached_property
    def _names(self) -> Mapping[str, str]:
        return {str(size.node.expr): name for name, size in self._sizes.items() if isinstance(size, torch.SymInt)}

    def _shown(self, text: str) -> str:
        for theirs, ours in self._names.items():
            text = text.replace(theirs, ours)
        return text
