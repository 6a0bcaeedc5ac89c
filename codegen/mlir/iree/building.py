"""Builds a folder that IREE's runtime can run on a CPU from a graph."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from codegen.mlir import to_mlir
from codegen.mlir.constants import bytes_of
from codegen.mlir.extras import load
from codegen.mlir.iree.manifest import MANIFEST, MODULE, WEIGHTS, Manifest
from codegen.mlir.iree.manifest import read as read_manifest
from codegen.mlir.module import MlirModule
from qcompiler.errors import CodegenError, InputError
from qcompiler.files.replacing import replacing
from qcompiler.ir import Graph, Value
from qcompiler.runtime.tensor_files import write_tensors


def build(
    graph: Graph,
    folder: str | os.PathLike[str],
    *,
    store: Mapping[str, torch.Tensor] | None = None,
    cpu: str = "generic",
) -> Path:
    """Compiles a graph for the CPU, writes a folder for `load`, and returns its path.

    Args:
        graph: Any stage of any pipeline.
        folder: Where to write; a previously built folder is replaced.
        store: Name -> tensor; default: the graph's own weights.
        cpu: The processor to compile for: "generic" runs on any CPU of the architecture, "host" targets this CPU and is
            faster.

    Raises:
        QCompilerError: torch-mlir or IREE is not installed.
        InputError: The folder cannot be written, or a weight is missing.
        CodegenError: The graph cannot be lowered, or IREE cannot compile it.
    """
    target = Path(folder)
    check_replaceable(target)
    module = to_mlir(graph, "linalg", "arguments", safe_casts=True)
    found = graph.weights if store is None else store
    stored = [argument for argument in module.arguments if argument.kind != "input"]
    for argument in stored:
        bytes_of(argument, found)
    binary = compile_module(module, cpu)
    # Each gets its own memory: tensors may share memory, which a safetensors file does not allow.
    tensors = {argument.name: found[argument.name].detach().cpu().contiguous().clone() for argument in stored}
    size = len(binary) + sum(tensor.nbytes for tensor in tensors.values())
    with replacing(
        target.resolve(), lambda error: InputError("the compiled model cannot be written", got=error), size
    ) as new:
        (new / MODULE).write_bytes(binary)
        write_tensors(tensors, new / WEIGHTS)
        hashes = {name: hashlib.sha256((new / name).read_bytes()).hexdigest() for name in (MODULE, WEIGHTS)}
        _manifest(graph, module, hashes, cpu).write(new)
        check_replaceable(target)
    return target


def compile_module(module: MlirModule, cpu: str = "generic") -> bytes:
    """The binary that IREE's compiler produces from a linalg module.

    Raises:
        QCompilerError: IREE's compiler is not installed.
        CodegenError: It cannot compile the module.
    """
    compiler = load("iree.compiler", "iree")
    flags = [f"--iree-llvmcpu-target-cpu={cpu}"]
    try:
        binary: bytes = compiler.compile_str(module.text, target_backends=["llvm-cpu"], extra_args=flags)
    except compiler.CompilerToolError as error:
        said = [line for line in str(error).splitlines() if "error:" in line]
        raise CodegenError("IREE cannot compile the module", got="; ".join(said[:3]) or error) from error
    return binary


def _manifest(graph: Graph, module: MlirModule, hashes: Mapping[str, str], cpu: str) -> Manifest:
    results = iter(range(len(module.results)))
    outputs = [{"result": next(results)} if isinstance(each, Value) else {"literal": each} for each in graph.outputs]
    if any(isinstance(output.get("literal"), tuple) for output in outputs):
        raise CodegenError("an output of the graph is a list, which the compiled model does not support")
    return Manifest(
        function=module.name,
        inputs={argument.name: str(argument.type) for argument in module.arguments if argument.kind == "input"},
        stored=tuple(argument.name for argument in module.arguments if argument.kind != "input"),
        outputs=tuple(outputs),
        updates=tuple(result.name for result in module.results if result.kind == "update"),
        symbols={name: (bounds.low, bounds.high) for name, bounds in graph.symbols.items()},
        hashes=hashes,
        compiled={"iree": compiler_version(), "cpu": cpu},
    )


def compiler_version() -> str:
    """The version of IREE's compiler."""
    found: Any = load("iree.compiler.version", "iree").VERSION
    return str(found)


def check_replaceable(target: Path) -> None:
    """Raises InputError unless a folder is new, empty, or was built before and holds nothing else."""
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file()):
        need = "a new folder, or one that was built before"
        raise InputError("the output path of the compiled model is in use", got=target, need=need)
    found = {path.name for path in target.iterdir()}
    if found:
        read_manifest(target)
    if extra := sorted(found - {MANIFEST, MODULE, WEIGHTS}):
        raise InputError(
            "the folder holds files of something else",
            got=f"'{extra[0]}' in {target}",
            fix="Write to another folder, or move the file away.",
        )


__all__ = ["build", "check_replaceable", "compile_module", "compiler_version"]
