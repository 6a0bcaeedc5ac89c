"""The pass of Inductor: fuses norms and activations into quantizations, and reports what it did.

%n = norm(%x); %q, %s = quantize(%n)          ->    %q, %s = fused_quantize(%x)
%h = silu(%gate) * %up; … = quantize(%h)      ->    … = fused_quantize(%gate, %up)
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import passes
from passes.fusing.fuse_activation_quantize import FuseActivationQuantize
from passes.fusing.fuse_norm_quantize import FuseNormQuantize
from passes.quantizing.share_quantize import ShareQuantize
from qcompiler.inductor.fx_export import export_fx
from qcompiler.inductor.fx_import import Imported, import_fx
from qcompiler.pass_manager.pipeline import Pipeline

PASSES = Pipeline((ShareQuantize(), FuseNormQuantize(), FuseActivationQuantize()))
QUANTIZE, FUSED = "kernel.quantize", "kernel.fused_quantize"

SHOWN = 4
"""Maximum number of nodes in a line of a report."""


@dataclass(frozen=True)
class FusionReport:
    """What became of the quantizations of one graph; printing it gives a line for each kind.

    Attributes:
        fused: Fused expression -> the number of quantizations that compute it.
        others: The reason -> the nodes of quantizations that are not fused.
    """

    fused: Mapping[str, int] = field(default_factory=dict)
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        count, others = sum(self.fused.values()), sum(map(len, self.others.values()))
        lines = [f"{count} of {count + others} quantizations are fused with the arithmetic before them"]
        lines += [f"  {number} x {expression}" for expression, number in self.fused.items()]
        for why, names in self.others.items():
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  not fused: {', '.join(names[:SHOWN])}{more}: {why}")
        return "\n".join(lines)


def fuse(fx_graph: fx.Graph) -> FusionReport:
    """Fuses the quantizations of an fx graph after AOTAutograd, in place."""
    imported = import_fx(fx_graph)
    if not imported.graph.ops(QUANTIZE):
        return FusionReport()
    changed = [step.run(imported.graph) for step in PASSES].count(True)
    report = _report(imported)
    if changed:
        export_fx(imported)
    return report


def _report(imported: Imported) -> FusionReport:
    graph = imported.graph
    fused: dict[str, int] = {}
    for op in graph.ops(FUSED):
        expression = str(op.attrs["expression"])
        fused[expression] = fused.get(expression, 0) + 1
    reasons = {name: why for step in reversed((*PASSES,)) for name, why in step.explain(graph).items()}
    others: dict[str, list[str]] = {}
    for op in graph.ops(QUANTIZE):
        why = reasons[op.results[0].name].partition(" (%")[0]
        others.setdefault(why, []).append(imported.nodes[op].name)
    return FusionReport(fused, {why: tuple(names) for why, names in others.items()})


class FuseQuantize(CustomGraphPass):
    """`fuse` as an option of Inductor: `post_grad_custom_post_pass`.

    Attributes:
        reports: One for each graph that has quantizations, in the order of compilation. Graphs that Inductor finds in
            its cache are not compiled again, and have none.
    """

    def __init__(self) -> None:
        self.reports: list[FusionReport] = []

    def __call__(self, graph: fx.Graph) -> None:
        """Fuses in place."""
        report = fuse(graph)
        if report.fused or report.others:
            self.reports.append(report)

    def uuid(self) -> str:
        """A hash of the sources of the passes, which is a part of the key of Inductor's cache."""
        return sources_hash()


@cache
def sources_hash() -> str:
    """A hash of our sources that decide how a graph is fused."""
    found = hashlib.sha256()
    for folder in (Path(passes.__file__).parent, Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()
