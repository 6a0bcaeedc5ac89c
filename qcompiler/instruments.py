"""What may be watched around passes, never inside them: time, text, dumps, and the truth of what they declare."""

import os
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from qcompiler.errors import PassError
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Op
from qcompiler.pass_manager import Effect, Pass


class Instrument:
    """Called around every pass; override what is needed."""

    def begin(self, graph: Graph, inputs: Sequence[Any] | None) -> None:
        """Before the first pass; `inputs` are real inputs of the graph, where there are any."""

    def before(self, step: Pass, graph: Graph) -> None:
        """Before each pass."""

    def after(self, step: Pass, graph: Graph, changed: bool) -> None:
        """After each pass; `changed` is what it says about itself."""

    def end(self, graph: Graph) -> None:
        """After the last pass."""


class TimePasses(Instrument):
    """Collects (pass, milliseconds, changed); `str` is a table, which is printed to `file` at the end, when it is given."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.rows: list[tuple[str, float, bool]] = []
        self.file = file

    def before(self, step: Pass, graph: Graph) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def after(self, step: Pass, graph: Graph, changed: bool) -> None:
        """Adds a row."""
        self.rows.append((str(step), 1e3 * (time.perf_counter() - self._start), changed))

    def end(self, graph: Graph) -> None:
        """Prints the table."""
        if self.file is not None:
            print(self, file=self.file)

    def __str__(self) -> str:
        total = sum(ms for _, ms, _ in self.rows)
        rows = [f"{ms:10.1f} ms  {'changed' if changed else '-':8} {name}" for name, ms, changed in self.rows]
        return "\n".join([*rows, f"{total:10.1f} ms  {'':8} total"])


class PrintAfter(Instrument):
    """Prints the graph after the passes called `names`, or after "all" of them."""

    def __init__(self, *names: str, file: TextIO | None = None) -> None:
        self.names, self.file = names, file

    def after(self, step: Pass, graph: Graph, changed: bool) -> None:
        """Prints, when the pass is one of them."""
        if "all" in self.names or step.name in self.names:
            print(f"// ----- after {step} -----\n{graph}", file=self.file or sys.stderr)


class Dump(Instrument):
    """Writes `00_captured.qir`, `01_canonicalize.qir`, … to a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def begin(self, graph: Graph, inputs: Sequence[Any] | None) -> None:
        """Writes the graph as captured."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._count = 0
        self._write("captured", graph)

    def after(self, step: Pass, graph: Graph, changed: bool) -> None:
        """Writes the graph as the pass left it."""
        self._write(step.name, graph)

    def _write(self, name: str, graph: Graph) -> None:
        path = self.folder / f"{self._count:02}_{name}.qir"
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        partial.write_text(f"{graph}\n", encoding="utf-8")
        os.replace(partial, path)
        self._count += 1


class CheckChanged(Instrument):
    """Holds each pass to what it says about having changed the graph."""

    def before(self, step: Pass, graph: Graph) -> None:
        """Remembers the text."""
        self._text = str(graph)

    def after(self, step: Pass, graph: Graph, changed: bool) -> None:
        """Compares; PassError when the pass told a lie."""
        if changed != (str(graph) != self._text):
            said = "it changed the graph, but the text is the same" if changed else "it changed nothing, but the text differs"
            raise PassError(f"pass '{step}' says that {said}")


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest relative error (norm of the difference over norm) that reordering may cause, by the element type."""


class Validate(Instrument):
    """Runs the graph before and after each pass on real inputs, and holds the pass to its declared effect."""

    def begin(self, graph: Graph, inputs: Sequence[Any] | None) -> None:
        """Runs the captured graph."""
        if inputs is None:
            raise PassError("the validate instrument needs real inputs", fix="Give example_inputs to compile().")
        self.inputs = list(inputs)
        self.errors: dict[str, float] = {}
        self._values, self._outputs = self._run(graph)

    def after(self, step: Pass, graph: Graph, changed: bool) -> None:
        """Runs the graph again; PassError names the pass and the first operation that differs by too much."""
        values, outputs = self._run(graph)
        limit = None if step.effect is Effect.EXACT else step.budget if step.effect is Effect.LOSSY else 0.0
        worst = 0.0
        for index, (old, new) in enumerate(zip(self._outputs, outputs, strict=True)):
            error = difference(old, new)
            worst = max(worst, error)
            if not within(old, new, error, limit):
                first = next((name for name in values if self._differs(values, name, limit)), f"output {index}")
                raise PassError(
                    f"pass '{step}' does not keep its word: it declares '{step.effect.value}'",
                    got=f"a relative error of {error:.3g} in output {index}",
                    need="equal bits" if limit is None else f"at most {allowed(old, limit):.3g}",
                    where=f"{first}, the first operation that differs",
                )
        self.errors[step.name] = worst
        self._values, self._outputs = values, outputs

    def _run(self, graph: Graph) -> tuple[dict[str, Any], tuple[Any, ...]]:
        values: dict[str, Any] = {}

        def observe(op: Op, results: tuple[Any, ...]) -> None:
            if op.name not in ("core.param", "core.buffer"):
                values.update((str(value), out) for value, out in zip(op.results, results, strict=True))

        updates: dict[str, torch.Tensor] = {}
        outputs = interpret(graph, self.inputs, observe=observe, updates=updates)
        return values, (*outputs, *(updates[name] for name in sorted(updates)))

    def _differs(self, values: dict[str, Any], name: str, limit: float | None) -> bool:
        if name not in self._values:
            return False
        old, new = self._values[name], values[name]
        return not within(old, new, difference(old, new), limit)


def within(old: Any, new: Any, error: float, limit: float | None) -> bool:
    """Whether `new` is close enough to `old`: equal bits when `limit` is None, else a relative error."""
    if not isinstance(old, torch.Tensor):
        return bool(old == new)
    if old.shape != new.shape or old.dtype != new.dtype:
        return False
    if limit is None:
        return torch.equal(old.reshape(-1).view(torch.uint8), new.reshape(-1).view(torch.uint8))
    return error <= allowed(old, limit)


def allowed(old: Any, limit: float) -> float:
    """The relative error that is allowed: the limit of the pass, and what the element type makes of reordering."""
    return limit + TOLERANCE.get(getattr(old, "dtype", None), 0.0)  # type: ignore[arg-type]  # None is no key


def difference(old: Any, new: Any) -> float:
    """The norm of the difference over the norm of `old`; 0 for what are no tensors of equal shape."""
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor) or old.shape != new.shape:
        return 0.0
    a, b = old.double(), new.double()
    finite = a.isfinite() & b.isfinite()
    if bool((a.isfinite() != b.isfinite()).any()):
        return float("inf")
    a, b = a[finite], b[finite]
    norm = float(a.norm())
    error = float((a - b).norm())
    return error / norm if norm else error
