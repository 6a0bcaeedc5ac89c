"""The IREE exporter: writes a folder that IREE's runtime runs on a CPU."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from codegen.mlir import extras
from codegen.mlir.iree import IreeModel, build, load
from codegen.mlir.iree.building import check_replaceable
from codegen.mlir.iree.manifest import MANIFEST, Manifest, checked_bytes, read
from qcompiler.capture.signature import Signature
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Range, parse_type
from qcompiler.program.exporters import Exported, Exporter
from qcompiler.program.program import Program, graph_as_captured


class IreeFolder(Exported):
    """A compiled module, its weights, and a manifest."""

    kind = "a folder that IREE runs"
    runs = "codegen.mlir.iree.load"

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest of the folder."""
        return read(self.folder)

    def title(self) -> str:
        """The function and the compiler."""
        function, made = self.manifest.function, self.manifest.compiled
        return f"@{function}, compiled by IREE {made.get('iree')} for the CPU '{made.get('cpu')}'"

    def document(self) -> Mapping[str, Any]:
        """The manifest."""
        return asdict(self.manifest)

    def inputs(self) -> Mapping[str, str]:
        """Types of the inputs in graph syntax."""
        return self.manifest.inputs

    def facts(self) -> list[str]:
        """Sizes and counts."""
        found = self.manifest
        ranges = ", ".join(f"{name} in {Range(*bounds)}" for name, bounds in found.symbols.items())
        counts = {"output": len(found.outputs), "weight": len(found.stored), "update": len(found.updates)}
        return [f"sizes: {ranges or 'all fixed'}", ", ".join(_counted(count, what) for what, count in counts.items())]

    def files(self) -> Mapping[str, str | None]:
        """Checks each file against its hash."""
        hashes = self.manifest.hashes
        return {MANIFEST: None} | {
            name: _problem(partial(checked_bytes, self.folder, name, self.manifest)) for name in hashes
        }

    def signature(self) -> Signature:
        """The inputs of the graph, in order."""
        graph = Graph(self.manifest.function)
        graph.symbols = {name: Range(*bounds) for name, bounds in self.manifest.symbols.items()}
        for name, text in self.manifest.inputs.items():
            graph.add_input(name, parse_type(text))
        return graph_as_captured(graph).signature

    def load(self) -> IreeModel:
        """The model, run by IREE."""
        return load(self.folder)


class IreeExporter(Exporter):
    """Compiles a stage for a CPU, with torch-mlir and IREE."""

    target = "iree-cpu"
    exported = IreeFolder

    def check(self, output: Path) -> None:
        """Checks that torch-mlir, IREE's compiler and its runtime are installed."""
        for module, extra in (("torch_mlir.ir", "mlir"), ("iree.compiler", "iree"), ("iree.runtime", "iree")):
            extras.load(module, extra)
        check_replaceable(output)

    def write(  # type: ignore[override]  # options of its own
        self, program: Program, output: Path, stage: str | None = None, cpu: str = "generic"
    ) -> IreeModel:
        """Writes the folder, then loads it.

        Args:
            program: The compiled program.
            output: The folder.
            stage: The name of a stage; None means the last.
            cpu: "generic" runs on any CPU of this kind; "host" targets this CPU.
        """
        graph, store = program.with_weights(stage)
        return load(build(graph, output, store=store, cpu=cpu))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _problem(step: Callable[[], object]) -> str | None:
    try:
        step()
    except InputError as error:
        return str(error)
    return None
