"""Records of pipeline runs to inspect: graphs by stage, and other data if available."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import qcompiler.dialects  # noqa: F401  (fills the table of operations)
from qcompiler.artefact.loading import read_report, read_stages, reading
from qcompiler.artefact.manifest import HOST, Manifest
from qcompiler.artefact.manifest import NAME as MANIFEST
from qcompiler.cli.opt import read_graph
from qcompiler.errors import InputError, did_you_mean
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import numbered
from qcompiler.pass_manager.runner import Step
from qcompiler.program.folder_kinds import advice
from qcompiler.report.report import Report

DUMPED = re.compile(r"\d\d+_([\w#-]+)")


@dataclass(frozen=True)
class Record:
    """One run of a pipeline.

    Attributes:
        stages: Name -> the graph as captured, and as each pass left it, in order.
        steps: Data about the passes, by stage; empty if only texts were kept.
        report: The outcome for users of weights, if known.
        source: The host module, if there is one.
        manifest: The manifest of an artefact.
    """

    stages: Mapping[str, Graph]
    steps: Mapping[str, Step]
    report: Report | None = None
    source: str | None = None
    manifest: Manifest | None = None

    def stage(self, name: str) -> Graph:
        """The graph of a stage. Raises InputError, which suggests the nearest name."""
        if name not in self.stages:
            raise InputError("no such stage", got=repr(name), fix=did_you_mean(name, self.stages))
        return self.stages[name]


def read_record(name: str) -> Record:
    """Reads an artefact, a folder of dumped graphs, or a .qir file. Raises InputError for anything else."""
    path = Path(name)
    if name != "-" and not path.exists():
        need = "an artefact, a folder of dumped graphs, or a .qir file"
        raise InputError("there is nothing to inspect", got=name, need=need)
    if not path.is_dir():
        return Record({path.stem if name != "-" else "stdin": read_graph(name)}, {})
    if (path / MANIFEST).is_file():
        return _artefact(path)
    dumped: dict[str, Graph] = {}
    for file in sorted(path.glob("*.qir")):
        if (match := DUMPED.fullmatch(file.stem)) is not None:
            dumped[numbered(match[1], dumped)] = read_graph(str(file))
    if not dumped:
        need = f"an artefact (with a {MANIFEST}), or graphs such as 00_captured.qir"
        raise InputError("the folder has nothing to inspect", got=name, need=need, fix=advice(path))
    return Record(dumped, {})


def _artefact(path: Path) -> Record:
    """The record of an artefact, which is not loaded because its device may be absent."""
    with reading(path.resolve()) as artefact:
        stages, _ = read_stages(artefact, trust=None)
        report, steps, _ = read_report(artefact)
        known = {step.stage: step for step in steps}
        return Record(stages, known, report, artefact.text(HOST), artefact.manifest)
