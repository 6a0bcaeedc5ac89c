"""Evaluates constant operations, such as quantization of weights and weight arithmetic, and frees the originals.

    %w = core.param() {name = "fc1.weight"} : bf16[512, 256]
    %w_q, %w_s = quant.quantize(%w) {…}
  ->
    %w_q = core.param() {name = "fc1.weight_q"} : f8e4m3fn[512, 256]
    %w_s = core.param() {name = "fc1.weight_s"} : f32[4, 2]

    %g = aten.mul.Tensor(%norm.weight, %smooth) : f32[256]      ->     %g = core.param() {name = "norm.weight_folded"}

The derivation of each stored weight is kept in `graph.derivations`: the checkpoint writer must know which of the
model's weights it contains. Weights are processed one at a time to limit memory. A dequantize is never folded, because
that would undo the quantization. A graph without weights (from text) is rewritten likewise, without numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from passes.analyses.constants import free_name
from passes.analyses.memory import leaves_the_graph
from qcompiler.interpreter import evaluate
from qcompiler.ir import Derivation, Graph, Match, Missed, Op, Rewriter, Role, Rule, legal_name
from qcompiler.ir.dataflow import ancestors, parameters_of, part_of
from qcompiler.pass_manager.pipeline import Effect, Pass


@dataclass(frozen=True)
class QuantizedWeight(Rule):
    """quantize(constant)  ->  param, param"""

    root: ClassVar[tuple[str, ...]] = ("quant.quantize",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if not graph.is_constant(op["x"]):
            return Missed("it quantizes an activation", op["x"])
        if not parameters_of(op["x"]) and not graph.weights:
            return Missed("it quantizes literals, and the graph has no weights store", op["x"])
        return {}

    def rewrite(self, op: Op, rewriter: Rewriter, **_: object) -> None:
        store(op, rewriter, op.format().suffixes)


class WeightArithmetic(Rule):
    """mul(constant, constant), a cast of a constant, cat(constants), …  ->  param, if a computed value reads it"""

    root = (
        "aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.add.Tensor", "aten.add.Scalar",
        "aten.sub.Tensor", "aten.rsub.Scalar", "aten.neg", "aten._to_copy", "aten.to.dtype", "aten.cat",
    )  # fmt: skip

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if not graph.is_constant(op.result):
            return Missed("it is computed from the inputs")
        if all(user.results and graph.is_constant(user.results[0]) for user in graph.users(op.result)):
            return Missed("it feeds only other constants")
        if leaves_the_graph(graph, op.result):
            return Missed("it is an output of the graph, and a weight must not be")
        part = set(ancestors(op.result))
        if any(inner.role is Role.DEQUANTIZE for inner in part):
            return Missed("it would undo a quantization")
        sources = parameters_of(op.result)
        if not sources:
            return Missed("it reads no weights")
        matrices = [source for source in sources if len(source.result.tensor.shape) > 1]
        shared = [source for source in matrices if not part.issuperset(graph.users(source.result))]
        if len(op.result.tensor.shape) > 1 and shared:
            return Missed("one of its weights has other users, so both copies would be stored", shared[0].result)
        if len(op.result.tensor.shape) > 1 and _bytes(op) > sum(map(_bytes, sources)):
            return Missed("it takes more memory than its weights", op.result)
        return {}

    def rewrite(self, op: Op, rewriter: Rewriter, **_: object) -> None:
        store(op, rewriter, ("_folded",))


def store(op: Op, rewriter: Rewriter, suffixes: Sequence[str]) -> None:
    """Computes the results of `op`, stores them as weights, and frees weights without users."""
    graph, sources = rewriter.graph, parameters_of(op.results[0])
    stem = _named_after(op, sources)
    names = [free_name(graph, f"{stem}{suffix}") for suffix in suffixes]
    if graph.weights:
        computed = evaluate(op, graph)
        if op.role is Role.QUANTIZE and is_poisoned(*computed):
            remark_not_finite(op, sources, graph)
        graph.weights.update(zip(names, computed, strict=True))
    derivation = part_of(op)
    graph.derivations.update({name: Derivation(derivation, index) for index, name in enumerate(names)})
    params = [
        rewriter.insert("core.param", attrs={"name": name}, types=[value.type]).result
        for name, value in zip(names, op.results, strict=True)
    ]
    for param in params:
        graph.move(param.op, before=op)  # which may have users before the anchor
    operands = [value.op for _, value in op.operands()]
    rewriter.replace(op, *params, keep_names=False)
    for operand in operands:
        rewriter.erase_unread(operand)
    for param, name in zip(params, names, strict=True):
        graph.rename(param, legal_name(name))  # the folded operand may have used that name
    for source in sources:
        if source not in graph and source.attrs["name"] in graph.weights:
            del graph.weights[str(source.attrs["name"])]  # pop would load it


def is_poisoned(codes: Tensor, scale: Tensor, *_: Tensor) -> bool:
    """Whether quantization met a NaN or an infinity, which leaves NaN in the codes or in the scale."""
    if scale.to(torch.float32).isnan().any():
        return True
    largest = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7C}.get(codes.dtype)  # larger codes are NaN
    return largest is not None and bool((codes.view(torch.int8).bitwise_and(0x7F) > largest).any())


def remark_not_finite(op: Op, sources: Sequence[Op], graph: Graph) -> None:
    """Notes on the users of a quantized weight: it makes their results NaN, and which model weights cause it."""
    found = []
    for name in (str(source.attrs["name"]) for source in sources):
        weight = graph.weights[name].to(torch.float32)
        nan, finite = int(weight.isnan().sum()), int(weight.isfinite().sum())
        if finite < weight.numel():
            found.append(f"{name} has {nan} NaN and {weight.numel() - finite - nan} Inf")
    text = f"{', '.join(found) or 'the weight is not finite after smoothing'}, so results are NaN"
    reached = list(graph.users(op.results[0]))
    for one in reached:
        for value in one.results:
            graph.remark(value, text)
            # The report tracks the parts of merged layers, and matmuls of operands that are dequantized first.
            users = graph.users(value)
            reached += [user for user in users if one.role is Role.DEQUANTIZE or user.role is Role.VIEW]


def _named_after(op: Op, sources: Sequence[Op]) -> str:
    """The name of the largest weight that a constant is computed from; the first of equally large ones.

    A suffix tells if there are others. Without any weight, the name of the operand that is quantized, or of the result.
    """
    if not sources:
        return op["x"].name if op.role is Role.QUANTIZE else op.result.name
    joined = len(sources) > 1 and any(inner.name == "aten.cat" for inner in ancestors(op.results[0]))
    return str(max(reversed(sources), key=_elements).attrs["name"]) + "_merged" * joined


def _elements(op: Op) -> int:
    size = op.result.tensor.elements
    return size if isinstance(size, int) else 0


def _bytes(op: Op) -> int:
    size = op.result.tensor.bytes
    return size if isinstance(size, int) else 0


@dataclass(frozen=True)
class FoldConstants(Pass):
    """quantize(weight), arithmetic on weights  ->  stored weights."""

    name: ClassVar[str] = "fold-constants"
    effect: ClassVar[Effect] = Effect.EXACT

    def rules(self) -> Sequence[Rule]:
        """Quantization first: operations that are computed only for it are dead afterwards."""
        return (QuantizedWeight(), WeightArithmetic())

    def explain(self, graph: Graph) -> dict[str, str]:
        """Nothing: quantizing an activation in each call is expected."""
        return {}
