"""Compiles graphs with IREE for the CPU: a folder that is built once, then loaded and called anywhere.

    build(graph, "model.iree")
    model = load("model.iree")
    y = model(x)

The folder holds `model.vmfb`, `weights.safetensors`, and `manifest.json` with the hashes of both. Building needs IREE's
compiler, running needs IREE's runtime: both are in the extra `iree`.
"""

from codegen.mlir.iree.building import build
from codegen.mlir.iree.running import IreeModel, load

__all__ = ["IreeModel", "build", "load"]
