"""The report as one HTML file: the pipeline pass by pass, what changed in the graph, and what that cost.

    compiled.to_html("report.html")
    compiled.to_html("report.html", attribution=qcompiler.attribute_error(compiled, batch))

The file holds everything that it needs, opens without a network, and asks for nothing.
"""

import math
from dataclasses import asdict
from typing import Any

from qcompiler.diagnostics.attribution import ErrorReport
from qcompiler.html.kernels import describe_kernels
from qcompiler.html.page import render_page
from qcompiler.html.stages import describe_stages
from qcompiler.program.program import HasProgram, Program


def html_report(compiled: HasProgram, attribution: ErrorReport | None = None) -> str:
    """The text of the page.

    Args:
        compiled: A model that has been captured and compiled.
        attribution: What `qcompiler.attribute_error` found; without it the page says how to get it.

    Raises:
        CaptureError: The model is not captured yet.
    """
    program = compiled.program
    return render_page(f"{program.graph.name}: {program.report.summary()}", describe(program, attribution))


def describe(program: Program, attribution: ErrorReport | None) -> dict[str, Any]:
    """Everything that the page shows, as JSON takes it."""
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
        "kernels": describe_kernels(program.graph),
    }


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinities: they are spelled out."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
