"""Weights that a pass adds to a graph, and arithmetic on them."""

from collections.abc import Sequence
from typing import Any

import torch

from qcompiler.ir import DType, Graph, Op, Rewriter, Role, TensorType, Value, legal_name
from qcompiler.ir.dataflow import parameters_of, users_through
from qcompiler.numerics.dtypes import ir_dtype


def free_name(graph: Graph, name: str) -> str:
    """`name`, or `name_1`, `name_2`, … if the graph already uses that name for a weight."""
    taken = {str(op.attrs["name"]) for op in graph.ops() if op.role is Role.STATE}
    taken |= graph.weights.keys() | graph.derivations.keys()
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def new_parameter(rewriter: Rewriter, name: str, tensor: Any, value_name: str | None = None) -> Value:
    """Adds `tensor` as a weight called `name` (or a variant if that is taken); returns its value.

    The weight is placed with the others. In a structure-only graph, only the numbers are missing.
    """
    graph = rewriter.graph
    free = free_name(graph, name)
    if graph.weights:
        tensor = tensor.to(graph.weights[next(iter(graph.weights))].device)
    if graph.weights or not graph.ops("core.param"):
        graph.weights[free] = tensor
    kind = TensorType(ir_dtype(tensor.dtype), tuple(tensor.shape))
    op = rewriter.insert("core.param", attrs={"name": free}, types=[kind], names=[legal_name(value_name or free)])
    return op.result


def is_weight(graph: Graph, value: Value, tensor: torch.Tensor) -> bool:
    """Whether a value is a weight with exactly the numbers of `tensor`."""
    name = str(value.op.attrs.get("name"))
    if value.op.name != "core.param" or name not in graph.weights:
        return False
    held = graph.weights[name]
    return held.dtype == tensor.dtype and torch.equal(held, tensor.to(held.device))


def times(rewriter: Rewriter, value: Value, factors: Sequence[Value], name: str) -> Value:
    """`value` times FP32 factors that broadcast to its shape: computed in FP32 or wider, rounded once."""
    wide = value.tensor.dtype if value.tensor.dtype is DType.f64 else DType.f32
    kind, product = TensorType(wide, value.tensor.shape), value
    names = [name if wide is value.tensor.dtype else f"{name}_f32"]
    for factor in factors:
        product = rewriter.insert("aten.mul.Tensor", product, factor, types=[kind], names=names).result
    return cast(rewriter, product, value.tensor.dtype, name)


def cast(rewriter: Rewriter, value: Value, dtype: DType, name: str) -> Value:
    """`value` in another element type; itself if it already has that type."""
    if value.tensor.dtype is dtype:
        return value
    kind = TensorType(dtype, value.tensor.shape)
    return rewriter.insert("aten._to_copy", value, attrs={"dtype": dtype}, types=[kind], names=[name]).result


def is_read_elsewhere(op: Op, graph: Graph) -> bool:
    """Whether a matrix that the weight of a linear is computed from has other users, under any of its names."""

    def constant(user: Op) -> bool:
        return bool(user.results) and graph.is_constant(user.results[0])

    ties = getattr(graph.weights, "ties", {})
    matrices = [param for param in parameters_of(op["weight"]) if len(param.result.tensor.shape) > 1]
    names = {alias for param in matrices for alias in ties.get(param.attrs["name"], (param.attrs["name"],))}
    others = {param for param in graph.ops("core.param") if param.attrs["name"] in names}
    users = (user for param in others for user in users_through(graph, param.result, constant))
    return any(user is not op and not constant(user) for user in users)
