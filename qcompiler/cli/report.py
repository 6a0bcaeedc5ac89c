"""`qcompiler report`: which layers were quantized, and why others were not; as text, JSON or HTML."""

import argparse
import json
from pathlib import Path

from qcompiler.artefact.loading import read_report, reading
from qcompiler.cli import exported
from qcompiler.cli.compile import report_document
from qcompiler.cli.meshes import load_artefact
from qcompiler.cli.models import load_model
from qcompiler.cli.output import print_json
from qcompiler.diagnostics.attribution import attribute_error
from qcompiler.diagnostics.error_report import ErrorReport
from qcompiler.errors import InputError
from qcompiler.html.page import write_page
from qcompiler.html.report_page import html_report
from qcompiler.program.program import HasProgram


def run(options: argparse.Namespace) -> int:
    """Prints the report of an artefact or writes it as HTML; with layer errors, if a model is given."""
    exported.refuse(options.artefact)
    with reading(Path(options.artefact).resolve()) as artefact:
        report, *_ = read_report(artefact)
    errors = None
    if options.html is not None or options.against is not None:
        compiled = load_artefact(options.artefact, trust=options.trust)
        errors = None if options.against is None else _errors(compiled, options)
        if options.html is not None:
            write_page(options.html, html_report(compiled, errors))
    if options.json:
        rows = {} if errors is None else {"errors": json.loads(errors.to_json())}
        print_json({**report_document(report), **rows})
    elif options.html is not None:
        print(f"{report.summary()}\nwrote {options.html}")
    else:
        print(report if errors is None else f"{report}\n\n{errors}")
    return 0


def _errors(compiled: HasProgram, options: argparse.Namespace) -> ErrorReport:
    """The error of each layer relative to the original model on one call."""
    loaded = load_model(options.against, str(compiled.program.device))
    call = loaded.example_for(options.input, options.example)
    if call is None:
        fix = 'Give some: --input "x=bf16[4,256]", or --example FILE.'
        raise InputError("measuring errors needs example inputs", got="none", fix=fix)
    return attribute_error(compiled, call.as_batch("the call"), loaded.model, outputs=options.outputs)
