"""Imports torch.fx into MLIR's torch dialect, verified, with graph names and types on the function's arguments.

func.func @MLP(%arg0: !torch.vtensor<[?,256],f32> {qcompiler.name = "x", qcompiler.type = "f32[s0, 256]"}, …)
"""

from collections.abc import Sequence
from typing import Any

import torch.fx

from codegen.mlir.extras import load
from codegen.mlir.interface import Interface, Parameter, Result
from qcompiler.errors import CodegenError


class Unknown(CodegenError):
    """The torch dialect does not have this operation."""


def import_graph(graph: torch.fx.Graph, name: str) -> Any:
    """A module with one function, in its own context.

    Raises:
        Exception: The importer raises many types.
    """
    made = load("torch_mlir.extras.fx_importer", "mlir").FxImporter(context=context_with_torch())
    made.import_stateless_graph(graph, func_name=name)
    for operation in body(made.module).operations:
        if operation.operation.name == "torch.operator":
            raise Unknown("the torch dialect has no such operation")
    return made.module


def context_with_torch() -> Any:
    """A new MLIR context with the torch dialect loaded."""
    context = load("torch_mlir.ir", "mlir").Context()
    load("torch_mlir.dialects.torch", "mlir").register_dialect(context)
    return context


def label(module: Any, interface: Interface) -> None:
    """Attaches graph names and types to the function's arguments and results."""
    ir = load("torch_mlir.ir", "mlir")
    (function,) = module.body.operations

    def attributes(things: Sequence[Parameter | Result]) -> Any:
        shown = ({"qcompiler.name": thing.name, "qcompiler.type": str(thing.type)} for thing in things)
        texts = ({key: ir.StringAttr.get(text) for key, text in pair.items()} for pair in shown)
        return ir.ArrayAttr.get([ir.DictAttr.get(pair) for pair in texts])

    with module.context:
        function.attributes["arg_attrs"] = attributes(interface.parameters)
        function.attributes["res_attrs"] = attributes(interface.results)


def body(module: Any) -> Any:
    """The block of the only function of a module."""
    (function,) = module.body.operations
    return function.regions[0].blocks[0]
