"""Checks which operators an artefact's graph may call, and whether a device supports them."""

from collections.abc import Collection

import torch

from qcompiler.dialects.aten import overload_of
from qcompiler.errors import ArtefactError
from qcompiler.ir import Graph, Op, Role
from qcompiler.ir.op_table import lookup
from qcompiler.runtime.device import Target

NAMESPACES = ("aten", "prims")
"""Namespaces whose operators only compute. Others may also send data, load files or run code."""

TOUCH_FILES = ("aten.from_file", "aten.save")

KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def check_operators(graph: Graph, trust: Collection[str], where: str) -> None:
    """Raises ArtefactError for an operator that does, or may do, more than compute."""
    for op in graph:
        namespace = op.name.partition(".")[0]
        if op.name.startswith(TOUCH_FILES):
            raise ArtefactError("the graph calls an operator that reads or writes files", got=op.name, where=where)
        if lookup(op.name) is None and namespace not in (*NAMESPACES, *trust):
            raise ArtefactError(
                "the graph calls an operator that is neither torch's nor qcompiler's",
                got=op.name,
                need=f"operators of {', '.join(NAMESPACES)}",
                where=where,
                fix=f'If you trust it and the source of the artefact: load(folder, trust=["{namespace}"]).',
            )


def check_device(graph: Graph, device: torch.device, target: Target, where: str) -> None:
    """Raises ArtefactError if the device or the target has no kernel for an operator of the graph."""
    key = KEYS.get(device.type, device.type.upper())
    for op in graph.ops():
        if lookup(op.name) is None:
            name = overload_of(op.name).name()
            if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key):
                raise _impossible(op, device, f"torch has no kernel of {op.name} for it", where)
        elif op.role is not Role.QUANTIZED_MATMUL or op.get("offsets") is not None:
            continue
        elif (why := target.why_not(op.format("x_format"), op.format("w_format"))) is not None:
            raise _impossible(op, device, why, where)


def _impossible(op: Op, device: torch.device, why: str, where: str) -> ArtefactError:
    return ArtefactError(
        f"the model cannot run on {device}",
        got=why,
        where=f"{where}, %{op.results[0].name}",
        fix="Load it on the device that it was compiled for, or compile it again.",
    )
