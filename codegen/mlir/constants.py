"""Stores weights as constants of a module instead of function arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from codegen.mlir.extras import load
from codegen.mlir.importing import body
from codegen.mlir.interface import Parameter
from qcompiler.errors import CodegenError, InputError
from qcompiler.ir import TensorType
from qcompiler.ir.op import quote


def embed(module: Any, parameters: Sequence[Parameter], store: Mapping[str, torch.Tensor] | None) -> None:
    """Replaces each weight among the parameters by a constant, in place; state stays an argument.

    Args:
        module: In the torch dialect, with its arguments labeled.
        parameters: The parameters of its function.
        store: Name -> tensor; None omits the numbers, leaving only the resource name.
    """
    ir = load("torch_mlir.ir", "mlir")
    (function,) = module.body.operations
    block = body(module)
    weights = [index for index, parameter in enumerate(parameters) if parameter.kind == "weight"]
    with module.context, ir.Location.unknown():
        for index in reversed(weights):
            argument = block.arguments[index]
            kind = _tensor_type(argument.type)
            value = (
                ir.Attribute.parse(f"dense_resource<{quote(parameters[index].name)}> : {kind}")  # without data
                if store is None
                else _elements(kind, parameters[index], store)
            )
            with ir.InsertionPoint.at_block_begin(block):
                made = ir.Operation.create(
                    "torch.vtensor.literal", results=[argument.type], attributes={"value": value}
                )
            argument.replace_all_uses_with(made.result)
            block.erase_argument(index)
        kept = [index for index in range(len(parameters)) if index not in weights]
        old = function.function_type.value
        function.attributes["function_type"] = ir.TypeAttr.get(
            ir.FunctionType.get([old.inputs[index] for index in kept], old.results)
        )
        labels = function.attributes["arg_attrs"]
        function.attributes["arg_attrs"] = ir.ArrayAttr.get([labels[index] for index in kept])


def _tensor_type(vtensor: Any) -> Any:
    """`tensor<4x2xf32>` for `!torch.vtensor<[4,2],f32>`: the type of a literal's value."""
    ir = load("torch_mlir.ir", "mlir")
    shape, _, dtype = str(vtensor).removeprefix("!torch.vtensor<[").removesuffix(">").partition("],")
    return ir.Type.parse(f"tensor<{''.join(f'{size}x' for size in shape.split(',') if size)}{dtype}>")


def _elements(kind: Any, parameter: Parameter, store: Mapping[str, torch.Tensor]) -> Any:
    ir = load("torch_mlir.ir", "mlir")
    array = bytes_of(parameter, store)
    if array.size * array.itemsize == 0 or kind.rank == 0 or str(kind.element_type) == "i1":
        values = store[parameter.name].detach().cpu().contiguous().numpy()  # resources of these are not reliable
        return ir.DenseElementsAttr.get(values, type=kind) if str(kind.element_type) == "i1" else _splat(kind, values)
    return ir.DenseResourceElementsAttr.get_from_buffer(array, parameter.name, kind)


def _splat(kind: Any, values: Any) -> Any:
    ir = load("torch_mlir.ir", "mlir")
    return ir.DenseElementsAttr.get(np.ascontiguousarray(values), type=kind)


def bytes_of(parameter: Parameter, store: Mapping[str, torch.Tensor]) -> Any:
    """The bytes of a stored tensor, after checking its type; numpy lacks names for some types."""
    if parameter.name not in store:
        raise InputError(
            "a weight of this stage is no longer in memory",
            got=parameter.name,
            fix='Keep the compiled model alive, choose the last stage, or ask for weights="arguments".',
        )
    tensor = store[parameter.name].detach().cpu().contiguous()
    if TensorType.of(tensor) != parameter.type:
        raise CodegenError(
            f"weight '{parameter.name}' does not match the stage", got=TensorType.of(tensor), need=parameter.type
        )
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
