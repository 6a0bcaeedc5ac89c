"""The pass of Inductor: fuses norms and activations into quantizations and matmuls, and reports what it did.

%n = norm(%x); %q, %s = quantize(%n)                      ->    %q, %s = fused_quantize(%x)
%h = silu(%gate) * %up; … = quantize(%h)                  ->    … = fused_quantize(%gate, %up)
%y = scaled_linear(…); %gate, %up = the halves of %y; …   ->    … = fused_linear(…)
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import passes
from passes.fusing.fuse_activation_quantize import FuseActivationQuantize
from passes.fusing.fuse_epilogue import FuseEpilogue
from passes.fusing.fuse_norm_quantize import FuseNormQuantize
from passes.quantizing.share_quantize import ShareQuantize
from qcompiler.inductor.fx_export import export_fx
from qcompiler.inductor.fx_import import Imported, import_fx
from qcompiler.ir import Op
from qcompiler.pass_manager.pipeline import Pipeline

PASSES = Pipeline((ShareQuantize(), FuseNormQuantize(), FuseActivationQuantize(), FuseEpilogue()))
QUANTIZE, FUSED = "kernel.quantize", "kernel.fused_quantize"
LINEAR, FUSED_LINEAR = "kernel.scaled_linear", "kernel.fused_linear"

SHOWN = 4
"""Maximum number of nodes in a line of a report."""

Reasons = Mapping[str, tuple[str, ...]]
"""The reason -> the nodes of operations that are not fused."""


@dataclass(frozen=True)
class FusionReport:
    """What became of the quantizations and matmuls of one graph; printing it gives a line for each kind.

    Attributes:
        fused: Fused expression -> the number of quantizations that compute it.
        others: The quantizations that are not fused.
        epilogues: Fused expression -> the number of matmuls that compute it after their sum, and quantize the result.
        plain_epilogues: The same for matmuls whose result is not quantized.
        matmuls: The matmuls without an epilogue.
    """

    fused: Mapping[str, int] = field(default_factory=dict)
    others: Reasons = field(default_factory=dict)
    epilogues: Mapping[str, int] = field(default_factory=dict)
    plain_epilogues: Mapping[str, int] = field(default_factory=dict)
    matmuls: Reasons = field(default_factory=dict)

    @property
    def quantizations(self) -> tuple[int, int]:
        """The number of fused quantizations, and of all."""
        done = sum(self.fused.values()) + sum(self.epilogues.values())
        return done, done + _count(self.others)

    def __str__(self) -> str:
        done, of = self.quantizations
        lines = [f"{done} of {of} quantizations are fused with the arithmetic before them"]
        lines += [f"  {number} x {expression}" for expression, number in self.fused.items()]
        lines += _lines(self.others)
        ends = [(f"quantize({expression})", number) for expression, number in self.epilogues.items()]
        ends += self.plain_epilogues.items()
        fused = sum(number for _, number in ends)
        if fused or self.matmuls:
            lines.append(f"{fused} of {fused + _count(self.matmuls)} matmuls are fused with what follows them")
            lines += [f"  {number} x {expression}" for expression, number in ends]
            lines += _lines(self.matmuls)
        return "\n".join(lines)


def fuse(fx_graph: fx.Graph) -> FusionReport:
    """Fuses the quantizations and matmuls of an fx graph after AOTAutograd, in place."""
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
    ends = graph.ops(FUSED_LINEAR)
    reasons = {name: why for step in reversed((*PASSES,)) for name, why in step.explain(graph).items()}
    return FusionReport(
        _expressions(graph.ops(FUSED)),
        _reasons(imported, QUANTIZE, reasons),
        _expressions([op for op in ends if "format" in op.attrs]),
        _expressions([op for op in ends if "format" not in op.attrs]),
        _reasons(imported, LINEAR, reasons),
    )


def _expressions(ops: Sequence[Op]) -> dict[str, int]:
    return dict(Counter(str(op.attrs["expression"]) for op in ops))


def _reasons(imported: Imported, kind: str, reasons: Mapping[str, str]) -> Reasons:
    found: dict[str, list[str]] = {}
    for op in imported.graph.ops(kind):
        why = reasons[op.results[0].name].partition(" (%")[0]
        found.setdefault(why, []).append(imported.nodes[op].name)
    return {why: tuple(names) for why, names in found.items()}


def _count(reasons: Reasons) -> int:
    return sum(map(len, reasons.values()))


def _lines(reasons: Reasons) -> Iterator[str]:
    for why, names in reasons.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield f"  not fused: {', '.join(names[:SHOWN])}{more}: {why}"


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
        if report.quantizations[1]:
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
