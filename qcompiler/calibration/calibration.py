"""`Calibration`: collects statistics of a graph's values on real inputs.

    calibration = Calibration(batches)                  a list of flattened graph inputs for each batch
    calibration.observe(graph, ["x", "relu"])           runs the graph once per batch, for any number of values
    calibration.statistics["relu"].amax("absmax", "channel")
    print(calibration.coverage)
    calibration.save("model.calibration.safetensors")

The input data is not kept, except for requested samples of rows.
"""

import copy
import os
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence, Sized
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from qcompiler.calibration.coverage import Coverage, CoverageRow
from qcompiler.calibration.statistics import Statistics
from qcompiler.calibration.store import Observed, digest, read, write, write_file
from qcompiler.errors import InputError
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Op, TensorType, Value

Batch = Sequence[Any]
"""One tensor or number for each input of the graph, in order."""


class Calibration:
    """Statistics of the values of one graph, and the data to collect more.

    Attributes:
        statistics: Statistics by name of the value.
        modules: Module path of each value, by name; empty if unknown.
        batches: The data; None if there is none. A list can be read repeatedly, an iterator once.
    """

    def __init__(self, batches: Iterable[Batch] | None = None) -> None:
        """Checks only that `batches` is iterable, because an iterator can be read only once."""
        if isinstance(batches, torch.Tensor) or not (batches is None or isinstance(batches, Iterable)):
            need = "an iterable with one list of graph inputs for each batch"
            raise InputError("the calibration batches have the wrong type", got=type(batches).__name__, need=need)
        self.statistics: dict[str, Statistics] = {}
        self.modules: dict[str, str] = {}
        self.batches = batches
        self._read = False

    def observe(
        self,
        graph: Graph,
        names: Iterable[str],
        *,
        histogram: bool = False,
        rows: int = 0,
        progress: bool | None = None,
    ) -> None:
        """Runs the graph once per batch, and collects statistics of the values called `names`.

        Replaces existing statistics of these values and keeps all others. On failure, nothing changes.

        Args:
            graph: Any legal graph, with its weights.
            names: Values with floating-point elements and a last axis of fixed size; inputs are allowed.
            histogram: Whether to keep a histogram of each, which "percentile" and "mse" need.
            rows: How many rows of each to keep as a sample.
            progress: Whether to show a progress bar on standard error; by default only on a terminal.

        Raises:
            InputError: There is no data, or it was an iterator that has been consumed; the graph does not accept a
                batch; or a value contains NaN or Inf.
            QCompilerError: The graph does not have a value of that name.
        """
        values = list(dict.fromkeys(graph[name] for name in names))
        fresh = {value: Statistics.empty(_channels(value), histogram=histogram, rows=rows) for value in values}
        if not fresh:
            return
        count = 0
        with closing(self._shown(progress)) as batches:
            for count, batch in enumerate(batches, 1):
                _observe_batch(graph, batch, count - 1, fresh)
        if not count:
            raise InputError("there is no calibration data", got="no batches", need="at least one batch")
        self.statistics.update((value.name, seen) for value, seen in fresh.items())
        self.modules.update((value.name, _module(graph, value)) for value in values)

    def check_seen(self, graph: Graph, name: str, *, after_top_k: bool) -> bool:
        """Returns whether any token reached the value called `name`.

        Args:
            graph: The graph that contains the value.
            name: An observed value.
            after_top_k: Whether a top-k selects the tokens that reach the value, as in an expert; such a value may
                have seen none, which the coverage shows.

        Raises:
            InputError: The value has no statistics; or it saw no rows or only zeros, and no top-k explains that.
        """
        if name not in self.statistics:
            raise InputError("a value was not observed", got=f"%{name}", fix="Call observe first.")
        seen = self.statistics[name]
        if seen.unseen and not after_top_k:
            got = f"{seen.rows} rows of zeros" if seen.rows else "no row"
            raise InputError(
                f"calibration saw only zeros or no rows in %{name}",
                got=f"{got} in {_batches(seen.batches)}",
                need="at least one nonzero element",
                where=_where(graph[name].op),
                fix="Use calibration data that activates this part of the model.",
            )
        return not seen.unseen

    @property
    def coverage(self) -> Coverage:
        """Coverage of each value, worst first; printing it gives a table."""
        rows = (
            CoverageRow(
                name,
                self.modules.get(name, ""),
                seen.rows,
                seen.channels,
                float(seen.amax("absmax", "tensor")),
                seen.unseen,
            )
            for name, seen in self.statistics.items()
        )
        return Coverage(tuple(sorted(rows, key=lambda row: row.badness)))

    @property
    def digest(self) -> str:
        """SHA-256 of the statistics, in hex; equal statistics have equal digests."""
        return digest(self._observed())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the statistics to a safetensors file, atomically; InputError on failure."""
        write(path, self._observed())

    def write_file(self, path: Path) -> None:
        """Writes the statistics to a new file in a folder that is itself replaced atomically; OSError on failure."""
        write_file(path, self._observed())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """Reads a saved file, bit for bit and without batches; InputError names a file that cannot be read."""
        loaded = cls()
        for name, observed in read(path).items():
            loaded.statistics[name], loaded.modules[name] = observed.statistics, observed.module
        return loaded

    def updated(self, statistics: Mapping[str, Statistics]) -> "Calibration":
        """Returns a calibration from the same data with `statistics` added; this one is unchanged."""
        twin = copy.copy(self)
        twin.statistics, twin.modules = {**self.statistics, **statistics}, dict(self.modules)
        return twin

    def __repr__(self) -> str:
        return f"<Calibration: {self.coverage.summary()}>"

    # Private

    def _observed(self) -> dict[str, Observed]:
        return {name: Observed(seen, self.modules.get(name, "")) for name, seen in self.statistics.items()}

    def _shown(self, progress: bool | None) -> Generator[Batch, None, None]:
        """Yields the batches with a progress bar."""
        if self.batches is None:
            raise InputError("there is no calibration data", fix="Give it: Calibration(batches).")
        source = iter(self.batches)
        if source is self.batches:
            if self._read:
                fix = "Pass a list, which can be read again."
                raise InputError("the calibration batches were an iterator, which has already been consumed", fix=fix)
            self._read = True
        total = len(self.batches) if isinstance(self.batches, Sized) else None
        shown = sys.stderr.isatty() if progress is None else progress
        with Progress(console=Console(stderr=True), disable=not shown) as bar:
            yield from bar.track(source, total=total, description="calibrating")


def _observe_batch(graph: Graph, batch: Batch, index: int, wanted: dict[Value, Statistics]) -> None:
    """Runs the graph on one batch."""
    where = f"batches[{index}]"
    if isinstance(batch, torch.Tensor) or not isinstance(batch, Sequence):
        need = f"a list of the {len(graph.inputs)} inputs of the graph"
        raise InputError("a calibration batch has the wrong type", got=type(batch).__name__, need=need, where=where)

    def see(value: Value, result: Any) -> None:
        if (seen := wanted.get(value)) is not None:
            seen.update(result)
            if seen.nan or seen.inf:
                raise _not_finite(value, seen, index)

    def observe(op: Op, results: tuple[Any, ...]) -> None:
        for value, result in zip(op.results, results, strict=False):
            see(value, result)

    try:
        for value, given in zip(graph.inputs, batch, strict=False):
            see(value, given)
        interpret(graph, batch, observe=observe)
    except _NotFinite:
        raise
    except Exception as error:  # the data is the user's, and an operation may raise any error
        raise InputError("the graph does not accept a calibration batch", got=f"{where}: {error}") from error


class _NotFinite(InputError):
    """An observed value contains NaN or Inf."""


def _not_finite(value: Value, seen: Statistics, index: int) -> _NotFinite:
    return _NotFinite(
        f"calibration found numbers in %{value.name} that are not finite",
        got=f"{seen.nan} NaN and {seen.inf} Inf in batches[{index}]",
        need="finite numbers",
        where=_where(value.op),
        fix="Look for the cause in this batch, or in the model itself.",
    )


def _channels(value: Value) -> int:
    kind = value.type
    if isinstance(kind, TensorType) and kind.dtype.is_float and kind.shape and isinstance(kind.shape[-1], int):
        return kind.shape[-1]
    need = "floating point, with a last axis of fixed size"
    raise InputError(f"%{value.name} cannot be observed", got=kind, need=need)


def _module(graph: Graph, value: Value) -> str:
    """Returns the module that computes a value; if unknown, the module of its first user."""
    modules = [value.op.loc.module, *(user.loc.module for user in graph.users(value))]
    return next((module for module in modules if module), "")


def _where(op: Op) -> str:
    return f"{op.name} {op.loc}".rstrip()


def _batches(count: int) -> str:
    return f"{count} batch{'' if count == 1 else 'es'}"
