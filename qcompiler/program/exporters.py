"""What writes a compiled model in a form of its own, such as a folder that IREE runs: exporters, found by name.

A distribution offers an exporter as an entry point:

    [project.entry-points."qcompiler.exporters"]
    iree = "qcompiler.plugins.iree:IreeExporter"

A folder that an exporter wrote names it in its `manifest.json`: `"format": "qcompiler-iree"`.
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
    """A folder that an exporter wrote, as the command line looks at it; InputError if its manifest is damaged.

    Attributes:
        kind: What the folder is, in a message.
        runs: What runs the model in a program.
        folder: Where it is.
    """

    kind: ClassVar[str]
    runs: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def title(self) -> str:
        """The folder in one line."""

    @abstractmethod
    def document(self) -> Mapping[str, Any]:
        """What the folder says of itself, for JSON."""

    @abstractmethod
    def inputs(self) -> Mapping[str, str]:
        """Name of an input -> its type."""

    @abstractmethod
    def facts(self) -> list[str]:
        """What else there is to say of the model, one line each."""

    @abstractmethod
    def files(self) -> Mapping[str, str | None]:
        """File -> what is wrong with it; None if it is as it was written."""

    @abstractmethod
    def signature(self) -> Signature:
        """How the model is called."""

    @abstractmethod
    def load(self) -> Callable[..., Any]:
        """The model; QCompilerError if a package that runs it is missing."""


class Exporter(ABC):
    """Writes a stage of a program.

    Attributes:
        target: What `qcompiler compile --target` calls the exporter; None if it only takes artefacts.
        exported: What its folders are; None if it writes no folders.
    """

    target: ClassVar[str | None] = None
    exported: ClassVar[type[Exported] | None] = None

    def check(self, output: Path) -> None:  # noqa: B027  (most have nothing to check)
        """Raises QCompilerError, before any work is done, if a package is missing or `output` is something else."""

    @abstractmethod
    def write(self, program: Program, output: Path, stage: str | None = None, **options: Any) -> Any:
        """Writes a stage, the last one if it is None, and returns what runs it, if anything does.

        Raises:
            InputError: `output` cannot be written, or there is no such stage.
            CodegenError: The stage cannot be written in this form.
        """


def exporter_names() -> list[str]:
    """The names of all installed exporters."""
    return sorted(offered(EXPORTERS))


def exporter_called(name: str) -> Exporter:
    """The exporter of that name; InputError if none is installed."""
    entry = offered(EXPORTERS).get(name)
    if entry is None:
        known = exporter_names()
        fix = did_you_mean(name, known) or "Install the distribution that offers it, or this one again."
        raise InputError("no such exporter is installed", got=repr(name), fix=fix)
    found = load(entry, InputError)
    if not isinstance(found, type) or not issubclass(found, Exporter):
        raise InputError("an entry point gives no exporter", got=shown(entry), need="a class of exporters")
    return found()


def exporter_targets() -> dict[str, Exporter]:
    """Exporters by what `qcompiler compile --target` calls them."""
    exporters = map(exporter_called, exporter_names())
    return {exporter.target: exporter for exporter in exporters if exporter.target is not None}


def exported_at(folder: Path) -> tuple[str, Exported] | None:
    """The exporter that wrote a folder and the folder; None if an installed exporter did not write it."""
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
