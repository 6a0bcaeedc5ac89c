"""The report as one HTML file: the pipeline pass by pass, what changed in the graph, and what that cost.

    compiled.to_html("report.html")
    compiled.to_html("report.html", attribution=qcompiler.attribute_error(compiled, batch))

The file holds everything that it needs, opens without a network, and asks for nothing.
"""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qcompiler.html.kernels import describe_kernels
from qcompiler.html.page import render_page, write_page
from qcompiler.html.stages import describe_stages
from qcompiler.runtime.device import TARGETS

if TYPE_CHECKING:
    from qcompiler.attribution import ErrorReport
    from qcompiler.compiler import CompiledModel

__all__ = ["html_report", "write_page"]


def html_report(compiled: "CompiledModel", attribution: "ErrorReport | None" = None) -> str:
    """The text of the page.

    Args:
        compiled: A model that has been captured and compiled.
        attribution: What `qcompiler.attribute_error` found; without it the page says how to get it.

    Raises:
        CaptureError: The model is not captured yet.
    """
    name = compiled.graph.name
    return render_page(f"{name}: {compiled.report.summary()}", describe(compiled, attribution))


def describe(compiled: "CompiledModel", attribution: "ErrorReport | None") -> dict[str, Any]:
    """Everything that the page shows, as JSON takes it."""
    report = compiled.report
    return {
        "name": compiled.graph.name,
        "pipeline": str(compiled.pipeline),
        "target": _target(compiled),
        "summary": report.summary(),
        "notes": list(report.notes),
        **describe_stages(compiled.stages, compiled.steps, compiled.left_alone),
        "decisions": [{**asdict(row), "isMatmul": row.is_matmul} for row in report.rows],
        "errors": None if attribution is None else [_numbers(asdict(row)) for row in attribution.rows],
        "kernels": describe_kernels(compiled.graph),
    }


def _target(compiled: "CompiledModel") -> str:
    """The target by its own name, where the model's device chose it."""
    given, device = compiled.settings.target, compiled.weights.device.type
    if given in TARGETS:
        return given
    return next((name for name, target in TARGETS.items() if target.device == device), given)


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinities: they are spelled out."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
