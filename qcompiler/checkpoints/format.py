"""A checkpoint format as a value: how it is recognized, read and written, and what other readers make of it.

    register(CheckpointFormat("fp8", read=stored_weights, writer=BlockFp8))

Importing its file registers a format. Our formats are the files in `formats/`, which can be written, and in
`read_only/`. Other distributions add formats through the entry point group `qcompiler.checkpoints`, by name.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from qcompiler.checkpoints.files import TensorFiles
from qcompiler.checkpoints.layer_schemes import LayerSchemes
from qcompiler.checkpoints.quantized_weight import QuantizedWeight, StoredAs
from qcompiler.entry_points import CHECKPOINTS, import_modules, load, offered, shown
from qcompiler.errors import QCompilerError, did_you_mean

HOMES = ("qcompiler.checkpoints.formats", "qcompiler.checkpoints.read_only")
"""Packages whose modules register formats; given by name because these modules import this one."""


class Writer(Protocol):
    """How a format stores quantized weights and describes them in the configuration."""

    @property
    def fix(self) -> str:
        """Advice for weights that the format cannot store."""

    @property
    def readers(self) -> tuple[str, ...]:
        """Other tools that read the format: names in `readers.READERS`."""

    def why_not(self, weight: QuantizedWeight) -> str | None:
        """The reason why this format cannot store a quantized weight; None if it can."""

    def why_unread(self, weight: QuantizedWeight) -> str | None:
        """The reason why transformers cannot read a weight that ends in a partial block; None if it can."""

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of a quantized weight by their names in the file."""

    def config(self, weights: Mapping[str, QuantizedWeight], unconverted: Collection[str]) -> dict[str, Any]:
        """The `quantization_config` for all quantized weights and the names of unconverted layers."""


@dataclass(frozen=True)
class CheckpointFormat:
    """A checkpoint format.

    Attributes:
        name: The `quant_method` in the configuration, and the name that selects the format for writing.
        read: Finds the quantized weights of a folder, from the configuration and the tensors.
        writer: Returns the writer, given the `scale_format`; None if the format can only be read.
        notes: Report notes about the configuration, one sentence each.
        declared: Whether the configuration names the format; float checkpoints have no configuration.
        is_float: Whether a valid configuration does not quantize weights.
        separate: Returns the configuration of a folder that is in another file than `config.json`, and that file;
            None if there is none. Gets the folder and the configuration in `config.json`, if there is one.
        files: Names of the other files.
        scale_suffix: Suffix that a loaded model adds to the name of a weight for its scales.
        schemes: Returns the schemes that a configuration declares; None if it declares none.
        prescales: Whether it stores factors that an activation is multiplied by before it is quantized.
    """

    name: str
    read: Callable[[Mapping[str, Any], TensorFiles], Mapping[str, StoredAs]] = lambda *_: {}
    writer: Callable[[str], Writer] | None = None
    notes: Callable[[Mapping[str, Any]], list[str]] = lambda _: []
    declared: bool = True
    is_float: Callable[[Mapping[str, Any]], bool] = lambda _: False
    separate: Callable[[Path, Mapping[str, Any] | None], tuple[dict[str, Any], str] | None] = lambda *_: None
    files: tuple[str, ...] = ()
    scale_suffix: str = "_scale"
    schemes: Callable[[Mapping[str, Any]], LayerSchemes | None] = lambda _: None
    prescales: bool = False


_FORMATS: dict[str, CheckpointFormat] = {}


def register(format: CheckpointFormat) -> CheckpointFormat:
    """Makes a format known by its name; raises QCompilerError if the name is taken."""
    if _FORMATS.setdefault(format.name, format) is not format:
        raise QCompilerError("two checkpoint formats have one name", got=repr(format.name), need="an unused name")
    return format


def our_formats() -> Mapping[str, CheckpointFormat]:
    """The formats of this distribution, and others that were loaded, by name."""
    for home in HOMES:
        import_modules(home)
    return _FORMATS


def format_read(method: object) -> CheckpointFormat | None:
    """The format with a `quant_method`; None if there is none that can be read."""
    found = _called(method)
    return found if found is not None and found.declared else None


def writer_called(name: str, scale_format: str) -> Writer:
    """The writer of a format. Raises QCompilerError, with the nearest name, if no format of the name can be written."""
    found = _called(name)
    if found is None or found.writer is None:
        known = names(lambda format: format.writer is not None)
        problem = "no such checkpoint format" if found is None else "the checkpoint format can only be read"
        raise QCompilerError(problem, got=repr(name), fix=did_you_mean(str(name), known))
    return found.writer(scale_format)


def stores_prescales(name: str) -> bool:
    """Whether a format stores factors of input channels."""
    found = _called(name)
    return found is not None and found.prescales


def names(wanted: Callable[[CheckpointFormat], bool]) -> list[str]:
    """The names of the formats for which `wanted` is true, and of all that other distributions offer."""
    return sorted({*offered(CHECKPOINTS), *(name for name, format in our_formats().items() if wanted(format))})


def _called(name: object) -> CheckpointFormat | None:
    known = our_formats()
    if isinstance(name, str) and name not in known and (entry := offered(CHECKPOINTS).get(name)) is not None:
        load(entry, QCompilerError)
        if name not in known:
            need = f"a format called {name!r}"
            raise QCompilerError("an entry point does not register a format of its name", got=shown(entry), need=need)
    return known.get(name) if isinstance(name, str) else None
