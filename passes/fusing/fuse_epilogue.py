"""Fuses the arithmetic after a matmul, and the quantization of its result, into the matmul.

    %y = kernel.scaled_linear(%x_q, %x_s, %w_q, %w_s, %b) {out_dtype = bf16, …}        only %g reads %y
    %g = aten.gelu(%y)
    %g_q, %g_s = kernel.quantize(%g) {…}
  ->
    %g_q, %g_s = kernel.fused_linear(%x_q, %x_s, %w_q, %w_s, %b) {expression = "bf16(gelu(bf16(y0)))", parts = 1, …}

If only the two halves of a matmul are read, as after merging gate and up, they are y0 and y1. Runs after the passes
that fuse quantizations, which fuse a residual sum into the next norm. The expression rounds where the operations did.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

from passes.analyses.arithmetic import same_numbers, term_of
from passes.fusing.fused_producer import TURNED_CODES
from passes.fusing.fusion_regions import FusionRegion, Limits, grow
from passes.fusing.region_expressions import expression_of, in_order, rounded, substituted
from qcompiler.dialects.expression_nodes import Expression, Name
from qcompiler.dialects.fused_expression import FusedExpression, parse
from qcompiler.dialects.quant import is_static
from qcompiler.ir import Argument, Format, Graph, Match, Missed, Op, Rewriter, Role, Rule, Value
from qcompiler.ir.formats import FP8_BLOCK, FP8_TILE
from qcompiler.pass_manager.pipeline import Effect, Pass

OTHERS = 2
"""Maximum operands of an epilogue, besides the matmul and its bias."""

PLAIN = {1: "x0", 2: "x0 * x1"}
"""The fused expression of a kernel.quantize, by its number of operands."""

SPLITS = ("aten.split_with_sizes", "aten.split.sizes", "aten.split.Tensor", "aten.chunk")
LONGEST_CHAIN = 64


@dataclass(frozen=True)
class Epilogue:
    """The epilogue to fuse into a matmul.

    Attributes:
        last: The operation whose results become the results of the fused operation.
        expression: The fused expression; x0, x1, … are `others`.
        others: Its operands, besides the operands of the matmul.
        quantized: The attributes of its quantization, if there is one.
    """

    last: Op
    expression: FusedExpression
    others: tuple[Value, ...]
    quantized: Mapping[str, Argument]


class MatmulThenExpression(Rule):
    """quantize(arithmetic(scaled_linear(x, w), …)), or without the quantize  ->  fused_linear(x, w, …)"""

    root = ("kernel.scaled_linear",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if not takes_expression(op.format("x_format"), op.format("w_format")):
            return Missed(f"only matmuls of {FP8_TILE} and {FP8_BLOCK} support an epilogue")
        parts = parts_of(op.result, graph)
        if isinstance(parts, Missed):
            return parts
        users = list(dict.fromkeys(user for part in parts for user in graph.users(part)))
        if len(users) == 1 and _writes_scales(users[0]):
            epilogue = quantization(users[0], parts)
        else:
            epilogue = arithmetic(users, parts, graph)
        return epilogue if isinstance(epilogue, Missed) else {"epilogue": epilogue, "parts": len(parts)}

    def rewrite(self, op: Op, rewriter: Rewriter, epilogue: Epilogue, parts: int, **_: Any) -> None:
        bias = op.get("bias")
        args: list[Argument] = [op["x"], op["x_scale"], op["w"], op["w_scale"]]
        args += [bias, *epilogue.others] if bias is not None or epilogue.others else []
        attrs = {key: op.attrs[key] for key in ("w_format", "x_format")}
        attrs |= {"expression": str(epilogue.expression), "parts": parts, **epilogue.quantized}
        made = rewriter.insert("kernel.fused_linear", *args, attrs=attrs)
        rewriter.graph.move(made, before=epilogue.last)
        read = [value.op for _, value in epilogue.last.operands()]
        rewriter.replace(epilogue.last, *made.results)
        for unread in read:
            rewriter.erase_unread(unread)


def _writes_scales(op: Op) -> bool:
    return op.role is Role.QUANTIZE and op.name.startswith("kernel.") and not is_static(op)


def takes_expression(x_format: Format, w_format: Format) -> bool:
    """Whether a kernel multiplies operands in these formats and applies an epilogue to the sums."""
    return x_format.decodes_like(FP8_TILE) and w_format.decodes_like(FP8_BLOCK)


def parts_of(matmul: Value, graph: Graph) -> list[Value] | Missed:
    """A matmul; or its two halves, if only they are read."""
    users, columns = graph.users(matmul), matmul.tensor.shape[-1]
    cuts = sorted((cut for user in users for cut in cuts_of(user, matmul)), key=lambda cut: cut[1])
    if not users or not cuts:
        return [matmul]
    if not isinstance(columns, int) or [cut[1:] for cut in cuts] != [(0, columns // 2), (columns // 2, columns)]:
        return Missed("it is not split into two halves", matmul)
    if len(users) > len({cut[0].op for cut in cuts}):
        return Missed("it is also read as a whole", matmul)
    if columns % 256:
        return Missed(f"its halves have {columns / 2:g} columns, which is not a multiple of 128", matmul)
    return [cut[0] for cut in cuts]


def cuts_of(op: Op, matmul: Value) -> Iterator[tuple[Value, int, int]]:
    """The column ranges of a matmul that an operation returns, each as first column and end."""
    shape = matmul.tensor.shape
    last = len(shape) - 1
    if op.name == "aten.slice.Tensor" and op.argument("dim") in (-1, last) and op.argument("step") == 1:
        start = op.argument("start")
        size = op.result.tensor.shape[-1]
        if isinstance(start, int) and isinstance(size, int) and start >= 0:
            yield op.result, start, start + size
    elif op.name in SPLITS and op.argument("dim") in (-1, last):
        sizes = [part.tensor.shape[-1] for part in op.results]
        if all(isinstance(size, int) for size in sizes):
            ends = [*accumulate(sizes)]
            yield from zip(op.results, [0, *ends[:-1]], ends, strict=True)


def quantization(op: Op, parts: Sequence[Value]) -> Epilogue | Missed:
    """A quantization, and its fused expression if it has one."""
    operands = [value for _, value in op.operands()]
    expression = parse(str(op.attrs.get("expression", PLAIN[min(len(operands), 2)])))
    if op.attrs.get("keep"):
        return Missed("the arithmetic after it has a residual output", op.results[2])
    if expression.across:
        return Missed("the arithmetic after it reduces whole rows, of which a tile holds only a part", op.results[0])
    if not op.format().decodes_like(FP8_TILE):
        return Missed(f"its result is not quantized to {FP8_TILE}", op.results[0])
    if op.results[0].tensor.shape != parts[0].tensor.shape:
        return Missed("its result is quantized with a different arrangement of rows", op.results[0])
    named = {f"x{place}": value for place, value in enumerate(operands)}
    spelled = {name: spelling(parts, value) for name, value in named.items() if value in parts}
    expression = with_operands(expression, spelled)
    return finished(op, expression, named, {"format": op.format()})


def arithmetic(users: Sequence[Op], parts: Sequence[Value], graph: Graph) -> Epilogue | Missed:
    """As many users of the parts of a matmul as one fused operation can compute."""
    elsewhere = [user for user in users if not user.results]
    if elsewhere:
        return Missed(
            "it is an output of the graph" if elsewhere[0] is graph.return_op else "it is written to a buffer", parts[0]
        )
    if not any(map(term_of, users)):
        names = ", ".join(sorted({op.name for op in users}))
        return Missed(f"its users cannot be fused with it: {names}", parts[0])
    limits = Limits(operands=OTHERS + len(parts), residuals=0, across=False, views=False)
    why = Missed("its users have no common result", parts[0])
    for root in results_of(parts, graph):
        region = grow(graph, root, limits, stops=parts)
        if isinstance(region, Missed):
            why = region
            continue
        outside = [user for user in users if user not in region.inside]
        if outside:
            why = Missed(f"it is also read by {outside[0].name}", parts[0])
            continue
        return fused(region, parts)
    return why


def results_of(parts: Sequence[Value], graph: Graph) -> list[Value]:
    """Results of elementwise arithmetic on the parts of a matmul, the farthest downstream first."""
    found: dict[Value, None] = {}
    pending = list(parts)
    while pending and len(found) < LONGEST_CHAIN:
        for user in graph.users(pending.pop()):
            plain = term_of(user) is not None and user.result.tensor.shape == parts[0].tensor.shape
            if plain and user.result not in found:
                found[user.result] = None
                pending.append(user.result)
    # An operation that only widens a value does not round, so it cannot determine the element type.
    roots = [value for value in found if same_numbers(value.op) is None]
    return sorted(roots, key=lambda value: graph.rank(value.op), reverse=True)


def fused(region: FusionRegion, parts: Sequence[Value]) -> Epilogue | Missed:
    """A region as the fused expression of a matmul."""
    others = [value for value in region.operands if value not in parts]
    named = {f"x{place}": value for place, value in enumerate(others)}
    spelled: dict[Value, Expression] = {value: Name(name) for name, value in named.items()}
    spelled |= {value: spelling(parts, value) for value in parts}
    return finished(region.root.op, expression_of(region, spelled), named, {})


def finished(
    last: Op, expression: FusedExpression, named: Mapping[str, Value], quantized: Mapping[str, Argument]
) -> Epilogue | Missed:
    """An epilogue, unless it has too many operands."""
    vectors = [name for name, value in named.items() if len(value.tensor.shape) < len(last.results[0].tensor.shape)]
    expression, order = in_order(expression, vectors)
    if len(order) > OTHERS:
        return Missed(f"its epilogue would read {len(order)} other tensors, at most {OTHERS}", last.results[0])
    return Epilogue(last, expression, tuple(named[name] for name in order), quantized)


def spelling(parts: Sequence[Value], part: Value) -> Expression:
    """A part of a matmul in an expression: the sum, rounded as the matmul rounds it."""
    return rounded(Name(f"y{parts.index(part)}"), part.tensor.dtype)


def with_operands(expression: FusedExpression, spelled: Mapping[str, Expression]) -> FusedExpression:
    """Substitutes expressions for operands; those read more than once get names."""
    reads = [part.name for part in expression.expressions() if isinstance(part, Name)]
    taken = {name for name, _ in expression.definitions}
    values: dict[str, Expression] = {}
    first: list[tuple[str, Expression]] = []
    for name, operand in spelled.items():
        values[name] = operand
        if reads.count(name) > 1 and not isinstance(operand, Name):
            own = next(free for place in range(len(taken) + 1) if (free := f"p{place}") not in taken)
            taken.add(own)
            first.append((own, operand))
            values[name] = Name(own)
    definitions = [(name, substituted(what, values)) for name, what in expression.definitions]
    return FusedExpression((*first, *definitions), substituted(expression.result, values))


@dataclass(frozen=True)
class FuseEpilogue(Pass):
    """quantize(activation(scaled_linear(x, w)))  ->  fused_linear(x, w)."""

    name: ClassVar[str] = "fuse-epilogue"
    effect: ClassVar[Effect] = Effect.REORDERS
    budget: ClassVar[float] = TURNED_CODES

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (MatmulThenExpression(),)
