"""Converts the compilation report, its steps, and what each step skipped to JSON and back."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from qcompiler.artefact.strict_json import Node
from qcompiler.pass_manager.runner import Step
from qcompiler.report.report import Report
from qcompiler.report.rows import Row

Skipped = Mapping[str, Mapping[str, str]]
"""Stage -> name of a value -> why the pass skipped the operation that computes it."""


def report_to_json(report: Report, steps: tuple[Step, ...], skipped: Skipped) -> dict[str, Any]:
    """Converts to one JSON object. Values of a pass that share a reason are grouped."""
    alone = {stage: _by_reason(reasons) for stage, reasons in skipped.items()}
    return {**asdict(report), "steps": [asdict(step) for step in steps], "skipped": alone}


def report_from_json(node: Node) -> tuple[Report, tuple[Step, ...], Skipped]:
    """Parses the output of `report_to_json`. Raises ArtefactError for anything else."""
    rows = tuple(_row(item) for item in node["rows"].items())
    sizes = {key: node[key].count() for key in ("bytes", "bytes_quantized", "bytes_after")}
    steps = tuple(_step(item) for item in node["steps"].items())
    notes = tuple(note.text() for key, items in node.members() if key == "notes" for note in items.items())
    skipped = {stage: _by_value(item) for stage, item in node["skipped"].members()}
    return Report(rows, **sizes, notes=notes), steps, skipped


def _row(node: Node) -> Row:
    weights = tuple(name.text() for name in node["weights"].items())
    texts = {key: node[key].text() for key in ("name", "op", "module", "shape", "reason", "remark")}
    if "format" in node.value:  # artefacts from qcompiler 0.1 do not have it
        texts["format"] = node["format"].text()
    return Row(**texts, weights=weights, bytes=node["bytes"].count(), quantized=node["quantized"].flag())


def _step(node: Node) -> Step:
    texts = {key: node[key].text() for key in ("stage", "spec", "effect")}
    return Step(**texts, changed=node["changed"].flag(), seconds=node["seconds"].number())


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for value, reason in reasons.items():
        found.setdefault(reason, []).append(value)
    return found


def _by_value(node: Node) -> dict[str, str]:
    return {value.text(): reason for reason, values in node.members() for value in values.items()}
