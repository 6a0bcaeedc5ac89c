"""Extracts descriptions from docstrings of classes, so that printed lists stay up to date."""

import inspect
import re
import sys
from dataclasses import MISSING, fields
from typing import Any

from qcompiler.pass_manager.options import default_of, print_option
from qcompiler.pass_manager.pipeline import PASSES, Pass

_ENTRY = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.M)


def first_line(thing: Any) -> str:
    """The first line of a docstring; for a pass, its "before -> after"."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def sentence(kind: type[Pass]) -> str:
    """One sentence about a pass: the first line of its module, if the module defines only this pass."""
    alone = sum(other.__module__ == kind.__module__ for other in PASSES.values()) == 1
    module = sys.modules.get(kind.__module__)
    return first_line(module) if alone and module is not None and module.__doc__ else ""


def attributes(kind: type) -> dict[str, str]:
    """Attribute -> its text under "Attributes:" in the class or a base class."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        _, _, listed = (inspect.cleandoc(each.__doc__ or "")).partition("Attributes:\n")
        found |= {name: " ".join(text.split()) for name, text in _ENTRY.findall(listed)}
    return found


def options_of(kind: type[Pass]) -> list[dict[str, str | None]]:
    """Each option of a pass: name, default as text (None if required), and description."""
    says = attributes(kind)
    return [
        {
            "name": option.name,
            "default": None if default_of(option) is MISSING else print_option(default_of(option)),
            "doc": says.get(option.name, ""),
        }
        for option in fields(kind)
    ]
