"""`qcompiler report`: what was quantized, and why the rest was not; as text, JSON, or a page."""

import argparse
import os
import uuid
from pathlib import Path

import qcompiler
from qcompiler.artefact.loading import read_report, reading
from qcompiler.cli.compile import report_document
from qcompiler.cli.output import print_json
from qcompiler.errors import InputError
from qcompiler.html import html_report


def run(options: argparse.Namespace) -> int:
    """Prints the report of an artefact, or writes it as a page."""
    with reading(Path(options.artefact).resolve()) as artefact:
        report, _ = read_report(artefact)
    if options.html is not None:
        _write_page(Path(options.html), html_report(qcompiler.load(options.artefact, trust=options.trust)))
    if options.json:
        print_json(report_document(report))
    else:
        print(report if options.html is None else f"{report.summary()}\n{options.html} has the page")
    return 0


def _write_page(path: Path, page: str) -> None:
    """Writes all of it or nothing: a reader never sees half a page."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        need = "a path in a folder that exists"
        raise InputError("the page cannot be written", got=f"{path}: {error}", need=need) from error
