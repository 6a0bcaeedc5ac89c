"""Finds where a compiled model first computes a NaN or an infinity, on one real call.

    print(qcompiler.find_nonfinite(fast, batch))

    %exp = aten.exp at model.py:12 in layers.3.mlp has 0 NaN and 5 Inf in 1024 elements, which reach
    %exp_q = kernel.quantize_static

INT8 codes with a static scale cannot represent a NaN or an infinity, so the model's result may not show them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompiler.diagnostics.whole_program import whole_program
from qcompiler.dialects.kernel import is_fused
from qcompiler.errors import InputError
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Op, Role, Value
from qcompiler.program.batches import as_call
from qcompiler.program.program import HasProgram
from qcompiler.runtime.caches import cache_types


@dataclass(frozen=True)
class NonFinite:
    """The first NaN or infinity; printing it gives a sentence.

    Attributes:
        name: The value that contains it.
        op: The operation that computes the value; "core.param" for a weight, "core.input" for an argument.
        where: Source line and module, if known.
        nan: Number of NaN elements.
        inf: Number of infinite elements.
        elements: Number of all elements.
        reaches: The first quantization that reads such elements, as `%name = operation`, or "output 0".
    """

    name: str
    op: str
    where: str
    nan: int
    inf: int
    elements: int
    reaches: str

    def __str__(self) -> str:
        place = f" {self.where}" if self.where else ""
        return (
            f"%{self.name} = {self.op}{place} has {self.nan} NaN and {self.inf} Inf in {self.elements} elements, which "
            f"reach {self.reaches}"
        )


def find_nonfinite(compiled: HasProgram, batch: Any) -> NonFinite | None:
    """Finds the origin of the first NaN or infinity in one call that reaches a quantization or an output.

    Runs the reference op by op on the model's device: slow, and equal to the compiled model up to the order of
    additions. Infinities that do not reach a quantization or an output, such as the -inf of an attention mask, are not
    reported.

    Args:
        compiled: The result of `qcompiler.compile` or `qcompiler.load`.
        batch: A tensor, a tuple of arguments, or a dict of arguments by name.

    Returns:
        The origin of the first non-finite elements that reach a quantization or an output; None if none do.

    Raises:
        InputError: The batch does not match the signature, or this is a decoder.
        QCompilerError: The model is sharded.
        CaptureError: The model is not captured yet.
    """
    program = whole_program(compiled, "cannot be searched")
    if cache_types(program.graph):
        fix = "Compile the model without a cache, and give it the token ids: qcompiler.compile(model, …)."
        raise InputError("a decoder cannot be searched, because its calls depend on its cache", fix=fix)
    inputs, graph = program.signature.flatten(*as_call(batch)), program.unfused()
    found = {value: _count(given) for value, given in zip(graph.inputs, inputs, strict=True)}

    def keep(op: Op, results: tuple[Any, ...]) -> None:
        found.update((value, _count(out)) for value, out in zip(op.results, results, strict=True))

    interpret(graph, inputs, observe=keep)
    reached = next(((value, by) for value, by in _checked(graph) if found[value].any), None)
    if reached is None:
        return None
    origin = _origin(reached[0], found)
    count = found[origin]
    return NonFinite(origin.name, origin.op.name, _where(origin.op), count.nan, count.inf, count.elements, reached[1])


@dataclass(frozen=True)
class _Count:
    """Numbers of NaN, infinite, and all elements of a value."""

    nan: int = 0
    inf: int = 0
    elements: int = 0

    @property
    def any(self) -> bool:
        return self.nan + self.inf > 0


def _count(value: Any) -> _Count:
    if isinstance(value, float):
        return _Count(int(math.isnan(value)), int(math.isinf(value)), 1)
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return _Count()
    wide = value.to(torch.float32) if value.dtype.itemsize == 1 else value
    nan = int(wide.isnan().sum())
    return _Count(nan, int((~wide.isfinite()).sum()) - nan, value.numel())


def _checked(graph: Graph) -> list[tuple[Value, str]]:
    """Returns the values that are quantized, and the outputs, in order; with their users."""
    read = [
        (op["x"], f"%{op.results[0].name} = {op.name}")
        for op in graph.ops()
        if op.role is Role.QUANTIZE and not is_fused(op)
    ]
    outputs = (value for value in graph.outputs if isinstance(value, Value))
    return read + [(value, f"output {index}") for index, value in enumerate(outputs)]


def _origin(value: Value, found: Mapping[Value, _Count]) -> Value:
    """Returns the value where the NaN of `value` first appear; without NaN, where its infinities first appear."""
    kind = "nan" if found[value].nan else "inf"
    while True:
        before = next((operand for _, operand in value.op.operands() if getattr(found[operand], kind)), None)
        if before is None:
            return value
        value = before


def _where(op: Op) -> str:
    parts = [f"at {op.loc.file}:{op.loc.line}"] if op.loc.file else []
    return " ".join([*parts, f"in {op.loc.module}"] if op.loc.module else parts)
