"""The Model Explorer exporter: writes the stages of a compiled model to one file."""

import json
from pathlib import Path

from qcompiler.errors import InputError
from qcompiler.files.replacing import not_replaced, replacing_file
from qcompiler.plugins.explorer.graphs import graph_collection
from qcompiler.program.exporters import Exporter
from qcompiler.program.program import Program


class ModelExplorer(Exporter):
    """Writes all stages, or one stage, as JSON."""

    def write(  # type: ignore[override]  # no options
        self, program: Program, output: Path, stage: str | None = None
    ) -> None:
        """Writes the file atomically."""
        stages = program.stages if stage is None else {stage: program.stages[stage]}
        text = json.dumps(graph_collection(program.graph.name, stages))
        try:
            with replacing_file(output) as part:
                part.write_text(text, encoding="utf-8")
        except OSError as error:
            need = "a path in a folder that exists"
            said = InputError("the graphs cannot be written", got=f"{output}: {error}", need=need)
            raise not_replaced(said, error, output, len(text)) from error
