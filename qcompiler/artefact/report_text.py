"""The report on a compilation and its steps, as JSON and back."""

from dataclasses import asdict
from typing import Any

from qcompiler.artefact.strict_json import Node
from qcompiler.pass_runner import Step
from qcompiler.report import Report, Row


def report_to_json(report: Report, steps: tuple[Step, ...]) -> dict[str, Any]:
    """Both in one object."""
    return {**asdict(report), "steps": [asdict(step) for step in steps]}


def report_from_json(node: Node) -> tuple[Report, tuple[Step, ...]]:
    """What `report_to_json` gave; ArtefactError for anything else."""
    rows = tuple(_row(item) for item in node["rows"].items())
    sizes = (node[key].count() for key in ("bytes", "bytes_quantized", "bytes_after"))
    return Report(rows, *sizes), tuple(_step(item) for item in node["steps"].items())


def _row(node: Node) -> Row:
    weights = tuple(name.text() for name in node["weights"].items())
    texts = {key: node[key].text() for key in ("name", "op", "module", "shape", "reason", "remark")}
    return Row(**texts, weights=weights, bytes=node["bytes"].count(), quantized=node["quantized"].flag())


def _step(node: Node) -> Step:
    texts = {key: node[key].text() for key in ("stage", "spec", "effect")}
    return Step(**texts, changed=node["changed"].flag(), seconds=node["seconds"].number())
