"""Recovers a model weight from a constant computed from it, by undoing the operations in between.

    mul(w, 1/s)              ->    w' = the result: the factor is folded into the weight
    mul(add(w, 1), 1/s)      ->    w' = the result - 1, because the model adds 1
    t(w)                     ->    w' = its transpose

A factor is computed from constants that a pass added, not from model weights. Any other operation cannot be undone; the
error names it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompiler.ir import Op, Role, Value
from qcompiler.ir.dataflow import parameters_of
from qcompiler.ir.graph import PARAM
from qcompiler.numerics.dtypes import torch_dtype

TRANSPOSES = ("aten.t", "aten.transpose.int")
SUMS = ("aten.add.Tensor", "aten.add.Scalar")


def why_not_rows(part: Value, model_names: set[str]) -> str | None:
    """The reason why a constant's rows are not the rows of its weight; None if they are."""
    turned = False
    for op in _chain(part, model_names):
        if op.name in TRANSPOSES:
            turned = not turned
        elif op.name != PARAM and op.role is not Role.CAST and not _takes_factor(op, model_names):
            return f"{op.name} computes the quantized tensor from it"
    if turned:
        return "the model stores it transposed, [K, N], and the format has [N, K]"
    return None


def restored(part: Value, tensor: Tensor, model_names: set[str]) -> Tensor | str:
    """The weight from which the model's own operations compute `tensor`; or the reason why there is none."""
    for op in _chain(part, model_names):
        if op.name == PARAM:
            return tensor.to(torch_dtype(op.result.tensor.dtype)).contiguous()
        if op.name in TRANSPOSES and tensor.dim() == 2:
            tensor = tensor.t()
        elif op.name in SUMS and (number := _number(op)) is not None:
            tensor = tensor - number
        elif op.role is not Role.CAST and not _takes_factor(op, model_names):
            return f"{op.name} computes the changed value from it and cannot be undone"
        if op.role is Role.CAST:
            wider = torch_dtype(op["x"].tensor.dtype)
            tensor = tensor.to(torch.promote_types(tensor.dtype, wider))
    return f"it is not among the inputs of {part}"


def _chain(part: Value, model_names: set[str]) -> Iterator[Op]:
    """The operations from a constant back to its model weight."""
    op = part.op
    while True:
        yield op
        inner = [value for _, value in op.operands() if _names(value) & model_names]
        if len(inner) != 1:
            return
        op = inner[0].op


def _takes_factor(op: Op, model_names: set[str]) -> bool:
    """Whether an operation multiplies by a factor that a pass added."""
    factors = [value for _, value in op.operands() if (names := _names(value)) and not names & model_names]
    return op.name == "aten.mul.Tensor" and len(factors) == 1 and not op.attrs


def _number(op: Op) -> float | None:
    """The literal that an operation adds, if it is one."""
    number = None if op.attrs else op.argument("other")
    return number if isinstance(number, int | float) and not isinstance(number, bool) else None


def _names(value: Value) -> set[str]:
    return {str(param.attrs["name"]) for param in parameters_of(value)}
