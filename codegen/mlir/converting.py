"""`to_mlir`: converts graphs to MLIR through torch-mlir: the torch dialect, or linalg on tensors.

    module = to_mlir(graph, dialect="linalg")
    print(module, module.arguments)

`quant` and `kernel` operations are decomposed into ATen; scales stay values, sizes stay symbolic, and 8-bit codes stay
8-bit codes. torch-mlir, the extra `mlir`, is loaded on the first call.
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
from qcompiler.runtime.caches import cache_types

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
    """Converts a graph to an MLIR module with one function, verified by a round trip through the parser.

    Args:
        graph: Any stage of any pipeline.
        dialect: "torch", or "linalg" for linalg on tensors.
        weights: "arguments" of the function, after the inputs; "resource", in the text; or "elide", omitted from it.
        store: Name -> tensor, for "resource"; default: the graph's own weights.
        safe_casts: Decompose FP8 casts for compilers whose own casts are wrong; see `casts`.

    Raises:
        QCompilerError: torch-mlir is not installed.
        InputError: An option has an unknown value, or a weight is missing.
        CodegenError: Some operations cannot be converted; the message lists all of them.
    """
    for name, known in ((dialect, DIALECTS), (weights, WEIGHTS)):
        if name not in known:
            raise InputError("to_mlir got an unknown option value", got=repr(name), fix=did_you_mean(str(name), known))
    if caches := cache_types(graph):
        raise CodegenError(
            "a graph with key-value caches cannot be lowered to MLIR",
            got=f"{len(caches)} caches",
            fix="Lower a stage before the pass kv-cache.",
        )
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
    """The result of `build` for the whole graph; on failure, raises an error that lists every failing operation."""
    try:
        return build(traced.graph, traced.interface)
    except InputError:
        raise
    except Exception as error:  # the importer raises arbitrary exceptions
        refusals = Refusals(f"cannot be lowered to {dialect}")
        find(traced.graph, build, refusals)
        refusals.check()
        if isinstance(error, CodegenError):
            raise
        raise CodegenError(f"the graph cannot be lowered to {dialect}: {type(error).__name__}: {error}") from error
