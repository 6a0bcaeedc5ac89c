"""`qcompiler inspect`: shows what each pass did to a graph or a single operation."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcompiler.cli import exported
from qcompiler.cli.compile import report_document
from qcompiler.cli.output import print_json, print_table
from qcompiler.cli.records import Record, read_record
from qcompiler.errors import InputError
from qcompiler.ir import Graph, diff
from qcompiler.pass_manager.history import Chapter, history, values_named
from qcompiler.program.exporters import exported_at

COUNTED = ("aten", "quant", "kernel")
DROPPABLE = ("options", *reversed(COUNTED), "effect", "changed", "+/-")


def run(options: argparse.Namespace) -> int:
    """Shows a run, or the requested part of it."""
    if options.stage is None and (options.dot or options.no_locations):
        got = "--dot" if options.dot else "--no-locations"
        raise InputError("the option needs a graph to print", got=got, need="--stage NAME as well")
    if (written := exported_at(Path(options.path))) is not None:
        return exported.inspect(*written, options)
    record = read_record(options.path)
    if options.stage is not None:
        _graph(record.stage(options.stage), options)
    elif options.diff is not None:
        _difference(record, options)
    elif options.op is not None:
        found = {name: history(record.stages, name) for name in values_named(record.stages, options.op)}
        _histories(found, options)
    elif options.source:
        _source(record, options)
    else:
        _overview(record, options)
    return 0


def _graph(graph: Graph, options: argparse.Namespace) -> None:
    text = graph.to_dot() if options.dot else graph.text(locations=not options.no_locations)
    print_json({"stage": options.stage, "graph": text}) if options.json else print(text)


def _difference(record: Record, options: argparse.Namespace) -> None:
    before, after = options.diff
    text = diff(record.stage(before), record.stage(after))
    if options.json:
        print_json({"before": before, "after": after, "diff": text})
    else:
        print(text or f"{before} and {after} are identical", file=sys.stdout if text else sys.stderr)


def _source(record: Record, options: argparse.Namespace) -> None:
    if record.source is None:
        need = "an artefact, which `qcompiler compile` writes"
        raise InputError("bare graphs have no host module", got=options.path, need=need)
    print_json({"source": record.source}) if options.json else sys.stdout.write(record.source)


# The pipeline


def _overview(record: Record, options: argparse.Namespace) -> None:
    stages = list(_stages(record))
    if options.json:
        report = None if record.report is None else report_document(record.report)
        print_json({"artefact": _artefact(record), "stages": stages, "report": report})
        return
    timed = bool(record.steps)
    headings = ["stage", *(["effect", "changed", "ms "] if timed else []), "operations ", "+/- "]
    headings += [f"{dialect} " for dialect in COUNTED] + (["options"] if timed else [])
    print_table(headings, [_row(stage, timed) for stage in stages], DROPPABLE)
    if (artefact := _artefact(record)) is not None:
        versions = ", ".join(f"{name} {number}" for name, number in artefact["made_by"].items() if number)
        ranks = f" on a mesh of ranks, {artefact['mesh']}" if artefact["mesh"] else ""
        print(f"{artefact['scheme'] or 'a pipeline'} for {artefact['target']}{ranks}, made by {versions}")
    if record.report is not None:
        print(record.report.summary())


def _artefact(record: Record) -> dict[str, Any] | None:
    """How an artefact was made; None for bare graphs."""
    made = record.manifest
    if made is None:
        return None
    return {"scheme": made.scheme, "overrides": made.overrides, "pipeline": made.pipeline, "target": made.target,
            "device": made.device, "mesh": None if made.division is None else made.division.mesh,
            "made_by": dict(made.made_by)}  # fmt: skip


def _stages(record: Record) -> Iterator[dict[str, Any]]:
    """One JSON entry per stage."""
    before = None
    for name, graph in record.stages.items():
        counts = Counter(op.name.partition(".")[0] for op in graph.ops())
        step = record.steps.get(name)
        yield {
            "stage": name,
            "pass": None if step is None else step.spec,
            "effect": None if step is None else step.effect,
            "changed": None if step is None else step.changed,
            "seconds": None if step is None else step.seconds,
            "operations": sum(counts.values()),
            "more": None if before is None else sum(counts.values()) - before,
            "by_dialect": dict(sorted(counts.items())),
        }
        before = sum(counts.values())


def _row(stage: dict[str, Any], timed: bool) -> list[object]:
    known = stage["pass"] is not None
    times: list[object] = (
        [stage["effect"], "yes" if stage["changed"] else "-", f"{1e3 * stage['seconds']:.1f}"] if known else [""] * 3
    )
    more = f"{stage['more']:+}" if stage["more"] else ""
    counts: list[object] = [
        stage["operations"],
        more,
        *(stage["by_dialect"].get(dialect, 0) or "" for dialect in COUNTED),
    ]
    options = stage["pass"].partition("{")[2].removesuffix("}") if known else ""
    return [stage["stage"], *(times if timed else []), *counts, *([options] if timed else [])]


# One operation, or all operations of one module

SAYS = {
    "absent": "does not exist yet",
    "appears": "appears",
    "same": "unchanged",
    "changed": "changed",
    "fused": "fused into its user",
    "replaced": "replaced",
    "removed": "removed: it has no users",
}


def _histories(found: dict[str, list[Chapter]], options: argparse.Namespace) -> None:
    """Prints the history of one operation, or of each operation of a module under a heading."""
    asked = options.op.removeprefix("%")
    if options.json:
        documents = [
            {"operation": name, "stages": [asdict(chapter) for chapter in chapters]} for name, chapters in found.items()
        ]
        print_json(documents[0] if [*found] == [asked] else {"module": asked, "operations": documents})
        return
    for number, (name, chapters) in enumerate(found.items()):
        if [*found] != [asked]:
            print(f"{'' if number == 0 else chr(10)}%{name}")
        _print_history(chapters)


def _print_history(chapters: list[Chapter]) -> None:
    wide = max(len(chapter.stage) for chapter in chapters)
    for chapter in chapters:
        print(f"{chapter.stage:{wide}}  {SAYS[chapter.fate]}")
        if chapter.fate in ("appears", "changed", "fused", "replaced"):
            for line in chapter.new:
                print(f"{'':{wide}}    + {line}")
            print(f"{'':{wide}}    {'  ' if chapter.new else ''}{chapter.line}")
