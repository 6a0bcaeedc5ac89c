"""What a compiled model is written as: a page, an artefact, a checkpoint, MLIR, or the form of an exporter."""

import os
from pathlib import Path
from typing import Any

from codegen.mlir import MlirModule, to_mlir
from qcompiler.artefact.saving import write_artefact
from qcompiler.artefact.weight_files import SHARD_BYTES
from qcompiler.checkpoints.writing import write
from qcompiler.compiler.views import ProgramViews
from qcompiler.diagnostics.attribution import ErrorReport
from qcompiler.errors import ArtefactError
from qcompiler.html.page import write_page
from qcompiler.html.report_page import html_report
from qcompiler.program.exporters import exporter_called
from qcompiler.program.folder_kinds import checked_path


class Exports(ProgramViews):
    """Writing a compiled model; CaptureError while it is not captured yet."""

    def to_html(self, path: "str | os.PathLike[str]", attribution: "ErrorReport | None" = None) -> None:
        """Writes the report as one HTML file that needs nothing else: see `qcompiler.html`.

        Args:
            path: Written whole or not at all.
            attribution: What `qcompiler.attribute_error` found, to be shown, too.

        Raises:
            CaptureError: The model is not captured yet.
            InputError: The file cannot be written.
        """
        write_page(path, html_report(self, attribution))

    def save(self, folder: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES) -> None:
        """Writes the model to a folder that `qcompiler.load` reads: texts, weights in safetensors, no pickle.

        A model that was saved there before is replaced, all of it or not at all. Buffers are saved with the state that
        calls have left them in.

        Args:
            folder: Its name is free, or that of an artefact.
            shard_bytes: Weights beyond so many bytes go into several files.

        Raises:
            ArtefactError: The folder is something else, cannot be written, or the model has something that cannot be
                saved, such as results of a class without a name.
            CaptureError: The model is not captured yet.
        """
        write_artefact(checked_path(folder, ArtefactError), self.program, shard_bytes)

    def save_checkpoint(self, folder: str | os.PathLike[str], format: str, **options: Any) -> None:
        """Writes a checkpoint of the ecosystem: "fp8", "compressed-tensors" or "float"; see `checkpoints.write`.

        Raises:
            QCompilerError: The format cannot hold some layers, and which; or the folder is something else.
        """
        write(self, folder, format, **options)

    def to_mlir(self, stage: str | None = None, dialect: str = "torch", weights: str = "arguments") -> MlirModule:
        """A stage as a module of MLIR, through torch-mlir, the extra `mlir`.

        Args:
            stage: A name in `stages`; left out, the last.
            dialect: "torch", or "linalg" for linalg on tensors.
            weights: "arguments" of the function, behind the inputs; "resource", in the text; or "elide", left out.

        Raises:
            QCompilerError: torch-mlir is not installed.
            InputError: There is no such dialect, or a weight of the stage is not there any more.
            CodegenError: Some operations have no form there; the message lists all of them.
        """
        graph, store = self.program.with_weights(stage)
        return to_mlir(graph, dialect, weights, store=store)

    def export(self, exporter: str, output: str | os.PathLike[str], stage: str | None = None, **options: Any) -> Any:
        """Writes a stage in the form of an installed exporter, and returns what runs it, if anything does.

        Args:
            exporter: Its name: "iree", "model-explorer", or one that another distribution offers.
            output: The file or folder to write.
            stage: A name in `stages`; without it, the last stage, or all for an exporter that shows them.
            options: Options of the exporter.

        Raises:
            InputError: There is no such exporter, or it cannot write there.
            CodegenError: The stage cannot be written in this form.
        """
        return exporter_called(exporter).write(self.program, Path(output), stage, **options)

    def to_iree(self, folder: str | os.PathLike[str], stage: str | None = None, cpu: str = "generic") -> Any:
        """A stage compiled by IREE, the extra `iree`, for the CPU: in a folder, and loaded from there.

        Args:
            folder: Where to write; one that was built before is replaced. `codegen.mlir.iree.load` reads it.
            stage: A name in `stages`; left out, the last.
            cpu: "generic" runs on any CPU of this kind, "host" targets this CPU.

        Raises:
            QCompilerError: torch-mlir or IREE is not installed.
            InputError: The folder cannot be written, or a weight of the stage is not there any more.
            CodegenError: The stage cannot be lowered, or IREE cannot compile it.
        """
        return self.export("iree", folder, stage, cpu=cpu)
