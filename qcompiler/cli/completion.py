"""`qcompiler completion`: generates a shell completion script from the parser."""

import argparse
from collections.abc import Iterator

import shtab

from qcompiler.cli.parser import MLIR, build_parser, checkpoint_formats
from qcompiler.entry_points import offered
from qcompiler.program.exporters import exporter_names, exporter_targets
from qcompiler.runtime.device import target_names
from qcompiler.schemes.named import GROUP, SCHEMES

FILES = ("FILE", "PATH", "MODEL", "GRAPH")
FOLDERS = ("DIR",)


def run(options: argparse.Namespace) -> int:
    """Prints the script, with the currently known scheme names."""
    parser = build_parser()
    choices = {
        "scheme": sorted({*SCHEMES, *offered(GROUP)}),
        "target": [*target_names(), *exporter_targets()],
        "device": ["cpu", "cuda"],
        "to": [*MLIR, *exporter_names(), *checkpoint_formats()],
    }
    for action in _actions(parser):
        if action.dest in choices:
            action.choices = choices[action.dest]
        elif action.metavar in (*FILES, *FOLDERS):
            action.complete = shtab.FILE if action.metavar in FILES else shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=options.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
