"""The result of error attribution: one row for each quantized operation, as a table and as JSON."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

KEYS, VALUES = "keys", "values"
"""The two parts of a key-value cache."""


@dataclass(frozen=True)
class ErrorRow:
    """One quantized operation; the errors are signal-to-noise ratios in dB.

    Attributes:
        name: The value that it computes.
        module: Its module path in the model.
        own: Error of quantizing its operands, on the float model's input.
        inherited: Error caused by its input alone.
        kernel: Difference between kernel and reference; infinity if they are equal.
        part: For attention over a quantized cache, what is quantized: "keys" or "values"; else empty.
        outputs: Error of the model's outputs if only this operation is quantized; None if it was not measured.
    """

    name: str
    module: str
    own: float
    inherited: float
    kernel: float
    part: str = ""
    outputs: float | None = None


@dataclass(frozen=True)
class ErrorReport:
    """One row for each quantized operation, and two for each cache; the worst own error first. Prints as a table."""

    rows: tuple[ErrorRow, ...]

    @property
    def caches(self) -> tuple[ErrorRow, ...]:
        """The rows of key-value caches."""
        return tuple(row for row in self.rows if row.part)

    def __str__(self) -> str:
        measured = any(row.outputs is not None for row in self.rows)
        table = Table(box=SIMPLE, pad_edge=False)
        for heading in ("operation", "module", "own dB", "inherited dB", "kernel dB", *["outputs dB"] * measured):
            table.add_column(heading, justify="right" if heading.endswith("dB") else "left", overflow="fold")
        for row in self.rows:
            numbers = [row.own, row.inherited, row.kernel, *[row.outputs] * measured]
            table.add_row(f"%{row.name} {row.part}".strip(), row.module, *map(_shown, numbers))
        console = Console(width=140, no_color=True, force_terminal=False, legacy_windows=False)
        with console.capture() as capture:
            console.print(table, soft_wrap=False)
        return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())

    def to_json(self) -> str:
        """Returns the rows as JSON, in order; null is infinity, which means no error.

        `part` is present in rows of caches, and `outputs` in rows for which it was measured.
        """
        return json.dumps([_json(row) for row in self.rows], indent=2, allow_nan=False)


def _json(row: ErrorRow) -> dict[str, Any]:
    absent = {"part": "", "outputs": None}
    found = {key: value for key, value in asdict(row).items() if key not in absent or value != absent[key]}
    return {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in found.items()}


def sqnr(y: Tensor, other: Tensor) -> float:
    """Returns 10 · log10(|y|² / |other - y|²), in FP64: infinity for equal tensors, -infinity if only `y` is zero."""
    return sqnr_of([(y, other)])


def sqnr_of(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Returns the ratio of `sqnr` over several pairs of tensors, as if each side were one tensor."""
    signal = noise = 0.0
    for y, other in pairs:
        signal += _energy(y)
        noise += _energy(other.to(torch.float64) - y)
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _energy(tensor: Tensor) -> float:
    return float(tensor.to(torch.float64).square().sum())


def _shown(number: float | None) -> str:
    if number is None:
        return ""
    return "exact" if number == math.inf else f"{number:.1f}"
