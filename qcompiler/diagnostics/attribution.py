"""Error attribution: the own, inherited and kernel error of each quantized operation.

    print(qcompiler.attribute_error(fast, batch))

Each number is a signal-to-quantization-noise ratio in dB, 10 · log10(|y|² / |y' - y|²), over the operation's output y
in the float model. Higher is better; infinity means equal:

    own          y' is the quantized operation on the float model's input: the error of its own quantization
    inherited    y' is the float operation on the quantized model's input: the error from upstream operations
    kernel       y and y' are the reference and the kernel on equal input: the error of code generation

All three cover the matmul alone, even if it is fused with an epilogue.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from passes.fusing.merge_linears import MergeLinears
from passes.quantizing.calibrate import Calibrate
from qcompiler import numerics
from qcompiler.dialects.quant import LEVELS, is_static, out_dtype_of
from qcompiler.errors import InputError, PassError
from qcompiler.interpreter import evaluate, interpret
from qcompiler.ir import Graph, Op, Role, Value
from qcompiler.numerics.dtypes import torch_dtype
from qcompiler.pass_manager.pipeline import Effect, Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.program.batches import as_call
from qcompiler.program.program import HasProgram, Program, capture_model


@dataclass(frozen=True)
class ErrorRow:
    """One quantized operation; the errors are in dB.

    Attributes:
        name: The value that it computes.
        module: Its module path in the model.
        own: Error of quantizing its operands, on the float model's input.
        inherited: Error caused by its input alone.
        kernel: Difference between kernel and reference; infinity if they are equal.
    """

    name: str
    module: str
    own: float
    inherited: float
    kernel: float


@dataclass(frozen=True)
class ErrorReport:
    """One row for each quantized operation, the worst own error first; printing it gives a table."""

    rows: tuple[ErrorRow, ...]

    def __str__(self) -> str:
        table = Table(box=SIMPLE, pad_edge=False)
        for heading in ("operation", "module", "own dB", "inherited dB", "kernel dB"):
            table.add_column(heading, justify="right" if heading.endswith("dB") else "left", overflow="fold")
        for row in self.rows:
            numbers = (_shown(number) for number in (row.own, row.inherited, row.kernel))
            table.add_row(f"%{row.name}", row.module, *numbers)
        console = Console(width=120, no_color=True, force_terminal=False, legacy_windows=False)
        with console.capture() as capture:
            console.print(table, soft_wrap=False)
        return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())

    def to_json(self) -> str:
        """Returns the rows as JSON, in order; null is infinity, which means no error."""
        rows = [
            {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in row.items()}
            for row in map(asdict, self.rows)
        ]
        return json.dumps(rows, indent=2, allow_nan=False)


def attribute_error(compiled: HasProgram, batch: Any, model: Any = None) -> ErrorReport:
    """Computes the own, inherited and kernel error of each quantized operation, on one real call.

    Captures the float model again, because a compiled model does not keep the float weights.

    Args:
        compiled: The result of `qcompiler.compile`.
        batch: A tensor, a tuple of arguments, or a dict of arguments by name.
        model: The float model; by default the original model, if it is still in memory.

    Raises:
        InputError: The float model has been freed, or the batch does not match the signature.
        PassError: The pipeline does not fuse quantized linears.
    """
    program, (args, kwargs) = compiled.program, as_call(batch, 0)
    float_graph = _float_graph(program, args, kwargs, program.original.again() if model is None else model)
    inputs, graph = program.signature.flatten(args, kwargs), program.unfused()
    ops = [op for op in graph.ops() if op.role is Role.QUANTIZED_MATMUL and op.get("offsets") is None]
    if not ops:
        need = "a pipeline with fuse-linear in it"
        raise PassError("the graph has no fused quantized linear to attribute errors to", need=need)
    with torch.no_grad():
        exact = _float_values(float_graph, inputs, [op.result.name for op in ops])
        operands = _operands(graph, inputs, ops)
        rows = [row for op in ops for row in _rows(_Quantized(op, operands), graph, float_graph, exact)]
    return ErrorReport(tuple(sorted(rows, key=lambda row: row.own)))


def _float_graph(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], model: Any) -> Graph:
    """Returns the float model's graph before the first quantizing pass: smoothed, but not quantized."""
    if model is None:
        fix = "Keep the original model, or pass it: attribute_error(compiled, batch, model)."
        raise InputError("the float model has been freed", fix=fix)
    captured = capture_model(model, args, kwargs, program.settings)
    captured.graph.calibration = program.calibration()
    steps = list(takewhile(lambda step: step.effect is not Effect.LOSSY, program.settings.passes))
    # Calibration is already done; statistics of smoothed values would matter only to quantizing passes.
    run_pipeline(Pipeline(tuple(step for step in steps if not isinstance(step, Calibrate))), captured.graph)
    return captured.graph


def _float_values(graph: Graph, inputs: Sequence[Any], names: Sequence[str]) -> dict[Value, Tensor]:
    """Returns the inputs and outputs of the linears called `names`."""
    wanted = {graph[name] for name in names}
    wanted |= {_linear(value)["input"] for value in wanted}
    return _observed(graph, inputs, wanted)


def _linear(value: Value) -> Op:
    """Returns the float linear that computes `value`, looking through the cast that the quantized linear absorbed."""
    return value.op["x"].op if value.op.role is Role.CAST else value.op


