"""All QCOMPILER_* environment variables, typed; no other module reads the environment.

    $ QCOMPILER_TIME_PASSES=1 QCOMPILER_DUMP_DIR=graphs python model.py
    $ python -m qcompiler.knobs                     # prints the table

    from qcompiler import knobs

    if knobs.current().time_passes: ...
    with knobs.scope(time_passes=True): ...         # overrides knobs, for tests

The environment is read on each use, so variables can be set at any time and an invalid one does not break imports.
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
        raise ValueError("a path whose ~ names an existing home folder") from None


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
    """Knob values; `QCOMPILER_<NAME>` sets the field <name>, and an empty variable keeps the default."""

    print_after: tuple[str, ...] = field(
        default=(), metadata=_knob(_names, f'print the graph after these passes: names separated by commas, or "{ALL}"')
    )
    time_passes: bool = field(default=False, metadata=_knob(_flag, "print how long each pass took"))
    progress: bool = field(
        default=True, metadata=_knob(_flag, "show the stage of compile() on standard error if it is a terminal")
    )
    dump_dir: Path | None = field(
        default=None, metadata=_knob(_path, "write the graph after each pass into this folder")
    )
    cache_dir: Path | None = field(
        default=None, metadata=_knob(_path, "folder for compiled kernels, instead of Triton's cache")
    )
    ptxas: str = field(
        default="bundled",
        metadata=_knob(str, "assembler of kernels: bundled (Triton's), auto (the newest installed one), or a path"),
    )
    tuned: bool = field(
        default=False,
        metadata=_knob(_flag, "use earlier results of compiled.tune() on this machine"),
    )
    cpu_cache: int = field(
        default=2000, metadata=_knob(_count, "megabytes of dequantized weights that target cpu caches")
    )
    capture_seconds: float = field(
        default=120.0,
        metadata=_knob(_seconds, "CPU seconds that torch.export may use before capture makes fewer sizes dynamic"),
    )
    collective_seconds: float | None = field(
        default=None,
        metadata=_knob(_seconds, "seconds that a rank waits for the others in a collective, instead of torch's limits"),
    )
    peer_memory: bool = field(
        default=True,
        metadata=_knob(_flag, "exchange tensors of GPUs of one host through each other's memory, not NCCL"),
    )
    vllm_fuse: bool = field(
        default=False,
        metadata=_knob(_flag, "in vLLM, fuse norms and activations into the quantizations after them"),
    )
    update: bool = field(
        default=False, metadata=_knob(_flag, "tests rewrite their golden texts instead of comparing them")
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Knobs":
        """Reads the knobs from `environment`; raises QCompilerError for an unknown QCOMPILER_ variable."""
        fields = {f"{PREFIX}{knob.name.upper()}": knob for knob in dataclasses.fields(cls)}
        read: dict[str, Any] = {}
        for variable, text in environment.items():
            if not variable.startswith(PREFIX):
                continue
            if variable not in fields:
                raise QCompilerError(
                    "unknown qcompiler environment variable",
                    got=variable,
                    fix=did_you_mean(variable, fields),
                )
            if text.strip():
                try:
                    read[fields[variable].name] = fields[variable].metadata["read"](text.strip())
                except ValueError as need:
                    problem = f"the environment variable {variable} has an invalid value"
                    raise QCompilerError(problem, got=repr(text), need=need) from None
        return dataclasses.replace(cls(), **read)

    def prints_after(self, name: str) -> bool:
        """Whether to print the graph after the pass `name`."""
        return ALL in self.print_after or name in self.print_after


_scoped: Knobs | None = None


def current() -> Knobs:
    """The active knobs: the innermost `scope` if there is one, otherwise the environment."""
    return Knobs.from_environment(os.environ) if _scoped is None else _scoped


@contextmanager
def scope(**changes: Any) -> Iterator[Knobs]:
    """Overrides knobs in all threads until the block ends; the environment is not read again inside it."""
    global _scoped
    names = [knob.name for knob in dataclasses.fields(Knobs)]
    if unknown := [name for name in changes if name not in names]:
        raise QCompilerError("unknown knob", got=unknown[0], fix=did_you_mean(unknown[0], names))
    before, _scoped = _scoped, dataclasses.replace(current(), **changes)
    try:
        yield _scoped
    finally:
        _scoped = before


def table(reading: Knobs) -> str:
    """The knobs as a table: variable, current value, effect."""
    rows = [("VARIABLE", "VALUE", "WHAT IT DOES")]
    for knob in dataclasses.fields(reading):
        value = getattr(reading, knob.name)
        shown = ",".join(value) if isinstance(value, tuple) else "" if value is None else str(value)
        rows.append((f"{PREFIX}{knob.name.upper()}", shown or "-", knob.metadata["says"]))
    wide, wider = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{variable:<{wide}}  {shown:<{wider}}  {says}" for variable, shown, says in rows)


def main() -> int:
    """Prints the knob table; returns 1 after an error message if the environment is invalid."""
    try:
        print(table(current()))
    except QCompilerError as error:
        print(f"qcompiler.knobs: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
