"""Exporters, found by name: each writes a compiled model in another format, such as a folder that IREE runs.

A distribution provides an exporter as an entry point:

    [project.entry-points."qcompiler.exporters"]
    iree = "qcompiler.plugins.iree:IreeExporter"

The `manifest.json` of an exported folder names its exporter: `"format": "qcompiler-iree"`.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from qcompiler.capture.signature import Signature
from qcompiler.entry_points import EXPORTERS, load, offered, shown
from qcompiler.errors import InputError, did_you_mean
from qcompiler.program.program import Program

MANIFEST, PREFIX = "manifest.json", "qcompiler-"


class Exported(ABC):
    """A folder that an exporter wrote, as the command line shows it; InputError if its manifest is damaged.

    Attributes:
        kind: A description of the folder, for messages.
        runs: The function that loads the model.
        folder: The path of the folder.
    """

    kind: ClassVar[str]
    runs: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def title(self) -> str:
        """Returns a one-line description of the folder."""

    @abstractmethod
    def document(self) -> Mapping[str, Any]:
        """Returns the manifest's contents, for JSON."""

    @abstractmethod
    def inputs(self) -> Mapping[str, str]:
        """Returns input name -> type."""

    @abstractmethod
    def facts(self) -> list[str]:
        """Returns further facts about the model, one line each."""

    @abstractmethod
    def files(self) -> Mapping[str, str | None]:
        """Returns file -> what is wrong with it; None if it is unchanged."""

    @abstractmethod
    def signature(self) -> Signature:
        """Returns the calling convention of the model."""

    @abstractmethod
    def load(self) -> Callable[..., Any]:
        """Loads the model; QCompilerError if a required package is missing."""


class Exporter(ABC):
    """Writes a stage of a program.

    Attributes:
        target: The exporter's name in `qcompiler compile --target`; None if it accepts artefacts only.
        exported: The class of its folders; None if it does not write folders.
    """

    target: ClassVar[str | None] = None
    exported: ClassVar[type[Exported] | None] = None

    def check(self, output: Path) -> None:  # noqa: B027  (most exporters have nothing to check)
        """Raises QCompilerError before any work is done if a package is missing or `output` cannot be replaced."""

    @abstractmethod
    def write(self, program: Program, output: Path, stage: str | None = None, **options: Any) -> Any:
        """Writes a stage, by default the last one, and returns the object that runs it, if there is one.

        Raises:
            InputError: `output` cannot be written, or there is no such stage.
            CodegenError: The exporter cannot express the stage.
        """


def exporter_names() -> list[str]:
    """Returns the names of all installed exporters."""
    return sorted(offered(EXPORTERS))


def exporter_called(name: str) -> Exporter:
    """Returns the exporter of that name; InputError if it is not installed."""
    entry = offered(EXPORTERS).get(name)
    if entry is None:
        known = exporter_names()
        fix = did_you_mean(name, known) or "Install the distribution that provides it, or reinstall qcompiler."
        raise InputError("no such exporter is installed", got=repr(name), fix=fix)
    found = load(entry, InputError)
    if not isinstance(found, type) or not issubclass(found, Exporter):
        raise InputError("an entry point does not provide an exporter", got=shown(entry), need="an Exporter class")
    return found()


def exporter_targets() -> dict[str, Exporter]:
    """Returns exporters by their names in `qcompiler compile --target`."""
    exporters = map(exporter_called, exporter_names())
    return {exporter.target: exporter for exporter in exporters if exporter.target is not None}


def exported_at(folder: Path) -> tuple[str, Exported] | None:
    """Returns the exporter that wrote a folder, and the folder; None if no installed exporter wrote it."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    format = str(found.get("format")) if isinstance(found, dict) else ""
    name = format.removeprefix(PREFIX)
    if name == format or name not in exporter_names():
        return None
    kind = exporter_called(name).exported
    return None if kind is None else (name, kind(folder))
