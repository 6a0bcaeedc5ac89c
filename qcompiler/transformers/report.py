"""`LayerReport`: the decision for each layer of a transformers model, one line for equal layers of a stack."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from qcompiler.report.rows import Row, collapsed


@dataclass(frozen=True)
class LayerReport:
    """Which layers are quantized; printing it gives a table.

    Attributes:
        quantized: Layer -> its scheme.
        skipped: Layer -> the reason why it is in float.
    """

    quantized: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        table = Table("layer", "quantized", "why not", box=SIMPLE, pad_edge=False)
        for row in collapsed([*self._rows()]):
            table.add_row(row.module.replace("[", "\\["), row.format or "no", row.reason.replace("[", "\\["))
        console = Console(width=160, no_color=True, force_terminal=False, legacy_windows=False)
        with console.capture() as capture:
            console.print(table)
        lines = [line.rstrip() for line in capture.get().splitlines() if line.strip()]
        total = len(self.quantized) + len(self.skipped)
        return "\n".join([*lines, f"{len(self.quantized)} of {total} layers are quantized"])

    def _rows(self) -> Iterator[Row]:
        for name, scheme in self.quantized.items():
            yield Row(name, "aten.linear", name, (name,), "", 0, True, "", format=scheme)
        for name, why in self.skipped.items():
            yield Row(name, "aten.linear", name, (name,), "", 0, False, why)
