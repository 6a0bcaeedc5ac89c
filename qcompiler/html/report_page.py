"""The report as one HTML file: what each pass changed in the graph, how layers were quantized, and the errors.

    compiled.to_html("report.html")
    compiled.to_html("report.html", attribution=qcompiler.attribute_error(compiled, batch))

The file is self-contained and works offline.
"""

import math
from dataclasses import asdict
from typing import Any

from qcompiler.diagnostics.error_report import ErrorReport
from qcompiler.html.kernels import describe_kernels
from qcompiler.html.page import render_page
from qcompiler.html.stages import describe_stages
from qcompiler.program.program import HasProgram, Program
from qcompiler.runtime.device import target_named


def html_report(compiled: HasProgram, attribution: ErrorReport | None = None) -> str:
    """Returns the HTML of the page.

    Args:
        compiled: A captured and compiled model.
        attribution: The result of `qcompiler.attribute_error`; without it the page says how to compute it.

    Raises:
        CaptureError: The model is not captured yet.
    """
    program = compiled.program
    return render_page(f"{program.graph.name}: {program.report.summary()}", describe(program, attribution))


def describe(program: Program, attribution: ErrorReport | None) -> dict[str, Any]:
    """Returns all data of the page as JSON-compatible values."""
    report = program.report
    return {
        "name": program.graph.name,
        "pipeline": str(program.settings.pipeline),
        "target": program.target,
        "summary": report.summary(),
        "notes": list(report.notes),
        **describe_stages(program.stages, program.steps, program.skipped),
        "decisions": [{**asdict(row), "isMatmul": row.is_matmul} for row in report.rows],
        "errors": None if attribution is None else [_numbers(asdict(row)) for row in attribution.rows],
        "kernels": describe_kernels(program.graph, target_named(program.target)),
    }


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Spells out infinities, which JSON does not support."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
