"""Inserts quantize and dequantize around each matmul with a constant weight: activations in tiles, weights in blocks.

    %y = aten.linear(%x, %w, %b) : bf16[s0, 512]
  ->
    %x_q, %x_s = quant.quantize(%x) {block = [1, 128], …}
    %x_dq = quant.dequantize(%x_q, %x_s) {…, out_dtype = f32}
    %w_q, %w_s = quant.quantize(%w) {block = [128, 128], …}
    %w_dq = quant.dequantize(%w_q, %w_s) {…, out_dtype = f32}
    %b_f32 = aten._to_copy(%b) {dtype = f32}
    %y_f32 = aten.linear(%x_dq, %w_dq, %b_f32) : f32[s0, 512]
    %y = aten._to_copy(%y_f32) {dtype = bf16}

The graph still runs in plain torch and has the numbers of the quantized model; fuse-linear then makes it fast.
Source of the method: DeepSeek-V3 Technical Report, section 3.3.2 (fine-grained quantization).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from passes.candidates import MATMULS, NOT_CANDIDATES, OTHER_READERS, bias_of, why_not_quantized
from qcompiler import numerics
from qcompiler.errors import PassError
from qcompiler.ir import Argument, DType, Graph, Match, Missed, Op, Rewriter, Rule, TensorType, Value
from qcompiler.pass_manager import Effect, Pass

FORMATS = (DType.f8e4m3fn, DType.f8e5m2)


@dataclass(frozen=True)
class LinearToTiles(Rule):
    """linear(x, w, b)  ->  linear(dequantize(quantize(x)), dequantize(quantize(w)), b), in FP32"""

    x_block: tuple[int, int]
    w_block: tuple[int, int]
    dtype: DType
    profile: str
    root: ClassVar[tuple[str, ...]] = (*MATMULS, *OTHER_READERS)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if reason := why_not_quantized(op, graph):
            return reason
        return {"x": op.tensor(0), "w": op.tensor(1), "bias": bias_of(op)}

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, w: Value, bias: Value | None, **_: Any) -> None:
        args = [self.around(rewriter, x, self.x_block), self.around(rewriter, w, self.w_block)]
        if bias is not None:
            args.append(cast(rewriter, bias, DType.f32, f"{bias.name}_f32"))
        kind = op.result.tensor
        linear = rewriter.insert(
            "aten.linear", *args, types=[TensorType(DType.f32, kind.shape)], names=[f"{op.result.name}_f32"]
        )
        rewriter.replace(op, cast(rewriter, linear.result, kind.dtype, op.result.name))

    def around(self, rewriter: Rewriter, value: Value, block: tuple[int, int]) -> Value:
        """`value`, quantized in blocks and dequantized to FP32."""
        attrs: dict[str, Argument] = {"block": block, "dtype": self.dtype, "profile": self.profile}
        quantize = rewriter.insert("quant.quantize", value, attrs=attrs, names=[f"{value.name}_q", f"{value.name}_s"])
        attrs = {"block": block, "out_dtype": DType.f32}
        return rewriter.insert("quant.dequantize", *quantize.results, attrs=attrs, names=[f"{value.name}_dq"]).result


def cast(rewriter: Rewriter, value: Value, dtype: DType, name: str) -> Value:
    """`value` in another element type; itself when it has it already."""
    if value.tensor.dtype is dtype:
        return value
    kind = TensorType(dtype, value.tensor.shape)
    return rewriter.insert("aten._to_copy", value, attrs={"dtype": dtype}, types=[kind], names=[name]).result


@dataclass(frozen=True)
class Fp8Tile(Pass):
    """linear(x, w)  ->  linear(dequantize(quantize(x)), dequantize(quantize(w))).

    Attributes:
        x_block: Rows and columns of an activation tile; one scale each.
        w_block: Rows and columns of a weight block; one scale each.
        dtype: The 8-bit format of both.
        profile: The numerics profile: how a scale is made from a block (see `qcompiler.numerics`).
    """

    name: ClassVar[str] = "fp8-tile"
    effect: ClassVar[Effect] = Effect.LOSSY
    budget: ClassVar[float] = 0.25

    x_block: tuple[int, int] = (1, 128)
    w_block: tuple[int, int] = (128, 128)
    dtype: DType = DType.f8e4m3fn
    profile: str = "deepseek"

    def __post_init__(self) -> None:
        """PassError for a block, format or profile that does not exist."""
        super().__post_init__()
        numerics.profile(self.profile)
        if self.dtype not in FORMATS:
            need = " or ".join(map(str, FORMATS))
            raise PassError("pass 'fp8-tile' quantizes to 8-bit floating-point formats", got=self.dtype, need=need)
        for block in (self.x_block, self.w_block):
            if min(block) < 1:
                raise PassError("a block of pass 'fp8-tile' is empty", got=list(block), need="two positive sizes")

    def rules(self) -> Sequence[Rule]:
        """One rule, which also says why a reader of weights is left alone."""
        return (LinearToTiles(self.x_block, self.w_block, self.dtype, self.profile),)

    def explain(self, graph: Graph) -> dict[str, str]:
        """What is quantized already, or reads no weights, needs no reason."""
        return {name: why for name, why in super().explain(graph).items() if why not in NOT_CANDIDATES}
