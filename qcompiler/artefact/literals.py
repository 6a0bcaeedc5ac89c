"""Converts Python literals, containers, and torch dtypes and devices to JSON and back.

    1, "a", None, True, [1, 2]    as they are
    nan, (1, 2), torch.bfloat16   {"float": "nan"}, {"tuple": [1, 2]}, {"dtype": "bf16"}

Other values do not round-trip: they come back as a `Shown` object with the same repr.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from qcompiler.artefact.strict_json import Node
from qcompiler.ir import DType
from qcompiler.numerics.dtypes import IR_DTYPES, TORCH_DTYPES

LONGEST_SHOWN = 200


class Shown:
    """Placeholder for a value that JSON cannot hold; equal only to itself."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def to_json(value: Any) -> Any:
    """Converts a value to JSON."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) is complex:
        return {"complex": [to_json(value.real), to_json(value.imag)]}
    if type(value) is list:
        return [to_json(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [to_json(item) for item in value]}
    if type(value) is dict:
        return {"dict": [[to_json(key), to_json(item)] for key, item in value.items()]}
    if isinstance(value, torch.dtype) and value in IR_DTYPES:
        return {"dtype": str(IR_DTYPES[value])}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    return {"shown": repr(value)[:LONGEST_SHOWN]}


def is_exact(value: Any) -> bool:
    """Whether a value round-trips through JSON."""
    if type(value) in (list, tuple):
        return all(map(is_exact, value))
    if type(value) is dict:
        return all(is_exact(key) and is_exact(item) for key, item in value.items())
    encoded = to_json(value)
    return not (isinstance(encoded, dict) and "shown" in encoded)


def from_json(node: Node) -> Any:
    """Parses the output of `to_json`. Raises ArtefactError for anything else."""
    if isinstance(node.value, list):
        return [from_json(item) for item in node.items()]
    if not isinstance(node.value, dict):
        return node.value
    ((kind, inner),) = list(node.members()) if len(node.value) == 1 else [("", node)]
    return KINDS[kind](inner) if kind in KINDS else node.wrong(f"an object with one of {', '.join(KINDS)}")


def _float(node: Node) -> float:
    return float(node.text()) if node.text() in ("inf", "-inf", "nan") else node.wrong("inf, -inf or nan")


def _complex(node: Node) -> complex:
    parts = [from_json(item) for item in node.items()]
    if len(parts) != 2 or not all(isinstance(part, float) for part in parts):
        node.wrong("two numbers")
    return complex(*parts)


def _dict(node: Node) -> dict[Any, Any]:
    pairs = [item.items() for item in node.items()]
    try:
        return {from_json(key): from_json(item) for key, item in pairs}
    except (TypeError, ValueError):
        node.wrong("pairs of a key and a value")


def dtype_from(node: Node) -> torch.dtype:
    """The dtype with the given IR name."""
    name = node.text()
    return TORCH_DTYPES[DType[name]] if name in DType.__members__ else node.wrong("a dtype such as bf16")


def device_from(node: Node) -> torch.device:
    """Parses a device."""
    try:
        return torch.device(node.text())
    except RuntimeError:
        node.wrong("a device such as cpu or cuda:0")


KINDS: dict[str, Callable[[Node], Any]] = {
    "float": _float,
    "complex": _complex,
    "tuple": lambda node: tuple(from_json(item) for item in node.items()),
    "dict": _dict,
    "dtype": dtype_from,
    "device": device_from,
    "shown": lambda node: Shown(node.text()),
}
