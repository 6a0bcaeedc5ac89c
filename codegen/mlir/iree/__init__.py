"""Graphs compiled by IREE for the CPU: a folder that is built once, and loaded and called anywhere.

    build(graph, "model.iree")
    model = load("model.iree")
    y = model(x)

The folder holds `model.vmfb`, `weights.safetensors`, and `manifest.json` with the hashes of both. IREE's compiler is
needed to build it, and IREE's runtime to run it: both are the extra `iree`.
"""

from codegen.mlir.iree.building import build
from codegen.mlir.iree.running import IreeModel, load

__all__ = ["IreeModel", "build", "load"]
