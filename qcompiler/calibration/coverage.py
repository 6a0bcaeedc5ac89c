"""Calibration coverage of each value, as a table: worst first."""

from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

NO_TOKEN = "saw no token"
HEADINGS = (("value", "left"), ("module", "left"), ("rows", "right"), ("channels", "right"), ("absmax", "right"))


@dataclass(frozen=True)
class CoverageRow:
    """Coverage of one value.

    Attributes:
        value: Name of the value.
        module: Its module path in the model.
        rows: Rows seen.
        channels: Size of its last axis.
        absmax: Largest magnitude over all channels.
        unseen: Whether it saw no rows, or zeros only.
    """

    value: str
    module: str
    rows: int
    channels: int
    absmax: float
    unseen: bool

    @property
    def badness(self) -> tuple[bool, int, float, str]:
        """Sort key: unseen values first, then those with few rows, then those with large magnitudes."""
        return not self.unseen, self.rows, -self.absmax, self.value


@dataclass(frozen=True)
class Coverage:
    """One row for each observed value, worst first; printing it gives a table."""

    rows: tuple[CoverageRow, ...]

    @property
    def unseen(self) -> tuple[CoverageRow, ...]:
        """The values that saw no token."""
        return tuple(row for row in self.rows if row.unseen)

    def summary(self) -> str:
        """Returns a one-line summary."""
        if not self.rows:
            return "no value was observed"
        if not self.unseen:
            return f"{_count(len(self.rows))} observed; each saw tokens"
        return f"{_count(len(self.rows))} observed; {len(self.unseen)} saw no token"

    def __str__(self) -> str:
        table = Table(box=SIMPLE, pad_edge=False)
        for heading, side in HEADINGS:
            table.add_column(heading, justify="right" if side == "right" else "left", overflow="fold")
        table.add_column("")
        for row in self.rows:
            cells = (f"%{row.value}", row.module, str(row.rows), str(row.channels), f"{row.absmax:.4g}")
            table.add_row(*(cell.replace("[", "\\[") for cell in cells), NO_TOKEN if row.unseen else "")
        console = Console(width=160, no_color=True, force_terminal=False, legacy_windows=False)
        with console.capture() as capture:
            console.print(table, soft_wrap=False)
        lines = [line.rstrip() for line in capture.get().splitlines() if line.strip()] if self.rows else []
        return "\n".join([*lines, self.summary()])


def _count(values: int) -> str:
    return f"{values} value{'' if values == 1 else 's'}"
