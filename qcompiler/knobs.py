"""Every QCOMPILER_* environment variable, typed, in one place; nothing else reads the environment.

    $ QCOMPILER_TIME_PASSES=1 QCOMPILER_DUMP_DIR=graphs python model.py
    $ python -m qcompiler.knobs                     # prints the table

    from qcompiler import knobs

    if knobs.current().time_passes: ...
    with knobs.scope(time_passes=True): ...         # replaces single knobs, for tests

The environment is read when it is asked for, so that a variable may be set at any moment and no import fails on a
wrong one.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompiler.errors import QCompilerError, did_you_mean

PREFIX = "QCOMPILER_"
ALL = "all"

_ON = ("1", "true", "yes", "on")
_OFF = ("0", "false", "no", "off")


def _flag(text: str) -> bool:
    if text.lower() not in _ON + _OFF:
        raise ValueError(f"one of {', '.join(_ON + _OFF)}")
    return text.lower() in _ON


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("a whole number, 0 or more")
    return int(text)


def _path(text: str) -> Path:
    if "\0" in text:
        raise ValueError("a path")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("a path, whose ~ stands for a folder that exists") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError("a number of seconds above 0")
    return seconds


def _knob(read: Callable[[str], object], says: str) -> dict[str, Any]:
    return {"read": read, "says": says}


@dataclass(frozen=True)
class Knobs:
    """One reading of the environment: `QCOMPILER_<NAME>` sets each field, and an empty variable leaves it alone."""

    print_after: tuple[str, ...] = field(
        default=(), metadata=_knob(_names, f'print the graph after these passes: names and commas, or "{ALL}"')
    )
    time_passes: bool = field(default=False, metadata=_knob(_flag, "print how long each pass took"))
    progress: bool = field(
        default=True, metadata=_knob(_flag, "show the stage of compile() on standard error, if a terminal")
    )
    dump_dir: Path | None = field(
        default=None, metadata=_knob(_path, "write the graph after each pass into this folder")
    )
    cache_dir: Path | None = field(
        default=None, metadata=_knob(_path, "where compiled kernels are kept, in place of Triton's own folder")
    )
    tuned: bool = field(
        default=False,
        metadata=_knob(_flag, "use what compiled.tune() measured on this machine before"),
    )
    cpu_cache: int = field(
        default=2000, metadata=_knob(_count, "megabytes of dequantized weights that target cpu keeps")
    )
    capture_seconds: float = field(
        default=120.0,
        metadata=_knob(_seconds, "CPU time that torch.export may take before capture leaves fewer sizes open"),
    )
    update: bool = field(
        default=False, metadata=_knob(_flag, "tests rewrite their golden texts in place of comparing them")
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Knobs":
        """The knobs that these variables set; a QCOMPILER_ variable that is no knob is an error."""
        fields = {f"{PREFIX}{knob.name.upper()}": knob for knob in dataclasses.fields(cls)}
        read: dict[str, Any] = {}
        for variable, text in environment.items():
            if not variable.startswith(PREFIX):
                continue
            if variable not in fields:
                raise QCompilerError(
                    "the environment sets a variable that qcompiler does not have",
                    got=variable,
                    fix=did_you_mean(variable, fields),
                )
            if text.strip():
                try:
                    read[fields[variable].name] = fields[variable].metadata["read"](text.strip())
                except ValueError as need:
                    problem = f"the environment variable {variable} has a wrong value"
                    raise QCompilerError(problem, got=repr(text), need=need) from None
        return dataclasses.replace(cls(), **read)

    def prints_after(self, name: str) -> bool:
        """Whether the graph should be printed after the pass of this name."""
        return ALL in self.print_after or name in self.print_after


_scoped: Knobs | None = None


def current() -> Knobs:
    """The knobs in force: those of the innermost `scope`, or else what the environment says now."""
    return Knobs.from_environment(os.environ) if _scoped is None else _scoped


@contextmanager
def scope(**changes: Any) -> Iterator[Knobs]:
    """Replaces single knobs, in all threads, until the block ends; inside it the environment is not read again."""
    global _scoped
    names = [knob.name for knob in dataclasses.fields(Knobs)]
    if unknown := [name for name in changes if name not in names]:
        raise QCompilerError("there is no such knob", got=unknown[0], fix=did_you_mean(unknown[0], names))
    before, _scoped = _scoped, dataclasses.replace(current(), **changes)
    try:
        yield _scoped
    finally:
        _scoped = before


def table(reading: Knobs) -> str:
    """One row a knob: variable, value in force, what it does."""
    rows = [("VARIABLE", "VALUE", "WHAT IT DOES")]
    for knob in dataclasses.fields(reading):
        value = getattr(reading, knob.name)
        shown = ",".join(value) if isinstance(value, tuple) else "" if value is None else str(value)
        rows.append((f"{PREFIX}{knob.name.upper()}", shown or "-", knob.metadata["says"]))
    wide, wider = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{variable:<{wide}}  {shown:<{wider}}  {says}" for variable, shown, says in rows)


def main() -> int:
    """Prints the table of what the environment sets; 1 and a sentence when it sets something wrong."""
    try:
        print(table(current()))
    except QCompilerError as error:
        print(f"qcompiler.knobs: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