def _operands(graph: Graph, inputs: Sequence[Any], ops: Sequence[Op]) -> dict[Value, Tensor]:
    """Returns the inputs of quantized linears, before and after quantization, as the reference computes them."""
    wanted = {value for op in ops for _, value in op.operands()}
    wanted |= {value for op in ops for _, value in op["x"].op.operands()}
    return _observed(graph, inputs, wanted)


def _observed(graph: Graph, inputs: Sequence[Any], wanted: set[Value]) -> dict[Value, Tensor]:
    found = {value: given for value, given in zip(graph.inputs, inputs, strict=True) if value in wanted}

    def keep(op: Op, results: tuple[Any, ...]) -> None:
        found.update((value, out) for value, out in zip(op.results, results, strict=True) if value in wanted)

    interpret(graph, inputs, observe=keep)
    return found


@dataclass(frozen=True)
class _Quantized:
    """One quantized linear, with its operands in the quantized model."""

    op: Op
    operands: Mapping[Value, Tensor]

    @property
    def quantize(self) -> Op:
        """The operation that quantizes its input."""
        return self.op["x"].op

    @property
    def weight(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The weight's codes and scales, and the bias."""
        bias = self.op.get("bias")
        return (
            self.operands[self.op["w"]],
            self.operands[self.op["w_scale"]],
            None if bias is None else self.operands[bias],
        )

    def codes(self, x: Tensor) -> tuple[Tensor, ...]:
        """Quantizes another input, to which any prescale is already applied, into codes and scales."""
        quantize = self.quantize
        if is_static(quantize):
            scale = self.operands[self.op["x_scale"]]
            return numerics.quantize_static(x, scale, quantize.format()), scale
        return numerics.quantize(x, quantize.format())

    def matmul(self, codes: Tensor, scale: Tensor, *rest: Tensor) -> Tensor:
        """Returns the reference output for the given codes."""
        x_format, w_format = self.op.format("x_format"), self.op.format("w_format")
        levels = {name: self.named(name) for name in (f"{side}_{level}" for level in LEVELS for side in "xw")}
        if rest:
            levels[f"x_{x_format.level}"] = rest[0]
        return numerics.scaled_linear(
            codes,
            scale,
            *self.weight,
            *levels.values(),
            x_format=x_format,
            w_format=w_format,
            out_dtype=self.out_dtype,
        )

    def named(self, name: str) -> Tensor | None:
        """Returns an operand of the linear by name."""
        value = self.op.get(name)
        return None if value is None else self.operands[value]

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype of the output."""
        return torch_dtype(out_dtype_of(self.op))

    @property
    def met(self) -> Tensor:
        """The input in the quantized model, FP32, after any prescale."""
        x = self.operands[self.quantize["x"]].to(torch.float32)
        prescale = self.quantize.get("prescale")
        return x if prescale is None else x * self.operands[prescale].to(torch.float32)

    def by_kernel(self) -> Tensor:
        """Returns the output that the host module's operators compute from the reference's codes."""
        codes, scale = self.operands[self.op["x"]], self.operands[self.op["x_scale"]]
        if self.op.name.startswith("quant."):  # there is no kernel: the reference itself runs
            return self.matmul(codes, scale)
        blocks = self.op.format("x_format").block, self.op.format("w_format").block
        found: Tensor = torch.ops.qcompiler.scaled_linear(codes, scale, *self.weight, *blocks, self.out_dtype)
        return found


def _rows(quantized: _Quantized, graph: Graph, float_graph: Graph, exact: Mapping[Value, Tensor]) -> Iterator[ErrorRow]:
    """Yields one row, or one for each linear that merge-linears merged into this one."""
    op = quantized.op
    output = float_graph[op.result.name]
    linear = _linear(output)
    x, y = exact[linear["input"]], exact[output]
    weight, bias = _constant(linear["weight"], float_graph), linear.get("bias")
    offset = None if bias is None else _constant(bias, float_graph)
    own, inherited = (
        quantized.matmul(*quantized.codes(x)),
        functional.linear(quantized.met, weight, offset).to(y.dtype),
    )
    reference = quantized.matmul(quantized.operands[op["x"]], quantized.operands[op["x_scale"]])
    kernel = quantized.by_kernel()
    merged = [user for user in graph.users(op.result) if user.loc.made_by == MergeLinears.name]
    for part in merged or [op]:
        columns = slice(part.argument("start"), part.argument("end")) if merged else slice(None)
        pairs = ((y, own), (y, inherited), (reference, kernel))
        numbers = (sqnr(want[..., columns], got[..., columns]) for want, got in pairs)
        yield ErrorRow(part.result.name, part.loc.module, *numbers)


def _constant(value: Value, graph: Graph) -> Tensor:
    """Returns a constant of a graph as FP32."""
    found: Tensor = evaluate(value.op, graph)[value.index]
    return found.to(torch.float32)


def sqnr(y: Tensor, other: Tensor) -> float:
    """Returns 10 · log10(|y|² / |other - y|²), in FP64: infinity for equal tensors, -infinity if only `y` is zero."""
    signal, noise = (float(t.to(torch.float64).square().sum()) for t in (y, other.to(torch.float64) - y))
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _shown(number: float) -> str:
    return "exact" if number == math.inf else f"{number:.1f}"
