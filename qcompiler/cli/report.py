"""`qcompiler report`: what was quantized, why the rest was not, and by how much it matters."""

import argparse

import qcompiler
from qcompiler.cli.compile import report_document
from qcompiler.cli.output import print_json


def run(options: argparse.Namespace) -> int:
    """Prints the report of an artefact, or writes it as a page."""
    compiled = qcompiler.load(options.artefact)
    if options.json:
        print_json(report_document(compiled.report))
    else:
        print(compiled.report)
    return 0
