"""Ranges of symbolic sizes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """The values that a symbol may take at run time; `high=None` means no upper limit."""

    low: int = 0
    high: int | None = None

    def __str__(self) -> str:
        return f"{self.low}..{'' if self.high is None else self.high}"

    def __contains__(self, value: int) -> bool:
        return self.low <= value and (self.high is None or value <= self.high)
