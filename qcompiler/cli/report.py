"""`qcompiler report`: what was quantized, why the rest was not, and by how much it matters."""

import argparse

from qcompiler.cli.compile import report_document
from qcompiler.cli.output import print_json
from qcompiler.cli.records import read_record


def run(options: argparse.Namespace) -> int:
    """Prints the report of an artefact."""
    report = read_record(options.artefact).report
    print_json(report_document(report)) if options.json else print(report)
    return 0
