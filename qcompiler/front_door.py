"""Loads public names on first use, so `import qcompiler` loads neither torch nor triton.

The names are listed once, in `qcompiler/__init__.pyi`, which type checkers also read.
"""

import ast
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LIGHT = ("instruments",)
"""Submodules that do not need the operation table."""

SIBLINGS = ("passes", "codegen")


@cache
def public_names() -> dict[str, str]:
    """Name -> the module that defines it, or the package that contains it if it is a submodule."""
    stub = ast.parse(Path(__file__).with_name("__init__.pyi").read_text(encoding="utf-8"))
    found = (node for node in stub.body if isinstance(node, ast.ImportFrom))
    return {alias.name: str(node.module) for node in found for alias in node.names}


def load(name: str) -> Any:
    """The public object called `name`; raises AttributeError if it does not exist."""
    if name == "__version__":
        return _version()
    home = public_names().get(name)
    if home is None:
        raise AttributeError(f"module 'qcompiler' has no attribute {name!r}")
    if name not in LIGHT:
        _check_siblings()
        import_module("qcompiler.dialects")  # fills the operation table
    if home != "qcompiler" and hasattr(package := import_module(home), name):
        return getattr(package, name)
    return import_module(f"{home}.{name}")


def _version() -> str:
    try:
        return version("qcompiler")
    except PackageNotFoundError:
        return "0+unknown"


def _check_siblings() -> None:
    """Rejects other packages named `passes` or `codegen`, because both names are common."""
    root = Path(__file__).resolve().parent.parent
    for sibling in SIBLINGS:
        spec = find_spec(sibling)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found is None:
            raise ImportError(
                f"qcompiler's own package '{sibling}' is missing from {root / sibling}. Reinstall qcompiler."
            )
        if found != root / sibling:
            raise ImportError(
                f"qcompiler ships its own top-level package '{sibling}' at {root / sibling}, but Python finds "
                f"{found} first. Rename or move the other '{sibling}', or start Python from another folder."
            )
