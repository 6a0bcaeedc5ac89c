"""One architecture of the zoo: compiled, run at two sizes, and compared with a simulation of the same format."""

import copy
import math
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qcompiler
from benchmarks.zoo.simulation import Fp8Tiles, address
from benchmarks.zoo.subjects import Call, Entry
from qcompiler.errors import InputError, QCompilerError

SIZES = ((2, 12), (3, 17))
"""Rows and lengths: of the example inputs, and of a call that was not traced."""

BOUND = 2.0
"""The largest allowed error, relative to the simulation's."""

DESTROYED = 0.5
"""The largest error allowed for any model; the simulation cannot judge which layers are quantized."""

CACHES = (".cache[", ".past_key_values[", ".cache_params[", ".state[")
"""Outputs that a causal model is captured without, unless a call passes a cache."""


class SimulationError(Exception):
    """The simulation did not round the same layers as the compiled model; not a fault of the compiler."""


def measure(entry: Entry) -> dict[str, Any]:
    """One row of the table.

    The status is "ok", "error" (larger than `BOUND` times the simulation's, or than `DESTROYED`), "refused" (a
    `QCompilerError`), "crash" (any other exception, while compiling or running), "absent" (a package is not
    installed), or "broken" (the fault is the zoo's).
    """
    cpu = time.process_time()
    row = {"family": entry.family, "name": entry.name, **judged(entry)}
    return row | {"CPU s": time.process_time() - cpu}


def judged(entry: Entry) -> dict[str, Any]:
    """The status and its cause."""
    torch.manual_seed(0)
    row: dict[str, Any] = {}
    try:
        model, inputs = entry.build()
    except ImportError as error:
        return row | {"status": "absent", "message": str(error)}
    except Exception:
        return row | {"status": "broken", "message": traceback.format_exc()}
    model = filled(model.eval())
    calls = [inputs(*size) for size in SIZES]
    settle(model, calls[0])
    try:
        compiled = qcompiler.compile(model, target="cpu", example_kwargs=copy.deepcopy(calls[0]))
    except QCompilerError as error:
        return row | {"status": "refused", "message": f"{type(error).__name__}: {error}"}
    except Exception:
        return row | {"status": "crash", "message": traceback.format_exc()}
    row |= described(compiled)
    try:
        return row | compared(compiled, model, calls)
    except SimulationError as error:
        return row | {"status": "broken", "message": str(error)}
    except Exception:
        return row | {"status": "crash", "message": traceback.format_exc()}


def filled(model: nn.Module) -> nn.Module:
    """Replaces all-zero matrices, which would hide all earlier layers, by random numbers."""
    for tensor in model.parameters():
        if tensor.dim() > 1 and tensor.is_floating_point() and not tensor.any():
            nn.init.normal_(tensor, std=tensor.shape[-1] ** -0.5)
    return model.requires_grad_(False)


def settle(model: nn.Module, call: Call) -> None:
    """Gives batch norms the statistics of a call: with the initial ones, activations shrink from layer to layer."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = None  # take the mean over calls (here one)
    if norms:
        outputs(model, call)
        model.eval()


def described(compiled: Any) -> dict[str, Any]:
    """The compiler's facts about the model."""
    rows, graph = compiled.report.rows, compiled.stages["captured"]
    types = [value.type for value in graph.inputs]
    symbols = {str(size) for kind in types for size in getattr(kind, "shape", ()) if not isinstance(size, int)}
    reasons: dict[str, int] = {}
    for each in compiled.report.skipped:
        reasons[each.reason] = reasons.get(each.reason, 0) + 1
    return {
        "inputs": [str(kind) for kind in types],
        "open": len(symbols),
        "matmuls": sum(each.is_matmul for each in rows),
        "quantized": len(compiled.report.quantized),
        "reasons": reasons,
    }


def compared(compiled: Any, model: nn.Module, calls: list[Call]) -> dict[str, Any]:
    """Errors relative to float and the status; the larger error of the two sizes."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    names = {name for row in compiled.report.quantized for name in row.weights}
    alone = {name for row in compiled.report.skipped for name in row.weights}
    wanted = [tensors[name] for name in sorted(names - alone) if name in tensors]
    found: dict[str, Any] = {"error": 0.0, "simulated": 0.0, "ratio": 0.0}
    destroyed = False
    for index, call in enumerate(calls):
        try:
            got = outputs(compiled, call)
        except InputError as refusal:
            if not index:
                raise
            found["other size"] = str(refusal)
            continue
        want = outputs(model, call)
        fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # the fast path hides the matmuls of a layer in one operation
        try:
            with Fp8Tiles(tensors.values(), wanted) as tiles:
                simulated = outputs(model, call)
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
        if missed := [name for name in names - alone if name in tensors and tensors[name].dim() > 1
                      and address(tensors[name]) not in tiles.reached]:  # fmt: skip
            raise SimulationError(f"the simulation did not reach {missed}")
        error, bound = difference(got, want), difference({place: simulated[place] for place in got}, want)
        ratio = error / bound if bound else math.inf if error else 0.0
        destroyed = destroyed or error > DESTROYED
        if ratio >= found["ratio"]:
            found |= {"error": error, "simulated": bound, "ratio": ratio}
    good = found["ratio"] <= BOUND and not destroyed
    return {"status": "ok" if good else "error", **found}


def outputs(model: Any, call: Call) -> dict[str, Tensor]:
    """The floating-point outputs of one call in FP64, by their place in the returned value."""
    torch.manual_seed(0)  # some models draw the order of their patches
    with torch.no_grad():
        returned = model(**copy.deepcopy(call))
    return {place: tensor.double() for place, tensor in placed(returned, "") if tensor.is_floating_point()}


def placed(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a nested value and their places."""
    if isinstance(value, Mapping):
        children: Iterable[tuple[str, Any]] = ((f"{place}.{key}", item) for key, item in value.items())
    elif isinstance(value, Tensor):
        yield place, value
        return
    else:
        items = value if isinstance(value, list | tuple) else pytree.tree_leaves(value)
        children = ((f"{place}[{index}]", item) for index, item in enumerate(items) if item is not value)
    for name, item in children:
        yield from placed(item, name)


def difference(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """The relative norm of the difference, as the root mean square over outputs that are finite and not zero."""
    lost = [place for place in want if place not in got and not any(name in place for name in CACHES)]
    if lost or not got or not got.keys() <= want.keys():
        raise ValueError(f"the outputs differ: got {list(got)}, expected {list(want)}")
    squares = []
    for place, tensor in got.items():
        other = want[place]
        if tensor.shape != other.shape or not torch.equal(tensor.isfinite(), other.isfinite()):
            raise ValueError(f"output {place} differs: {tuple(tensor.shape)} instead of {tuple(other.shape)}, or Inf")
        finite = other.isfinite()
        tensor, other = tensor[finite], other[finite]
        if norm := float(other.norm()):
            squares.append((float((tensor - other).norm()) / norm) ** 2)
    return math.sqrt(sum(squares) / len(squares)) if squares else math.inf
