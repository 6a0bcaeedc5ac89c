"""What the commands know of a folder that IREE runs, as `qcompiler compile --target iree-cpu` writes it."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from codegen.mlir.iree.manifest import MANIFEST, Manifest, checked_bytes, is_built, read
from qcompiler.capture.signature import Signature
from qcompiler.cli.output import print_json, print_table
from qcompiler.compiler.program import graph_as_captured
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Range, parse_type

__all__ = ["check", "inspect", "is_built", "refuse", "signature_of"]

KEEP = "Keep an artefact: compile without --target iree-cpu, and make such a folder of it by export --to iree."
GRAPHS = ("stage", "diff", "op", "source")


def inspect(options: argparse.Namespace) -> int:
    """Says how it is called; InputError when graphs are asked for."""
    if asked := [name for name in GRAPHS if getattr(options, name)]:
        raise InputError("a folder that IREE runs holds no graphs", got=f"--{asked[0]}", fix=KEEP)
    manifest = read(Path(options.path))
    if options.json:
        print_json({"iree": asdict(manifest)})
        return 0
    print_table(["input", "type"], [*manifest.inputs.items()])
    ranges = (f"{name} in {Range(*bounds)}" for name, bounds in manifest.symbols.items())
    print(f"sizes: {', '.join(ranges) or 'all fixed'}")
    print(f"{_counted(len(manifest.outputs), 'output')}, {_counted(len(manifest.stored), 'weight')}, "
          f"{_counted(len(manifest.updates), 'update')}")  # fmt: skip
    print(f"{_title(options.path, manifest)}: codegen.mlir.iree.load runs it")
    return 0


def refuse(folder: str) -> None:
    """InputError for such a folder where an artefact is needed."""
    if is_built(Path(folder)):
        raise InputError(
            "a folder that IREE runs holds no graphs and no report", got=folder, need="an artefact", fix=KEEP
        )


def check(options: argparse.Namespace) -> int:
    """Says whether the files are those that were written; 1 when they are not."""
    folder = Path(options.artefact)
    manifest = read(folder)
    files = {name: _problem(partial(checked_bytes, folder, name, manifest)) for name in manifest.hashes}
    problems = [problem for problem in files.values() if problem is not None]
    extra = sorted(path.name for path in folder.iterdir() if path.name not in (MANIFEST, *files))
    if options.json:
        print_json({"artefact": str(folder.resolve()), "ok": not problems, "problems": problems,
                    "files": {MANIFEST: None, **files}, "extra": extra})  # fmt: skip
    else:
        print(_title(str(folder), manifest))
        print("\n".join(f"wrong: {problem}" for problem in problems) or "everything is as it was written")
        print(*(f"not a part of it: {name}\n" for name in extra), sep="", end="")
    return 1 if problems else 0


def signature_of(manifest: Manifest) -> Signature:
    """How it is called: with the inputs of its graph, in order."""
    graph = Graph(manifest.function)
    graph.symbols = {name: Range(*bounds) for name, bounds in manifest.symbols.items()}
    for name, text in manifest.inputs.items():
        graph.add_input(name, parse_type(text))
    return graph_as_captured(graph).signature


def _title(folder: str, manifest: Manifest) -> str:
    made = manifest.compiled
    return f"{folder}: @{manifest.function}, compiled by IREE {made.get('iree')} for the CPU '{made.get('cpu')}'"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _problem(step: Callable[[], object]) -> str | None:
    try:
        step()
    except InputError as error:
        return str(error)
    return None
