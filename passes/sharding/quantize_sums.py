"""Sends the terms of a sum over ranks as codes and scales instead of bf16.

    %s = coll.reduce_scatter_tokens(%y) {few = 64, mesh = "tp", ranks = 2} : bf16[1, share(s0*s1, 2, 64), 512]
  ->
    %y_q, %y_s = quant.quantize(%y) {format = #fp8_tile}
    %t_q = coll.all_to_all_tokens(%y_q) {few = 64, mesh = "tp", ranks = 2} : f8e4m3fn[2, 1, share(s0*s1, 2, 64), 512]
    %t_s = coll.all_to_all_tokens(%y_s) {few = 64, mesh = "tp", ranks = 2} : f32[2, 1, share(s0*s1, 2, 64), 4]
    %s = quant.sum_terms(%t_q, %t_s) {format = #fp8_tile, out_dtype = bf16}

Each rank quantizes its own term, and adds the terms of its tokens in FP32, in the order of the ranks. A term is sent
once and never added in FP8, so the error does not grow with the number of ranks: each term is off by at most half a
unit of the last place of its codes. Runs in the program of one rank, after `partition`, and before the passes that
lower and fuse quantizations: then a matmul quantizes its own result, and the sum is added where it is normalized.

A sum without a matmul stays as it is: rows of a divided embedding are zeros on all ranks but one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from passes.analyses.sent_bytes import is_multiplied
from qcompiler.dialects.coll_tokens import CUT
from qcompiler.dialects.kernel import why_no_kernel
from qcompiler.dialects.terms import MOST_TERMS
from qcompiler.errors import PassError
from qcompiler.ir import Argument, Format, Graph, Match, Missed, Op, Rewriter, Rule
from qcompiler.ir.formats import FP8_TILE
from qcompiler.pass_manager.pipeline import Effect, Pass

SCATTERS = ("coll.reduce_scatter_tokens", "coll.reduce_scatter_chosen_tokens")
EXCHANGE = "coll.all_to_all_tokens"


@dataclass(frozen=True)
class QuantizeThenExchange(Rule):
    """reduce_scatter_tokens(y)  ->  sum_terms of all_to_all_tokens of the results of quantize(y)"""

    axis: str
    format: Format
    root: ClassVar[tuple[str, ...]] = SCATTERS

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if op.attrs["mesh"] != self.axis:
            return Missed(f"it is a sum along the axis '{op.attrs['mesh']}' of the mesh, not '{self.axis}'")
        ranks = op.attrs["ranks"]
        if isinstance(ranks, int) and ranks > MOST_TERMS:
            return Missed(f"{ranks} ranks have more than {MOST_TERMS} terms")
        if not is_multiplied(op["x"]):
            return Missed("no matmul computes its terms; the sum of rows of a divided table is exact", op["x"])
        return {}

    def rewrite(self, op: Op, rewriter: Rewriter, **_: Any) -> None:
        name = op["x"].name
        quantized = rewriter.insert(
            "quant.quantize", op["x"], attrs={"format": self.format}, names=[f"{name}_q", f"{name}_s"]
        )  # fmt: skip
        cut = {key: op.attrs[key] for key in CUT}
        terms = [
            rewriter.insert(EXCHANGE, part, attrs=cut, names=[f"{name}_terms{suffix}"]).result
            for part, suffix in zip(quantized.results, self.format.suffixes, strict=True)
        ]
        attrs: dict[str, Argument] = {"format": self.format, "out_dtype": op.result.tensor.dtype}
        rewriter.replace(op, rewriter.insert("quant.sum_terms", *terms, attrs=attrs).result)


@dataclass(frozen=True)
class QuantizeSums(Pass):
    """reduce_scatter_tokens(y)  ->  sum_terms(all_to_all_tokens(quantize(y))).

    Attributes:
        axis: The axis of the mesh.
        format: The format of the terms, in which each token has its own scales.
    """

    name: ClassVar[str] = "quantize-sums"
    effect: ClassVar[Effect] = Effect.LOSSY
    budget: ClassVar[float] = 0.1

    axis: str = "tp"
    format: Format = FP8_TILE

    def __post_init__(self) -> None:
        """Raises PassError unless each token has its own scales, and kernels have the format."""
        super().__post_init__()
        problem, need = "the terms of sums over ranks cannot be sent in a format", "one such as #fp8_tile"
        if self.format.block[0] != 1:
            problem += " in which one scale covers several tokens, which different ranks receive"
        elif why := why_no_kernel(self.format):
            problem += f": {why}"
        else:
            return
        raise PassError(problem, got=self.format, need=need, where=f"pass '{self.name}'")

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (QuantizeThenExchange(self.axis, self.format),)
