"""Model Explorer's extension that opens graph text (`--extensions=qcompiler.plugins.explorer`).

A file numbered by `qcompiler opt --dump` or QCOMPILER_DUMP_DIR also opens the other stages in its folder.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

from dacite import from_dict
from model_explorer import Adapter, AdapterMetadata, ModelExplorerGraphs
from model_explorer.graph_builder import GraphCollection

import qcompiler.dialects  # noqa: F401  (fills the table of operations)
from qcompiler.errors import InputError
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import numbered
from qcompiler.plugins.explorer.graphs import graph_collection

NUMBERED = re.compile(r"\d\d_([\w-]+)")


class QirAdapter(Adapter):  # type: ignore[misc]  # Model Explorer has no types
    """Converts graph text to Model Explorer graphs, one per stage."""

    metadata: ClassVar[AdapterMetadata] = AdapterMetadata(
        id="qcompiler",
        name="qcompiler",
        description="Graphs of qcompiler, the quantization compiler",
        fileExts=["qir"],
    )

    def convert(self, model_path: str, settings: dict[str, Any]) -> ModelExplorerGraphs:
        """The graphs of a file and of the other stages in its folder.

        Raises:
            InputError: A file cannot be read.
            ParseError: A file is not graph text.
        """
        path = Path(model_path)
        stages: dict[str, Graph] = {}
        for file in _beside(path):
            found = NUMBERED.fullmatch(file.stem)
            stages[numbered(found[1] if found else file.stem, stages)] = _read(file)
        name = path.parent.name if len(stages) > 1 else path.name
        return {"graphCollections": [from_dict(GraphCollection, graph_collection(name, stages))]}


def _beside(path: Path) -> list[Path]:
    if NUMBERED.fullmatch(path.stem) is None:
        return [path]
    return sorted(file for file in path.parent.glob("*.qir") if NUMBERED.fullmatch(file.stem))


def _read(path: Path) -> Graph:
    try:
        return Graph.parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the graph cannot be read", got=f"{path}: {error}", need="a text file") from error
