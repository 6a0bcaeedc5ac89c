"""Converts leeways (what a call may omit or add) and tensor sizes to JSON and back."""

from collections.abc import Collection
from typing import Any

from qcompiler.artefact.literals import from_json, to_json
from qcompiler.artefact.strict_json import Node
from qcompiler.capture.leeway import VALUES, Leeway, OptionalTensor
from qcompiler.errors import ParseError
from qcompiler.ir.sizes import Size, parse_size, symbols


def leeway_to_json(leeway: Leeway) -> dict[str, Any]:
    """A leeway as JSON."""
    return {
        "implied": {name: to_json(value) for name, value in leeway.implied.items()},
        "optional": [_optional_to_json(optional) for optional in leeway.optional],
        "ignored": list(leeway.ignored),
        "widened": list(leeway.widened),
    }


def leeway_from_json(node: Node, known: Collection[str]) -> Leeway:
    """Parses the output of `leeway_to_json`. Raises ArtefactError for anything else.

    Args:
        node: The JSON.
        known: The symbols that the inputs of a call determine.
    """
    return Leeway(
        {name: from_json(value) for name, value in node["implied"].members()},
        tuple(_optional_from_json(item, known) for item in node["optional"].items()),
        _texts(node["ignored"]),
        _texts(node["widened"]),
    )


def size_to_json(size: Size) -> int | str:
    """A number, or an expression as text."""
    return size if isinstance(size, int) else str(size)


def size_from_json(node: Node) -> Size:
    """Parses the output of `size_to_json`. Raises ArtefactError for anything else."""
    if isinstance(node.value, int):
        return node.count()
    try:
        return parse_size(node.text())
    except ParseError as error:
        node.wrong(f"a size: {error}")


def _optional_to_json(optional: OptionalTensor) -> dict[str, Any]:
    shape = [size_to_json(size) for size in optional.shape]
    return {"name": optional.name, "value": optional.value, "shape": shape, "without": list(optional.without)}


def _optional_from_json(node: Node, known: Collection[str]) -> OptionalTensor:
    value = node["value"].text()
    if value not in VALUES:
        node["value"].wrong(f"one of {', '.join(VALUES)}")
    shape = tuple(size_from_json(size) for size in node["shape"].items())
    if unknown := {symbol for size in shape for symbol in symbols(size)} - set(known):
        node["shape"].wrong(f"sizes that the inputs decide, not {min(unknown)}")
    return OptionalTensor(node["name"].text(), value, shape, _texts(node["without"]))


def _texts(node: Node) -> tuple[str, ...]:
    return tuple(item.text() for item in node.items())
