"""`qcompiler passes` and `qcompiler schemes`: list all, plugins included."""

import argparse
import sys
from typing import Any

from qcompiler.cli.docstrings import first_line, options_of
from qcompiler.cli.output import print_json
from qcompiler.entry_points import offered
from qcompiler.errors import PassError
from qcompiler.pass_manager.options import print_option
from qcompiler.pass_manager.pipeline import GROUP, PASSES, pass_class
from qcompiler.schemes.named import Scheme, all_schemes, values_of


def run(options: argparse.Namespace) -> int:
    """Lists passes or schemes; broken ones go to standard error."""
    listed, broken = _passes() if options.command == "passes" else _schemes()
    if options.json:
        print_json({options.command: listed, "broken": broken})
        return 0
    for entry in listed:
        print("\n".join(_pass_lines(entry) if options.command == "passes" else _scheme_lines(entry)))
    for name, why in broken.items():
        print(f"{name}: {why}", file=sys.stderr)
    return 0


def _passes() -> tuple[list[dict[str, Any]], dict[str, str]]:
    broken = {}
    for name in offered(GROUP):
        try:
            pass_class(name)
        except PassError as error:
            broken[name] = str(error)
    listed = [
        {"name": name, "effect": kind.effect.value, "budget": kind.budget, "doc": first_line(kind),
         "options": options_of(kind)}
        for name, kind in sorted(PASSES.items())
    ]  # fmt: skip
    return listed, broken


def _pass_lines(entry: dict[str, Any]) -> list[str]:
    lines = [f"{entry['name']:24} {entry['effect']:9} {entry['doc']}"]
    for option in entry["options"]:
        default = "(required)" if option["default"] is None else f"= {option['default']}"
        lines.append(f"{'':35}{option['name']} {default}")
    return lines


def _schemes() -> tuple[list[dict[str, Any]], dict[str, str]]:
    listed, broken = [], {}
    for name, scheme in all_schemes().items():
        if not isinstance(scheme, Scheme):
            broken[name] = str(scheme)
            continue
        known = None if scheme.spec is None else values_of(scheme.spec)
        values = {each: print_option(getattr(known, each)) for each in scheme.options}
        listed.append({
            "name": name, "doc": scheme.doc, "pipeline": scheme.pipeline, "options": values,
        })  # fmt: skip
    return listed, broken


def _scheme_lines(entry: dict[str, Any]) -> list[str]:
    lines = [entry["name"], f"    {entry['doc']}", f"    {entry['pipeline']}"]
    if entry["options"]:
        lines.append(f"    options: {', '.join(f'{name}={value}' for name, value in entry['options'].items())}")
    return lines
