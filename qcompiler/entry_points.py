"""Finds extensions: what installed distributions provide through entry points, and what our own packages register."""

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import Any

from qcompiler.errors import PassError, QCompilerError

EXPORTERS = "qcompiler.exporters"
CHECKPOINTS = "qcompiler.checkpoints"
"""Entry-point groups of exporters and checkpoint formats; here because the command-line parser must not load torch."""


@cache
def import_modules(package: str) -> None:
    """Imports the modules of a package, which register what they define, in alphabetical order."""
    for found in iter_modules(import_module(package).__path__, f"{package}."):
        import_module(found.name)


def offered(group: str) -> dict[str, EntryPoint]:
    """The entry points in a group, by name; the first one found wins."""
    return {entry.name: entry for entry in reversed([*entry_points(group=group)])}


def load(entry: EntryPoint, error: type[QCompilerError] = PassError) -> Any:
    """Loads the object of an entry point; raises `error`, naming the distribution, if the import fails."""
    try:
        return entry.load()
    except QCompilerError:
        raise
    except Exception as reason:  # third-party modules can raise anything
        got = f"{shown(entry)}: {type(reason).__name__}: {reason}"
        raise error("an installed extension cannot be loaded", got=got, fix="Repair or uninstall it.") from reason


def shown(entry: EntryPoint) -> str:
    """The text of an entry point for messages."""
    source = f" of {entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""
    return f"'{entry.name} = {entry.value}'{source}"
