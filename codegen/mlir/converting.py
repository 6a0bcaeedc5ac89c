"""`to_mlir`: graphs in MLIR, through torch-mlir: the torch dialect, or linalg on tensors.

    module = to_mlir(graph, dialect="linalg")
    print(module, module.arguments)

What `quant` and `kernel` mean is taken apart into ATen; scales stay values, sizes stay symbolic, and 8-bit codes stay
8-bit codes. torch-mlir is loaded when this is called: it is the extra `mlir`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from codegen.mlir.constants import embed
from codegen.mlir.decompositions import table
from codegen.mlir.importing import import_graph, label
from codegen.mlir.interface import Interface
from codegen.mlir.lowering import TO_LINALG, run
from codegen.mlir.module import MlirModule, verified_text
from codegen.mlir.tracing import Traced, trace
from codegen.mlir.unsupported import Refusals, find
from qcompiler.errors import CodegenError, InputError, did_you_mean
from qcompiler.ir import Graph

DIALECTS = ("torch", "linalg")
WEIGHTS = ("arguments", "resource", "elide")


def to_mlir(
    graph: Graph,
    dialect: str = "torch",
    weights: str = "arguments",
    *,
    store: Mapping[str, torch.Tensor] | None = None,
    safe_casts: bool = False,
) -> MlirModule:
    """A graph as a module of MLIR with one function, verified, and read back to the same text.

    Args:
        graph: Any stage of any pipeline.
        dialect: "torch", or "linalg" for linalg on tensors.
        weights: "arguments" of the function, behind the inputs; "resource", in the text; or "elide", left out of it.
        store: Name -> tensor, for "resource"; left out, the graph's own weights.
        safe_casts: Spell casts to and from FP8 for compilers whose own are wrong; see `casts`.

    Raises:
        QCompilerError: torch-mlir is not installed.
        InputError: There is no such dialect or form, or a weight is missing.
        CodegenError: Some operations have no form there; the message lists all of them.
    """
    for name, known in ((dialect, DIALECTS), (weights, WEIGHTS)):
        if name not in known:
            raise InputError("to_mlir knows no such word", got=repr(name), fix=did_you_mean(str(name), known))
    traced = trace(graph, table(safe_casts))
    parameters = traced.interface.parameters
    found = graph.weights if store is None else store

    def build(part: torch.fx.Graph, interface: Interface | None = None) -> Any:
        module = import_graph(part, graph.name)
        if interface is not None:
            label(module, interface)
            if weights != "arguments":
                embed(module, parameters, found if weights == "resource" else None)
        if dialect == "linalg":
            run(module, TO_LINALG)
        return module

    text = verified_text(_explained(build, traced, dialect))
    kept = tuple(each for each in parameters if weights == "arguments" or each.kind != "weight")
    return MlirModule(text, graph.name, dialect, kept, traced.interface.results)


def _explained(build: Callable[..., Any], traced: Traced, dialect: str) -> Any:
    """What `build` makes of the whole graph; where it fails, an error about every operation that it fails for."""
    try:
        return build(traced.graph, traced.interface)
    except InputError:
        raise
    except Exception as error:  # the importer raises whatever it likes
        refusals = Refusals(f"cannot be lowered to {dialect}")
        find(traced.graph, build, refusals)
        refusals.check()
        if isinstance(error, CodegenError):
            raise
        raise CodegenError(f"the graph cannot be lowered to {dialect}: {type(error).__name__}: {error}") from error
