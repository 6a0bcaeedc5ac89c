"""What installed distributions add to qcompiler, through entry points."""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from qcompiler.errors import PassError, QCompilerError

EXPORTERS = "qcompiler.exporters"
"""The group of exporters, here because the command line's parser must not load torch."""


def offered(group: str) -> dict[str, EntryPoint]:
    """What installed distributions offer in a group, by name; the first of a name counts."""
    return {entry.name: entry for entry in reversed([*entry_points(group=group)])}


def load(entry: EntryPoint, error: type[QCompilerError] = PassError) -> Any:
    """The object of an entry point; `error` names the distribution if it cannot be imported."""
    try:
        return entry.load()
    except QCompilerError:
        raise
    except Exception as reason:  # somebody else's module may fail in any way
        got = f"{shown(entry)}: {type(reason).__name__}: {reason}"
        raise error("an installed extension cannot be loaded", got=got, fix="Repair or uninstall it.") from reason


def shown(entry: EntryPoint) -> str:
    """An entry point in a message."""
    source = f" of {entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""
    return f"'{entry.name} = {entry.value}'{source}"
