"""Strict reader for untrusted JSON: bounded size, no duplicate keys, typed access."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from qcompiler.errors import ArtefactError

WIDTH = 100

LONGEST = 256 << 20
"""Maximum size of a text in bytes."""


def render(value: Any) -> str:
    """Deterministic JSON text: short values on one line, longer ones with one member per line."""
    return _rendered(value, "") + "\n"


def _rendered(value: Any, indent: str) -> str:
    line = json.dumps(value, allow_nan=False)
    if len(line) + len(indent) <= WIDTH or not value or not isinstance(value, dict | list):
        return line
    inner = indent + "  "
    if isinstance(value, dict):
        rows = [f"{json.dumps(key)}: {_rendered(item, inner)}" for key, item in value.items()]
    else:
        rows = [_rendered(item, inner) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(rows) + f"\n{indent}{closing}"


def canonical(value: Any) -> bytes:
    """The canonical JSON of a value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse(text: bytes, file: Path) -> "Node":
    """Parses `text`. Raises ArtefactError if it is not JSON or too long."""
    if len(text) > LONGEST:
        raise ArtefactError(
            "a file of the artefact is too long", got=f"{len(text)} bytes", need=LONGEST, where=str(file)
        )
    try:
        return Node(json.loads(text, object_pairs_hook=_unique, parse_constant=_refused), "", file)
    except (ValueError, RecursionError) as error:
        raise ArtefactError("a file of the artefact is not JSON", got=error, where=str(file), fix=AGAIN) from None


AGAIN = "It was edited or damaged: save the model again, or copy the artefact again."


class Node:
    """A JSON value with its location, for error messages.

    Args:
        value: The value from Python's json.
        place: The path in the document, such as `weights.files[0]`.
        file: The source file.
    """

    def __init__(self, value: Any, place: str, file: Path) -> None:
        self.value, self.place, self.file = value, place, file

    def wrong(self, need: str) -> NoReturn:
        """Raises ArtefactError for an invalid value."""
        shown = repr(self.value)
        got = shown if len(shown) <= 80 else f"{shown[:77]}..."
        where = f"{self.file}, {self.place}" if self.place else str(self.file)
        raise ArtefactError("the artefact has a wrong value", got=got, need=need, where=where, fix=AGAIN)

    def __getitem__(self, key: str) -> "Node":
        """A required member of an object."""
        if not isinstance(self.value, dict):
            self.wrong("an object")
        if key not in self.value:
            self.wrong(f"a member {key!r}")
        return self._member(key)

    @property
    def missing(self) -> bool:
        """Whether the value is null."""
        return self.value is None

    def text(self) -> str:
        """A string."""
        return self.value if isinstance(self.value, str) else self.wrong("a string")

    def flag(self) -> bool:
        """True or false."""
        return self.value if isinstance(self.value, bool) else self.wrong("true or false")

    def count(self) -> int:
        """A nonnegative integer."""
        value = self.value
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return int(value) if is_count else self.wrong("an integer that is not negative")

    def number(self) -> float:
        """A finite number."""
        value = self.value
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if is_number else self.wrong("a number")

    def items(self) -> "list[Node]":
        """The items of a list."""
        if not isinstance(self.value, list):
            self.wrong("a list")
        return [Node(item, f"{self.place}[{index}]", self.file) for index, item in enumerate(self.value)]

    def members(self) -> "Iterator[tuple[str, Node]]":
        """Keys and values of an object."""
        if not isinstance(self.value, dict):
            self.wrong("an object")
        return ((key, self._member(key)) for key in self.value)

    def _member(self, key: str) -> "Node":
        return Node(self.value[key], f"{self.place}.{key}" if self.place else key, self.file)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a duplicate member")
    return found


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
