"""The errors of quantized linears.

linear(dequantize(quantize(x)), dequantize(quantize(w)))   against   linear(x, w)

All errors cover the matmul alone, even if it is fused with an epilogue.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from passes.fusing.merge_linears import MergeLinears
from qcompiler import numerics
from qcompiler.diagnostics.error_report import ErrorRow, sqnr
from qcompiler.diagnostics.measured_call import Call, Measured
from qcompiler.dialects.quant import LEVELS, is_static, out_dtype_of
from qcompiler.interpreter import evaluate
from qcompiler.ir import Graph, Op, Role, Value
from qcompiler.numerics.dtypes import torch_dtype


def quantized_linears(graph: Graph) -> list[Op]:
    """Returns the quantized linears of a graph whose linears are fused; grouped ones are not measured."""
    return [op for op in graph.ops() if op.role is Role.QUANTIZED_MATMUL and op.get("offsets") is None]


def linear_errors(quantized: Call, exact: Call, ops: Sequence[Op]) -> Iterator[Measured]:
    """Yields the errors of each linear, and of each linear that was merged into one.

    Args:
        quantized: A call of the quantized graph.
        exact: The same call of the float model.
        ops: Quantized linears.
    """
    values = _float_values(exact, [op.result.name for op in ops])
    operands = _operands(quantized, ops)
    for op in ops:
        yield from _rows(_Quantized(op, operands), quantized.graph, exact.graph, values)


def _float_values(call: Call, names: Sequence[str]) -> dict[Value, Tensor]:
    """Returns the inputs and outputs of the float linears called `names`."""
    wanted = {call.graph[name] for name in names}
    return call.observed(wanted | {_linear(value)["input"] for value in wanted})


def _linear(value: Value) -> Op:
    """Returns the float linear that computes `value`, looking through the cast that the quantized linear absorbed."""
    return value.op["x"].op if value.op.role is Role.CAST else value.op


def _operands(call: Call, ops: Sequence[Op]) -> dict[Value, Tensor]:
    """Returns the inputs of quantized linears, before and after quantization, as the reference computes them."""
    wanted = {value for op in ops for _, value in op.operands()}
    return call.observed(wanted | {value for op in ops for _, value in op["x"].op.operands()})


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


def _rows(quantized: _Quantized, graph: Graph, float_graph: Graph, exact: Mapping[Value, Tensor]) -> Iterator[Measured]:
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
        errors = [sqnr(want[..., columns], got[..., columns]) for want, got in pairs]
        row = ErrorRow(part.result.name, part.loc.module, own=errors[0], inherited=errors[1], kernel=errors[2])
        alone = y.clone()
        alone[..., columns] = own[..., columns]
        yield Measured(row, output, alone)


def _constant(value: Value, graph: Graph) -> Tensor:
    """Returns a constant of a graph as FP32."""
    found: Tensor = evaluate(value.op, graph)[value.index]
    return found.to(torch.float32)
