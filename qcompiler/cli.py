"""The command line.

    qcompiler opt --pipeline "canonicalize; fp8-tile" graph.qir     text in, text out
    qcompiler passes                                                every pass, its effect and options
    qcompiler schemes                                               every scheme and its pipeline

What was asked for goes to standard output, what was asked about it (times, reasons) and errors to standard error.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

import qcompiler.dialects  # noqa: F401  (fills the table of operations)
from qcompiler.errors import InputError, PassError, QCompilerError
from qcompiler.instruments import CheckChanged, Dump, Instrument, PrintAfter, TimePasses
from qcompiler.ir import Graph, print_argument
from qcompiler.pass_manager import GROUP, PASSES, Pipeline, offered, pass_class
from qcompiler.pass_options import default_of, print_option
from qcompiler.pass_runner import run_pipeline
from qcompiler.schemes import Scheme, all_schemes, pipeline


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status: 0, or 1 after an error, which goes to standard error."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except QCompilerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (Python flushes it at exit)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qcompiler", description="A quantization compiler for PyTorch models.")
    commands = parser.add_subparsers(required=True, metavar="command")
    opt = commands.add_parser("opt", help="run passes over the text of a graph")
    opt.add_argument("graph", help="a .qir file, or - for standard input")
    which = opt.add_mutually_exclusive_group(required=True)
    which.add_argument("--pipeline", "-p", help='passes, such as "canonicalize; fp8-tile{profile=vllm}"')
    which.add_argument("--scheme", "-s", help="the pipeline of a scheme")
    opt.add_argument("--output", "-o", default="-", help="where the text goes (default: standard output)")
    opt.add_argument(
        "--print-after", action="append", default=[], metavar="PASS", help='a pass, or "all": print to standard error'
    )
    opt.add_argument("--dump", metavar="FOLDER", help="write the graph after each pass to numbered files")
    opt.add_argument("--time-passes", action="store_true", help="print the time of each pass to standard error")
    opt.add_argument(
        "--verify-each", action="store_true", help="also hold each pass to whether it says that it changed the graph"
    )
    opt.add_argument("--explain", action="store_true", help="print to standard error why operations were left alone")
    opt.add_argument("--no-locations", action="store_true", help="leave locations out of the text")
    opt.set_defaults(run=_opt)
    commands.add_parser("passes", help="list the passes").set_defaults(run=_passes)
    commands.add_parser("schemes", help="list the schemes").set_defaults(run=_schemes)
    return parser


def _opt(options: argparse.Namespace) -> None:
    steps = Pipeline.parse(options.pipeline) if options.pipeline is not None else pipeline(options.scheme)
    graph = Graph.parse(_read(options.graph), "<stdin>" if options.graph == "-" else options.graph)
    instruments: list[Instrument] = [PrintAfter(*options.print_after)] if options.print_after else []
    instruments += [Dump(options.dump)] if options.dump else []
    instruments += [CheckChanged()] if options.verify_each else []
    instruments += [TimePasses(file=sys.stderr)] if options.time_passes else []
    done = run_pipeline(steps, graph, instruments=instruments)
    if options.explain:
        for stage, reasons in done.left_alone.items():
            for name, reason in reasons.items():
                print(f"{stage} left %{name} alone: {reason}", file=sys.stderr)
    _write(options.output, graph.text(locations=not options.no_locations) + "\n")


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the graph cannot be read", got=f"{name}: {error}", need="a text file") from error


def _write(name: str, text: str) -> None:
    if name == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            "the graph cannot be written", got=f"{name}: {error}", need="a path in a folder that exists"
        ) from error


def _passes(_: argparse.Namespace) -> None:
    broken = []
    for name in offered(GROUP):
        try:
            pass_class(name)
        except PassError as error:
            broken.append(f"{name:16} {error}")
    for name in sorted(PASSES):
        kind = PASSES[name]
        print(f"{name:16} {kind.effect.value:9} {(kind.__doc__ or '').strip().partition(chr(10))[0]}")
        for option in fields(kind):
            default = default_of(option)
            print(f"{'':27}{option.name} {'(required)' if default is MISSING else f'= {print_argument(default)}'}")
    print("\n".join(broken), file=sys.stderr, end="\n" if broken else "")


def _schemes(_: argparse.Namespace) -> None:
    for name, scheme in all_schemes().items():
        if isinstance(scheme, Scheme):
            print(f"{name}\n    {scheme.doc}\n    {scheme.pipeline}")
            if scheme.recipe is not None:
                values = (f"{option}={print_option(getattr(scheme.recipe, option))}" for option in scheme.options)
                print(f"    options: {', '.join(values)}")
        else:
            print(f"{name}: {scheme}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
