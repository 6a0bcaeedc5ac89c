"""Finds what capture fixes although the model does not, as sentences for the user.

Sizes that weights require are not listed: the model itself does not accept others. So the model is run at another size,
and only sizes that the model accepts and the graph does not are listed:

    dimension 1 of x is fixed to 7 (model.py:10)
    dimension 0 of ids is at least 2
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from traceback import FrameSummary
from typing import Any

import sympy
import torch
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from qcompiler.capture.examples import Call, resized, sizes_of, with_sizes
from qcompiler.capture.locations import is_users, short_path
from qcompiler.capture.open_sizes import ASSUMED_LOW
from qcompiler.capture.runs import does_run
from qcompiler.capture.signature import Signature, TensorSlot
from qcompiler.ir.sizes import symbols

SOURCE = re.compile(r"L\['(?P<name>\w+)'\](?P<rest>.*)\.size\(\)\[(?P<axis>\d+)\]")
"""Torch's name for a size of an argument."""

MOST_AXES = 4
"""Up to this many fixed sizes of equal value are also tried one at a time."""

LARGEST_RUN = 4096
"""Largest size at which a model is run only to find out whether it works."""

Axis = tuple[int, int]
"""(flat argument, dimension)."""


def fixed_sizes(
    model: torch.nn.Module, signature: Signature, call: Call, lines: Mapping[str, str], skipped: Sequence[str] = ()
) -> list[str]:
    """Lists each size that is fixed or bounded in the graph, but not in the model.

    Args:
        model: The captured model.
        signature: The calling convention of the graph.
        call: The user's example.
        lines: `dimension 1 of x` -> the source line that made torch fix it, if known.
        skipped: Path prefixes of arguments with inherent sizes, such as caches of a maximum length.
    """
    found = []
    for axes in _equal(signature, skipped).values():
        if _runs_resized(model, call, axes):
            found += axes
        elif 1 < len(axes) <= MOST_AXES:
            found += [axis for axis in axes if _runs_resized(model, call, [axis])]
    said = []
    for index, dim in sorted(found):
        name = f"dimension {dim} of {signature.slots[index].path}"
        line = f" ({lines[name]})" if name in lines else ""
        said.append(f"{name} is fixed to {signature.slots[index].shape[dim]}{line}")  # type: ignore[union-attr]
    return said + list(_bounded(model, signature, call))


def specialized_at(program: ExportedProgram) -> dict[str, str]:
    """Returns `dimension 1 of x` -> the source line of the model that made torch fix that size."""
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
    env = next((v.fake_mode.shape_env for v in values if isinstance(v, FakeTensor)), None)
    found: dict[str, str] = {}
    if env is None:
        return found
    for guard in env.guards:
        frame = guard.sloc.framework_loc
        if not isinstance(guard.expr, sympy.Equality) or not isinstance(frame, FrameSummary):
            continue
        for symbol in guard.expr.free_symbols if is_users(frame.filename) else ():
            for source in env.var_to_sources.get(symbol, ()):
                if match := SOURCE.fullmatch(_name(source)):
                    size = f"dimension {match['axis']} of {match['name']}{match['rest']}"
                    found.setdefault(size, f"{short_path(frame.filename)}:{frame.lineno}")
    return found


def _name(source: Any) -> str:
    """Returns the name of an input's size, which some versions of torch compute in a method."""
    return str(source.name() if callable(source.name) else source.name)


def _equal(signature: Signature, skipped: Sequence[str]) -> dict[int, list[Axis]]:
    """Groups fixed dimensions by size; omits dimensions of size 1 that broadcast: all but batches and sequences."""
    found: dict[int, list[Axis]] = {}
    for index, slot in enumerate(signature.slots):
        if not isinstance(slot, TensorSlot) or slot.path.startswith(tuple(skipped)):
            continue
        for dim, size in enumerate(slot.shape):
            if isinstance(size, int) and (size > 1 or dim == 0 or (dim == 1 and len(slot.shape) <= 3)):
                found.setdefault(size, []).append((index, dim))
    return found


def _runs_resized(model: torch.nn.Module, call: Call, axes: Sequence[Axis]) -> bool:
    """Whether the model runs with these dimensions, all of one size, at another size."""
    leaves, spec = pytree.tree_flatten(call)
    size = int(leaves[axes[0][0]].shape[axes[0][1]])
    for other in (size - 1, size + 1) if size > 1 else (2,) if size else ():
        varied: list[Any] = list(leaves)
        for index, dim in axes:
            shape = list(varied[index].shape)
            shape[dim] = other
            varied[index] = resized(varied[index], shape)
        if does_run(model, pytree.tree_unflatten(varied, spec)):
            return True
    return False


def _bounded(model: torch.nn.Module, signature: Signature, call: Call) -> Iterator[str]:
    """Yields the symbols whose range is narrower than the model's."""
    sizes = sizes_of(signature, call)
    for name, bounds in signature.symbols.items():
        if name not in sizes:
            continue
        peers = [other for other in sizes if sizes[other] == sizes[name]]
        if bounds.low == ASSUMED_LOW and _runs_at(model, signature, call, {**sizes, **dict.fromkeys(peers, 1)}):
            yield f"{_place(signature, name)} is at least {bounds.low}"
        if bounds.high is not None and (
            bounds.high > LARGEST_RUN
            or _runs_at(model, signature, call, {**sizes, **dict.fromkeys(peers, bounds.high + 1)})
        ):
            yield f"{_place(signature, name)} is at most {bounds.high}"


def _runs_at(model: torch.nn.Module, signature: Signature, call: Call, sizes: Mapping[str, int]) -> bool:
    varied = with_sizes(signature, call, sizes)
    return varied is not None and does_run(model, varied)


def _place(signature: Signature, symbol: str) -> str:
    """Returns the first dimension whose size is the symbol."""
    for slot in signature.slots:
        for dim, size in enumerate(slot.shape if isinstance(slot, TensorSlot) else ()):
            if symbol in symbols(size):
                return f"dimension {dim} of {slot.path}" + ("" if str(size) == symbol else f", as {symbol} in {size},")
    return symbol
