"""Computes now what is constant: quantized weights, and arithmetic on weights; the originals are let go.

    %w = core.param() {name = "fc1.weight"} : bf16[512, 256]
    %w_q, %w_s = quant.quantize(%w) {…}
  ->
    %w_q = core.param() {name = "fc1.weight_q"} : f8e4m3fn[512, 256]
    %w_s = core.param() {name = "fc1.weight_s"} : f32[4, 2]

    %g = aten.mul.Tensor(%norm.weight, %smooth) : f32[256]      ->     %g = core.param() {name = "norm.weight_folded"}

How a stored weight was computed is kept as its derivation (`graph.derivations`): the writer of a checkpoint must know
which of the model's own weights it holds. One weight is in memory at a time. A dequantize is never folded: that would
undo the quantization. A graph without weights (from text) is rewritten in the same way; only the numbers are missing.
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
        store(op, rewriter, ("_q", "_s", "_t")[: len(op.results)])


class WeightArithmetic(Rule):
    """mul(constant, constant), a cast of a constant, cat(constants), …  ->  param, where a computed value reads it"""

    root = (
        "aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.add.Tensor", "aten.add.Scalar",
        "aten.sub.Tensor", "aten.rsub.Scalar", "aten.neg", "aten._to_copy", "aten.to.dtype", "aten.cat",
    )  # fmt: skip

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if not graph.is_constant(op.result):
            return Missed("it is computed from the inputs")
        if all(reader.results and graph.is_constant(reader.results[0]) for reader in graph.users(op.result)):
            return Missed("only constants are computed from it")
        if leaves_the_graph(graph, op.result):
            return Missed("it leaves the graph, and a weight must not")
        part = set(ancestors(op.result))
        if any(inner.role is Role.DEQUANTIZE for inner in part):
            return Missed("it would undo a quantization")
        sources = parameters_of(op.result)
        if not sources:
            return Missed("it reads no weights")
        matrices = [source for source in sources if len(source.result.tensor.shape) > 1]
        shared = [source for source in matrices if not part.issuperset(graph.users(source.result))]
        if len(op.result.tensor.shape) > 1 and shared:
            return Missed("one of its weights is read elsewhere, so that there would be two", shared[0].result)
        if len(op.result.tensor.shape) > 1 and _bytes(op) > sum(map(_bytes, sources)):
            return Missed("it takes more memory than its weights", op.result)
        return {}

    def rewrite(self, op: Op, rewriter: Rewriter, **_: object) -> None:
        store(op, rewriter, ("_folded",))


def store(op: Op, rewriter: Rewriter, suffixes: Sequence[str]) -> None:
    """Makes weights of the results of `op`, computes them, and lets go of what nobody reads any more."""
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
    operands = [value.op for _, value in op.operands()]
    rewriter.replace(op, *params, keep_names=False)
    for operand in operands:
        rewriter.erase_unread(operand)
    for param, name in zip(params, names, strict=True):
        graph.rename(param, legal_name(name))  # what was folded may have had that name until now
    for source in sources:
        if source not in graph and source.attrs["name"] in graph.weights:
            del graph.weights[str(source.attrs["name"])]  # pop would load it


def is_poisoned(codes: Tensor, scale: Tensor, *_: Tensor) -> bool:
    """Whether quantization has met a NaN or an infinity, which leaves NaN in the codes or in the scale."""
    if scale.to(torch.float32).isnan().any():
        return True
    largest = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7C}.get(codes.dtype)  # NaN codes come after these
    return largest is not None and bool((codes.view(torch.int8).bitwise_and(0x7F) > largest).any())


def remark_not_finite(op: Op, sources: Sequence[Op], graph: Graph) -> None:
    """Notes on the readers of a quantized weight that it makes their results NaN, and which of the model's weights."""
    found = []
    for name in (str(source.attrs["name"]) for source in sources):
        weight = graph.weights[name].to(torch.float32)
        nan, finite = int(weight.isnan().sum()), int(weight.isfinite().sum())
        if finite < weight.numel():
            found.append(f"{name} has {nan} NaN and {weight.numel() - finite - nan} Inf")
    text = f"{', '.join(found) or 'the weight is not finite once it is smoothed'}, so results are NaN"
    readers = list(graph.users(op.results[0]))
    for reader in readers:
        for value in reader.results:
            graph.remark(value, text)
            # The report knows the parts of merged layers, and products of operands that are dequantized first.
            readers += [user for user in graph.users(value) if reader.role is Role.DEQUANTIZE or user.role is Role.VIEW]


def _named_after(op: Op, sources: Sequence[Op]) -> str:
    """The name of the largest of several weights that a constant is made of, of equal ones the one that stands first.

    With a word behind it where others stand beside that one. Without any, the name of the operand.
    """
    if not sources:
        return op["x"].name
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
        """Quantization first: what is computed for it only is gone then."""
        return (QuantizedWeight(), WeightArithmetic())

    def explain(self, graph: Graph) -> dict[str, str]:
        """Nothing: an activation is quantized in each call, which surprises nobody."""
        return {}
