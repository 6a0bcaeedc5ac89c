"""Inserts quantize and dequantize around each matmul with a constant weight, in any granularity.

    %y = aten.linear(%x, %w, %b) : bf16[s0, 512]
  ->
    %x_q, %x_s = quant.quantize(%x) {format = #fp8_row}
    %x_dq = quant.dequantize(%x_q, %x_s) {format = #fp8_row, out_dtype = f32}
    %w_q, %w_s = quant.quantize(%w) {format = #fp8_row}
    %w_dq = quant.dequantize(%w_q, %w_s) {format = #fp8_row, out_dtype = f32}
    %b_f32 = aten._to_copy(%b) {dtype = f32}
    %y_f32 = aten.linear(%x_dq, %w_dq, %b_f32) : f32[s0, 512]
    %y = aten._to_copy(%y_f32) {dtype = bf16}

With a static scale, from calibration or stored beside the weight in its checkpoint, the activation becomes
    %x_s = core.param() {name = "x.scale"} : f32[1, 1]
    %x_q = quant.quantize_static(%x, %x_s) {format = #fp8_tensor}

`grouped` and `batched` handle matmuls of groups of rows, such as the experts of a mixture.

The graph still runs in plain torch and gives the quantized model's results; fuse-linear then makes it fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from passes.analyses.candidates import (
    NOT_CANDIDATES,
    OTHER_READERS,
    has_lookup,
    is_stored_quantized,
    why_skipped,
)
from passes.analyses.constants import cast, is_weight, new_parameter
from passes.analyses.layers import naming_pattern, requested_layers
from passes.quantizing.batched import BATCHED, QuantizeBatched
from passes.quantizing.calibrate import saw_no_token, statistics_of
from passes.quantizing.grouped import QuantizeGrouped
from passes.quantizing.scheme_options import SchemeOptions
from qcompiler import numerics
from qcompiler.dialects.aten import GROUPED, MATMULS
from qcompiler.dialects.quant import x_scale_of
from qcompiler.errors import PassError
from qcompiler.ir import Argument, DType, Format, Graph, Match, Missed, Op, Rewriter, Rule, TensorType, Value
from qcompiler.pass_manager.pipeline import Effect

SHOWN = 3
"""Maximum number of layers in an error."""


@dataclass(frozen=True)
class QuantizeLinear(Rule):
    """linear(x, w, b)  ->  linear(dequantize(quantize(x)), dequantize(quantize(w)), b), in FP32"""

    options: SchemeOptions
    root: ClassVar[tuple[str, ...]] = tuple(
        name for name in (*MATMULS, *OTHER_READERS) if name not in (*GROUPED, *BATCHED)
    )

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if reason := self.options.why_not(op, graph):
            return reason
        return {"x": op["input"], "w": op["weight"], "bias": op.get("bias"), "note": self.note(op, graph)}

    def note(self, op: Op, graph: Graph) -> str:
        """The remark on a layer that is quantized because a pattern names it; empty for any other."""
        if (skipped := why_skipped(op, graph)) is None:
            return ""
        kept = "; the embedding keeps its weight in float" if has_lookup(op["weight"], graph) else ""
        return f"named by '{self.options.naming_pattern(op, graph)}', although {skipped.why}{kept}"

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, w: Value, bias: Value | None, note: str, **_: Any) -> None:
        options = self.options
        if note:
            rewriter.graph.remark(op.result, note)
        scale = self.static_scale(rewriter.graph, x, w) if options.static else None
        if scale is None:
            quantized = self.by_own_scale(rewriter, x, options.x_format)
        else:
            quantized = self.by_given_scale(rewriter, x, scale)
        args = [
            self.dequantized(rewriter, x, quantized, options.x_format),
            self.dequantized(rewriter, w, self.weight(rewriter, w), options.w_format),
        ]
        if bias is not None:
            args.append(cast(rewriter, bias, DType.f32, f"{bias.name}_f32"))
        kind = op.result.tensor
        linear = rewriter.insert(
            "aten.linear", *args, types=[TensorType(DType.f32, kind.shape)], names=[f"{op.result.name}_f32"]
        )
        rewriter.replace(op, cast(rewriter, linear.result, kind.dtype, op.result.name))
        rewriter.erase_unread(w.op)

    def weight(self, rewriter: Rewriter, w: Value) -> tuple[Argument, ...]:
        """The codes and scales of a weight; the stored ones if it is quantized already."""
        return w.op.args if is_stored_quantized(w) else self.by_own_scale(rewriter, w, self.options.w_format)

    def by_own_scale(self, rewriter: Rewriter, value: Value, format: Format) -> tuple[Argument, ...]:
        """`value` quantized with computed scales, as the operands of `quant.dequantize`."""
        names = [value.name + suffix for suffix in format.suffixes]
        codes, scale, *level = rewriter.insert("quant.quantize", value, attrs={"format": format}, names=names).results
        return (codes, scale, *level) if format.symmetric else (codes, scale, None, *level)

    def by_given_scale(self, rewriter: Rewriter, value: Value, wanted: Tensor) -> tuple[Argument, ...]:
        """`value` quantized with a static scale; users that need the same one share it."""
        graph, attrs = rewriter.graph, {"format": self.options.x_format}
        users = graph.users(value)
        twins = (op for op in users if op.name == "quant.quantize_static" and op.attrs == attrs)
        twin = next((op for op in twins if is_weight(graph, op["scale"], wanted)), None)
        if twin is None:
            scale = new_parameter(rewriter, f"{value.name}.scale", wanted, f"{value.name}_s")
        else:
            scale = twin["scale"]
            if users.index(rewriter.anchor) < users.index(twin):  # the other linear was rewritten first
                graph.move(scale.op, before=rewriter.anchor)
        codes = rewriter.insert("quant.quantize_static", value, scale, attrs=attrs, names=[f"{value.name}_q"])
        return codes.result, scale

    def static_scale(self, graph: Graph, value: Value, weight: Value) -> Tensor | None:
        """One scale for all calls, shaped like one block's scale; None if calibration saw no token of `value`.

        A checkpoint scale for the input of `weight` is used unchanged; without one, calibration computes it.
        """
        options, format = self.options, self.options.x_format
        if (stored := x_scale_of(weight)) is not None:
            scale = torch.tensor(stored, dtype=torch.float32)
        elif saw_no_token(graph, value):
            return None
        else:
            seen = statistics_of(graph, value)
            amax = seen.amax(options.observer, "tensor", percentile=options.percentile, format=format)
            scale = numerics.scale_of(amax, format)
        return scale.reshape(numerics.scale_shape([1] * len(value.tensor.shape), format.block))

    def dequantized(self, rewriter: Rewriter, value: Value, quantized: tuple[Argument, ...], format: Format) -> Value:
        """FP32 again."""
        attrs: dict[str, Argument] = {"format": format, "out_dtype": DType.f32}
        return rewriter.insert("quant.dequantize", *quantized, attrs=attrs, names=[f"{value.name}_dq"]).result


@dataclass(frozen=True)
class Quantize(SchemeOptions):
    """linear(x, w)  ->  linear(dequantize(quantize(x)), dequantize(quantize(w)))."""

    name: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = Effect.LOSSY
    budget: ClassVar[float] = 0.25

    def rules(self) -> Sequence[Rule]:
        """One rule for each kind of matmul; they also report why an operation that reads weights is skipped."""
        return QuantizeLinear(self), QuantizeGrouped(self), QuantizeBatched(self)

    def run(self, graph: Graph) -> bool:
        """The rules, after checking that each pattern of `layers` matches and takes effect."""
        self.check_layers(graph)
        self.check_requests(graph)
        return super().run(graph)

    def check_requests(self, graph: Graph) -> None:
        """Raises PassError for a named layer that cannot be quantized, or a pattern whose layers all cannot be."""
        for pattern, ops in requested_layers(self.layers, graph).items():
            reasons = {op: why for op in ops if (why := self.why_refused(op, graph))}
            named = [op for op in reasons if naming_pattern(self.layers, op, graph)]
            refused = named or ([*reasons] if len(reasons) == len(ops) else [])
            if refused:
                more = f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
                got = "; ".join(f"%{op.result.name}: {reasons[op]}" for op in refused[:SHOWN]) + more
                fix = "Choose another scheme for these layers, or None to leave them in float."
                raise PassError(f"layers that '{pattern}' asks to quantize cannot be quantized", got=got, fix=fix)

    def why_refused(self, op: Op, graph: Graph) -> str:
        """Why no rule quantizes a matmul; empty if one does, or if it is already quantized."""
        answers = [rule.match(op, graph) for rule in self.rules() if rule.starts_at(op)]
        misses = [str(answer) for answer in answers if isinstance(answer, Missed)]
        return "; ".join(misses) if len(misses) == len(answers) and not {*misses} & {*NOT_CANDIDATES} else ""

    def explain(self, graph: Graph) -> dict[str, str]:
        """Omits operations that are already quantized or read no weights."""
        return {name: why for name, why in super().explain(graph).items() if why not in NOT_CANDIDATES}
