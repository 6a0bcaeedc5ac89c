"""`Calibration`: what the values of a graph look like on real inputs.

    calibration = Calibration(batches)                  a list of flattened graph inputs for each batch
    calibration.observe(graph, ["x", "relu"])           one run of the graph a batch, whatever the number of values
    calibration.statistics["relu"].amax("absmax", "channel")
    print(calibration.coverage)
    calibration.save("model.calibration.safetensors")

Nothing of the data itself is kept, except for the samples of rows that are asked for.
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
    """Statistics of the values of one graph, and where more of them would come from.

    Attributes:
        statistics: What was seen, by the name of the value.
        modules: Where the value stands in the model, by its name; empty where that is not known.
        batches: The data; None when there is none. A list can be read as often as needed, an iterator once.
    """

    def __init__(self, batches: Iterable[Batch] | None = None) -> None:
        """Checks no more of `batches` than that it can be iterated, since an iterator is read only once."""
        if isinstance(batches, torch.Tensor) or not (batches is None or isinstance(batches, Iterable)):
            need = "an iterable with one list of graph inputs for each batch"
            raise InputError("the calibration batches are of a wrong type", got=type(batches).__name__, need=need)
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
        """Runs the graph once for each batch, and keeps the statistics of the values called `names`.

        What is known of other values stays; what was known of these is replaced. When something fails, all stays.

        Args:
            graph: Any legal graph, with its weights.
            names: Values of the graph with floating-point elements and a last axis of fixed size, inputs included.
            histogram: Whether to keep a histogram of each, which "percentile" and "mse" need.
            rows: How many rows of each to keep as a sample.
            progress: Whether to show a progress bar on standard error; when left out, if that is a terminal.

        Raises:
            InputError: There is no data, or it was an iterator that has been read; the graph cannot take a batch; or a
                value has NaN or Inf.
            QCompilerError: The graph has no value of that name.
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
            raise InputError("there is no calibration data", got="no batch at all", need="one batch or more")
        self.statistics.update((value.name, seen) for value, seen in fresh.items())
        self.modules.update((value.name, _module(graph, value)) for value in values)

    def check_seen(self, graph: Graph, name: str, *, behind_top_k: bool) -> bool:
        """Whether any token came by the value called `name`.

        Args:
            graph: Where the value stands.
            name: A value that was observed.
            behind_top_k: Whether a top-k decides which tokens come by, so that the value belongs to an expert; then it
                may have seen none, which the coverage shows.

        Raises:
            InputError: The value has no statistics; or no row or only zeros were seen, and no top-k accounts for it.
        """
        if name not in self.statistics:
            raise InputError("a value was not observed", got=f"%{name}", fix="Observe it first.")
        seen = self.statistics[name]
        if seen.unseen and not behind_top_k:
            got = f"{seen.rows} rows of zeros" if seen.rows else "no row"
            raise InputError(
                f"calibration saw nothing of %{name}", got=f"{got} in {_batches(seen.batches)}",
                need="one element or more that is not zero", where=_where(graph[name].op),
                fix="Give calibration data that the model does something with.",
            )  # fmt: skip
        return not seen.unseen

    @property
    def coverage(self) -> Coverage:
        """What was seen of each value, worst first; printing it gives a table."""
        rows = (
            CoverageRow(
                name, self.modules.get(name, ""), seen.rows, seen.channels, float(seen.amax("absmax", "tensor")),
                seen.unseen,
            )
            for name, seen in self.statistics.items()
        )  # fmt: skip
        return Coverage(tuple(sorted(rows, key=lambda row: row.badness)))

    @property
    def digest(self) -> str:
        """SHA-256 of the statistics, in hex: equal for equal statistics."""
        return digest(self._observed())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the statistics to a safetensors file, all of it or nothing; InputError when that cannot be."""
        write(path, self._observed())

    def write_file(self, path: Path) -> None:
        """Writes the statistics to a new file of a folder that is itself replaced whole; OSError if it cannot."""
        write_file(path, self._observed())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """What `save` wrote, with equal bits and without batches; InputError names a file that cannot be read."""
        loaded = cls()
        for name, observed in read(path).items():
            loaded.statistics[name], loaded.modules[name] = observed.statistics, observed.module
        return loaded

    def updated(self, statistics: Mapping[str, Statistics]) -> "Calibration":
        """A calibration from the same data that also knows `statistics`; this one stays as it is."""
        twin = copy.copy(self)
        twin.statistics, twin.modules = {**self.statistics, **statistics}, dict(self.modules)
        return twin

    def __repr__(self) -> str:
        return f"<Calibration: {self.coverage.summary()}>"

    # Private

    def _observed(self) -> dict[str, Observed]:
        return {name: Observed(seen, self.modules.get(name, "")) for name, seen in self.statistics.items()}

    def _shown(self, progress: bool | None) -> Generator[Batch, None, None]:
        """The batches, behind a progress bar."""
        if self.batches is None:
            raise InputError("there is no calibration data", fix="Give it: Calibration(batches).")
        source = iter(self.batches)
        if source is self.batches:
            if self._read:
                fix = "Pass a list, which can be read again."
                raise InputError("the calibration batches were an iterator, which has been read already", fix=fix)
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
        raise InputError("a calibration batch is of a wrong type", got=type(batch).__name__, need=need, where=where)

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
    except Exception as error:  # the data are the user's, and an operation may fail in any way
        raise InputError("the graph cannot take a calibration batch", got=f"{where}: {error}") from error


class _NotFinite(InputError):
    """A value that is to be observed has NaN or Inf."""


def _not_finite(value: Value, seen: Statistics, index: int) -> _NotFinite:
    return _NotFinite(
        f"calibration met numbers in %{value.name} that are not finite",
        got=f"{seen.nan} NaN and {seen.inf} Inf in batches[{index}]", need="finite numbers", where=_where(value.op),
        fix="Look for the cause in this batch, or in the model itself.",
    )  # fmt: skip


def _channels(value: Value) -> int:
    kind = value.type
    if isinstance(kind, TensorType) and kind.dtype.is_float and kind.shape and isinstance(kind.shape[-1], int):
        return kind.shape[-1]
    need = "floating point, with a last axis of fixed size"
    raise InputError(f"%{value.name} cannot be observed", got=kind, need=need)


def _module(graph: Graph, value: Value) -> str:
    """The module that computes a value; where that is not known, the first that reads it."""
    modules = [value.op.loc.module, *(reader.loc.module for reader in graph.users(value))]
    return next((module for module in modules if module), "")


def _where(op: Op) -> str:
    return f"{op.name} {op.loc}".rstrip()


def _batches(count: int) -> str:
    return f"{count} batch{'' if count == 1 else 'es'}"
