"""`qcompiler opt`: runs passes over the text of a graph and prints the result."""

import argparse
import sys
from pathlib import Path

import qcompiler.dialects  # noqa: F401  (fills the table of operations)
from qcompiler.errors import InputError
from qcompiler.files.replacing import not_replaced, replacing_file
from qcompiler.ir import Graph
from qcompiler.pass_manager.instruments import CheckChanged, Dump, Instrument, PrintAfter, TimePasses
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.schemes.named import pipeline


def run(options: argparse.Namespace) -> int:
    """Reads a graph, runs passes, and writes the graph."""
    steps = Pipeline.parse(options.pipeline) if options.pipeline is not None else pipeline(options.scheme)
    graph = read_graph(options.graph)
    instruments: list[Instrument] = [PrintAfter(*options.print_after)] if options.print_after else []
    instruments += [Dump(options.dump)] if options.dump else []
    instruments += [CheckChanged()] if options.verify_each else []
    instruments += [TimePasses(file=sys.stderr)] if options.time_passes else []
    done = run_pipeline(steps, graph, instruments=instruments)
    if options.explain:
        for stage, reasons in done.skipped.items():
            for name, reason in reasons.items():
                print(f"{stage} skipped %{name}: {reason}", file=sys.stderr)
    _write(options.output, graph.text(locations=not options.no_locations) + "\n")
    return 0


def read_graph(name: str) -> Graph:
    """Reads a graph from a file, or from standard input for "-". Raises InputError if it cannot be read."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the graph cannot be read", got=f"{name}: {error}", need="a text file") from error
    return Graph.parse(text, "<stdin>" if name == "-" else name)


def _write(name: str, text: str) -> None:
    if name == "-":
        sys.stdout.write(text)
        return
    path = Path(name)
    try:
        if path.exists() and not path.is_file():  # a device such as /dev/stdout cannot be replaced
            path.write_text(text, encoding="utf-8")
            return
        with replacing_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        said = InputError("the graph cannot be written", got=f"{name}: {error}", need="a path in a folder that exists")
        raise not_replaced(said, error, path, len(text)) from error
