"""Decomposes torch's training IR to functional ATen; operators that passes match stay whole.

Composite operators not in KEEP are decomposed exactly as eager torch would run them, so bits stay equal. Primitive
operators (silu, gelu, embedding, addmm, …) always stay. `run_decompositions` does this, makes in-place operators
functional, and inlines autocast and no-grad regions; most models do not need it, see `inlining`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature

from qcompiler.capture.inlining import inline
from qcompiler.capture.locations import location_of
from qcompiler.capture.quiet import third_party_silence
from qcompiler.errors import CaptureError

KEEP = frozenset(
    {
        # matmuls
        "aten::linear", "aten::matmul", "aten::inner", "aten::conv1d", "aten::conv2d", "aten::conv3d",
        "aten::conv_transpose1d", "aten::conv_transpose2d.input", "aten::conv_transpose3d.input",
        # attention
        "aten::scaled_dot_product_attention", "aten::softmax.int", "aten::log_softmax.int",
        # normalization
        "aten::layer_norm", "aten::rms_norm", "aten::group_norm", "aten::instance_norm",
        # activations and gates
        "aten::silu", "aten::gelu", "aten::relu6", "aten::selu", "aten::glu",
        # sequences and pools: they decompose into loops over a size, or into an unused second result
        "aten::lstm.input", "aten::gru.input", "aten::rnn_tanh.input", "aten::rnn_relu.input", "aten::max_pool1d",
        "aten::max_pool2d", "aten::max_pool3d", "aten::avg_pool1d", "aten::adaptive_avg_pool1d",
        "aten::adaptive_avg_pool2d", "aten::adaptive_avg_pool3d",
        # their decompositions read data
        "aten::one_hot",
        # size and stride queries
        "aten::sym_size.int", "aten::sym_stride.int", "aten::size.int", "aten::stride.int",
        # shapes: they decompose into strides and clones that obscure the meaning
        "aten::pad", "aten::repeat_interleave.self_int", "aten::split.Tensor", "aten::split.sizes", "aten::chunk",
        "aten::unflatten.int", "aten::stack", "aten::where.ScalarOther", "aten::where.ScalarSelf",
        "aten::upsample_nearest2d.vec", "aten::upsample_bilinear2d.vec",
    }
)  # fmt: skip
"""Composite operators kept whole in a graph. Version 1; add to it when a pass needs another one."""

ASSERTIONS = frozenset(
    {
        "aten._assert_tensor_metadata", "aten._assert_scalar", "aten._assert_async", "aten.sym_constrain_range",
        "aten.sym_constrain_range_for_size", "aten._functional_assert_async", "aten._functional_assert_scalar",
        "aten._functional_sym_constrain_range", "aten._functional_sym_constrain_range_for_size",
        "aten._make_dep_token",
    }
)  # fmt: skip
"""Operators that only check; what they check about sizes is in the ranges of the symbols."""


@dataclass(frozen=True)
class Functional:
    """The parts of an ExportedProgram that the importer reads; the graph is functional ATen."""

    graph: torch.fx.Graph
    graph_signature: ExportGraphSignature
    range_constraints: Mapping[sympy.Symbol, Any]
    call_spec: Any
    checks: bool = False
    """Whether the graph's assertions are significant; otherwise they only repeat the ranges of symbols."""


def decompose(program: ExportedProgram, checks: bool = False) -> Functional:
    """Returns a program in functional ATen, with KEEP whole; `program` is unchanged.

    Args:
        program: The result of torch.export.
        checks: As in `Functional`.

    Raises:
        CaptureError: Control flow, or another operator on sub-graphs, remains; the message gives the user's line.
    """
    with third_party_silence():
        graph = inline(program, _is_taken_apart, is_assertion)
        if graph is None:
            program = program.run_decompositions(_table())
            graph = program.graph
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                "control flow with sub-graphs is not supported",
                got=node.target.name(),
                where=str(location_of(node)) or None,
                fix="Write it without torch.cond, while_loop or map, for instance with torch.where.",
            )
    return Functional(graph, program.graph_signature, program.range_constraints, program.call_spec, checks)


def is_assertion(node: torch.fx.Node) -> bool:
    """Whether a node only checks something, so the graph omits it."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.name().split(".")[0].replace("::", ".") in ASSERTIONS
    return getattr(target, "__name__", "") in ("sym_constrain_range", "sym_constrain_range_for_size", "_check")


def _is_taken_apart(op: Any) -> bool:
    """Whether an operator is a composite that is decomposed."""
    return (
        isinstance(op, torch._ops.OpOverload)
        and torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
        and op.name().removesuffix(".default") not in KEEP
    )


def _table() -> dict[Any, Callable[..., Any]]:
    """Returns torch's decompositions of the composite operators to decompose; primitives are not included."""
    whole = torch.export.default_decompositions()
    return {op: whole[op] for op in whole if _is_taken_apart(op)}
