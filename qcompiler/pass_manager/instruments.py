"""Instruments that run around passes: timing, printing, dumps, and checks of declared effects."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from qcompiler.errors import PassError
from qcompiler.files.replacing import replacing_file
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Op, TensorType
from qcompiler.pass_manager.pipeline import Effect, Pass, pass_class


@dataclass(frozen=True)
class Outcome:
    """The result of a pass: whether it reported a change, and its run time."""

    changed: bool
    seconds: float


class Instrument:
    """Base class with hooks that are called around every pass."""

    def begin(self, graph: Graph, inputs: Sequence[Any] | None) -> None:
        """Called before the first pass; `inputs` are real inputs of the graph, if given."""

    def before(self, step: Pass, graph: Graph) -> None:
        """Called before each pass."""

    def after(self, step: Pass, graph: Graph, outcome: Outcome) -> None:
        """Called after each pass, after its graph is verified."""

    def end(self, graph: Graph) -> None:
        """Called after the last pass."""

    def notes(self) -> Iterable[str]:
        """Sentences for the report of the compiled model."""
        return ()


class TimePasses(Instrument):
    """Collects (pass, milliseconds, changed); `str()` gives a table, printed to `file` at the end if given.

    The times exclude the verifier and other instruments.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.rows: list[tuple[str, float, bool]] = []
        self.file = file

    def begin(self, graph: Graph, inputs: Sequence[Any] | None) -> None:
        """Starts a new table."""
        self.rows = []

    def after(self, step: Pass, graph: Graph, outcome: Outcome) -> None:
        """Adds a row."""
        self.rows.append((str(step), 1e3 * outcome.seconds, outcome.changed))

    def end(self, graph: Graph) -> None:
        """Prints the table."""
        if self.file is not None:
            print(self, file=self.file)

    def __str__(self) -> str:
        total = sum(ms for _, ms, _ in self.rows)
        rows = [f"{ms:10.1f} ms  {'changed' if changed else '-':8} {name}" for name, ms, changed in self.rows]
        return "\n".join([*rows, f"{total:10.1f} ms  {'':8} total"])


class PrintAfter(Instrument):
    """Prints the graph after the passes in `names`, or after "all" passes; raises PassError for an unknown name."""

    def __init__(self, *names: str, file: TextIO | None = None) -> None:
        self.names, self.file = names, file
        for name in names:
            if name != "all":
                pass_class(name)

    def after(self, step: Pass, graph: Graph, outcome: Outcome) -> None:
        """Prints the graph if the pass is selected."""
        if "all" in self.names or step.name in self.names:
            print(f"// ----- after {step} -----\n{graph}", file=self.file or sys.stderr)


