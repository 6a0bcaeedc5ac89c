"""Writes a compiled model as a page, an artefact, a checkpoint, MLIR, or the format of an exporter."""

import os
from pathlib import Path
from typing import Any

from codegen.mlir import MlirModule, to_mlir
from qcompiler.artefact.saving import write_artefact
from qcompiler.artefact.weight_files import SHARD_BYTES
from qcompiler.checkpoints.writing import write
from qcompiler.compiler.views import ProgramViews
from qcompiler.diagnostics.error_report import ErrorReport
from qcompiler.errors import ArtefactError
from qcompiler.html.page import write_page
from qcompiler.html.report_page import html_report
from qcompiler.program.exporters import exporter_called
from qcompiler.program.folder_kinds import checked_path


class Exports(ProgramViews):
    """Exports of a compiled model; CaptureError if it is not captured yet."""

    def to_html(self, path: "str | os.PathLike[str]", attribution: "ErrorReport | None" = None) -> None:
        """Writes the report as one self-contained HTML file: see `qcompiler.html`.

        Args:
            path: The file, which is written atomically.
            attribution: The result of `qcompiler.attribute_error`, to include in the report.

        Raises:
            CaptureError: The model is not captured yet.
            InputError: The file cannot be written.
        """
        write_page(path, html_report(self, attribution))

    def save(self, folder: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES) -> None:
        """Writes the model to a folder that `qcompiler.load` reads: text files and safetensors, no pickle.

        Replaces a model saved there before, atomically. Buffers are saved in the state in which the last call left
        them.

        Args:
            folder: A new folder, or an artefact to replace.
            shard_bytes: Weights larger than this in total are split into several files.

        Raises:
            ArtefactError: The folder exists and is not an artefact, or cannot be written; or the model contains
                something that cannot be saved, such as results of a class without a name.
            CaptureError: The model is not captured yet.
        """
        write_artefact(checked_path(folder, ArtefactError), self.program, shard_bytes)

    def save_checkpoint(self, folder: str | os.PathLike[str], format: str, **options: Any) -> None:
        """Writes a checkpoint: "fp8", "compressed-tensors", "qcompiler" or "float"; see `checkpoints.write`.

        Raises:
            QCompilerError: The message lists layers that the format cannot store; or the folder is not a checkpoint.
        """
        write(self, folder, format, **options)

    def to_mlir(self, stage: str | None = None, dialect: str = "torch", weights: str = "arguments") -> MlirModule:
        """Returns a stage as an MLIR module, through torch-mlir (the extra `mlir`).

        Args:
            stage: A name in `stages`; the last stage by default.
            dialect: "torch", or "linalg" for linalg on tensors.
            weights: "arguments" of the function, after the inputs; "resource", in the text; or "elide", omitted.

        Raises:
            QCompilerError: torch-mlir is not installed.
            InputError: The dialect does not exist, or a weight of the stage has been freed.
            CodegenError: Some operations cannot be lowered; the message lists all of them.
        """
        graph, store = self.program.with_weights(stage)
        return to_mlir(graph, dialect, weights, store=store)

    def export(self, exporter: str, output: str | os.PathLike[str], stage: str | None = None, **options: Any) -> Any:
        """Writes a stage with an installed exporter, and returns the object that runs it, if there is one.

        Args:
            exporter: Its name: "iree", "model-explorer", or one that another distribution provides.
            output: The file or folder to write.
            stage: A name in `stages`; by default the last stage, or all stages for an exporter that shows several.
            options: Options of the exporter.

        Raises:
            InputError: There is no such exporter, or the output cannot be written.
            CodegenError: The exporter cannot express the stage.
        """
        return exporter_called(exporter).write(self.program, Path(output), stage, **options)

    def to_iree(self, folder: str | os.PathLike[str], stage: str | None = None, cpu: str = "generic") -> Any:
        """Compiles a stage for the CPU with IREE (the extra `iree`), writes it to a folder, and loads it.

        Args:
            folder: The output folder; an earlier build is replaced. `codegen.mlir.iree.load` reads it.
            stage: A name in `stages`; the last stage by default.
            cpu: "generic" runs on any CPU of this kind, "host" targets this CPU.

        Raises:
            QCompilerError: torch-mlir or IREE is not installed.
            InputError: The folder cannot be written, or a weight of the stage has been freed.
            CodegenError: The stage cannot be lowered, or IREE cannot compile it.
        """
        return self.export("iree", folder, stage, cpu=cpu)