class Dump(Instrument):
    """Writes `00_captured.qir`, `01_canonicalize.qir`, … to a folder; removes such files of earlier runs."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._count = 0

    def begin(self, graph: Graph, inputs: Sequence[Any] | None) -> None:
        """Writes the captured graph."""
        self._count = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("*.qir"):
                if re.fullmatch(r"\d\d+_[\w-]+", path.stem):
                    path.unlink()
        except OSError as error:
            raise self._failed(error) from error
        self._write("captured", graph)

    def after(self, step: Pass, graph: Graph, outcome: Outcome) -> None:
        """Writes the graph after the pass."""
        self._write(step.name, graph)

    def _write(self, name: str, graph: Graph) -> None:
        path = self.folder / f"{self._count:02}_{name}.qir"
        try:
            with replacing_file(path) as partial:
                partial.write_text(f"{graph}\n", encoding="utf-8")
        except OSError as error:
            raise self._failed(error) from error
        self._count += 1

    def _failed(self, error: OSError) -> PassError:
        return PassError("graphs cannot be dumped", got=error, need=f"a writable folder at {self.folder}")


class CheckChanged(Instrument):
    """Checks that each pass reports correctly whether it changed the graph."""

    def before(self, step: Pass, graph: Graph) -> None:
        """Records the text of the graph."""
        self._text = str(graph)

    def after(self, step: Pass, graph: Graph, outcome: Outcome) -> None:
        """Compares the text; raises PassError if the pass reported the wrong result."""
        if outcome.changed != (str(graph) != self._text):
            lie = "did not change the graph but returned True"
            raise PassError(
                f"pass '{step}' {lie if outcome.changed else 'changed the graph but returned False'}",
                fix="Return from run() whether the graph changed; apply_rules() returns it.",
            )


TOLERANCE = {
    torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2,
    torch.float8_e4m3fn: 6e-2, torch.float8_e5m2: 0.12,
}  # fmt: skip
"""Dtype -> largest relative error (norm of the difference over norm) that reordering may cause."""


class Validate(Instrument):
    """Runs the graph on real inputs before and after each pass, and checks the declared effect of the pass.

    `errors` has the largest relative error that each pass added to an output. While a pass runs, weights that it
    removes stay in memory; intermediate values are kept only to explain an error.
    """

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}

    def begin(self, graph: Graph, inputs: Sequence[Any] | None) -> None:
        """Runs the captured graph."""
        if inputs is None and graph.inputs:
            raise PassError("the validate instrument needs real inputs", fix="Pass example_inputs to compile().")
        self.inputs: Sequence[Any] = list(inputs or ())
        self.errors = {}
        self._old: Mapping[str, Any] = _run(graph, self.inputs)

    def before(self, step: Pass, graph: Graph) -> None:
        """Keeps a copy of the graph, to locate errors."""
        self._graph = graph.clone()

    def after(self, step: Pass, graph: Graph, outcome: Outcome) -> None:
        """Runs the graph again; raises PassError with the pass and the first operation that differs too much."""
        limit = {Effect.EXACT: None, Effect.REORDERS: step.budget, Effect.LOSSY: step.budget}[step.effect]
        called = self.inputs
        if outcome.changed:
            self.inputs, self._old = step.translated(self._graph, self.inputs, self._old)
        new = _run(graph, self.inputs)
        if missing := sorted(self._old.keys() ^ new.keys()):
            got = f"{missing[0]} is {'missing' if missing[0] in self._old else 'new'}"
            raise PassError(
                f"pass '{step}' changes the outputs or updates of the graph",
                got=got,
                need="the same outputs and updates",
            )
        for name, old in self._old.items():
            if not within(old, new[name], limit):
                raise PassError(
                    f"pass '{step}' violates its declared effect '{step.effect.value}'",
                    got=f"{_deviation(old, new[name])} in {name}",
                    need="equal bits" if limit is None else f"at most {allowed(old, limit):.3g}",
                    where=f"{self._first(graph, limit, called) or name}, the first operation that differs",
                )
        worst = max((relative_error(old, new[name]) for name, old in self._old.items()), default=0.0)
        self.errors[step.name] = max(worst, self.errors.get(step.name, 0.0))
        self._old = new
        del self._graph

    def _first(self, graph: Graph, limit: float | None, called: Sequence[Any]) -> str | None:
        """The first operation whose result differs from the value of the same name before the pass."""
        values: dict[str, Any] = {}
        found: list[str] = []

        def keep(op: Op, results: tuple[Any, ...]) -> None:
            values.update((value.name, out) for value, out in zip(op.results, results, strict=True))

        def compare(op: Op, results: tuple[Any, ...]) -> None:
            for value, new in zip(op.results, results, strict=True):
                if not found and value.name in values and not within(values[value.name], new, limit):
                    line = f" at {op.loc.file}:{op.loc.line}" if op.loc.file else ""
                    found.append(f"{value} = {op.name}{line}")

        _run(self._graph, called, keep)
        _run(graph, self.inputs, compare)
        return found[0] if found else None


def _run(graph: Graph, inputs: Sequence[Any], observe: Any = None) -> dict[str, Any]:
    """Runs a graph with a fixed random seed; returns outputs and updates by name."""
    updates: dict[str, torch.Tensor] = {}
    devices = sorted({t.device.index for t in inputs if isinstance(t, torch.Tensor) and t.is_cuda})
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        outputs = interpret(graph, inputs, updates=updates, observe=observe)
    found = {f"output {index}": out for index, out in enumerate(_leaves(outputs))}
    return {**found, **{f"the update of %{name}": updates[name] for name in sorted(updates)}}


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, tuple | list):
        for item in tree:
            yield from _leaves(item)
    else:
        yield tree


def within(old: Any, new: Any, limit: float | None) -> bool:
    """Whether `new` is close enough to `old`: equal bits if `limit` is None, otherwise by relative error."""
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return type(old) is type(new) and bool(old == new or (old != old and new != new))
    if old.shape != new.shape or old.dtype != new.dtype:
        return False
    if limit is None:
        return torch.equal(_bits(old), _bits(new))
    return relative_error(old, new) <= allowed(old, limit)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # Clone, because even a one-element tensor may have strides that do not allow a byte view.
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def allowed(old: Any, limit: float) -> float:
    """The allowed relative error: the limit of the pass plus the reordering tolerance of the dtype."""
    return limit + TOLERANCE.get(getattr(old, "dtype", None), 0.0)  # type: ignore[arg-type]  # None is not a key


def relative_error(old: Any, new: Any) -> float:
    """The norm of the difference over the norm of `old`; 0 unless both are tensors of the same shape."""
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor) or old.shape != new.shape:
        return 0.0
    wide = torch.complex128 if old.is_complex() or new.is_complex() else torch.float64
    a, b = old.to(wide), new.to(wide)
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(nan=0.5), b[~finite].nan_to_num(nan=0.5)):
        return float("inf")
    a, b = a[finite], b[finite]
    norm = float(a.abs().square().sum().sqrt())
    error = float((a - b).abs().square().sum().sqrt())
    return error / norm if norm else float("inf") if error else 0.0


def _deviation(old: Any, new: Any) -> str:
    """How two values differ, in words."""
    kinds = TensorType.of(old), TensorType.of(new)
    if kinds[0] is None or kinds[1] is None:
        return f"{new!r} instead of {old!r}"
    if kinds[0] != kinds[1]:
        return f"{kinds[1]} instead of {kinds[0]}"
    error = relative_error(old, new)
    return f"a relative error of {error:.3g}" if error else "equal values with different bits"
