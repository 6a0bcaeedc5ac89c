"""What became of every operation that reads weights: quantized, or why not; and how many of the bytes that is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from passes.candidates import MATMULS, OTHER_READERS
from qcompiler.ir import Graph, Op, TensorType
from qcompiler.ir.dataflow import parameters_of

QUANTIZED = ("quant.linear", "kernel.scaled_linear")
NO_REASON = "no pass of this pipeline quantizes it"


@dataclass(frozen=True)
class Row:
    """One reader of weights.

    Attributes:
        name: The value that it computes.
        op: What it was when captured.
        module: Where it stands in the model.
        weights: The parameters that it reads.
        shape: The type of the largest of them.
        bytes: What they take as captured.
        quantized: Whether it is.
        reason: Why not; empty when it is.
    """

    name: str
    op: str
    module: str
    weights: tuple[str, ...]
    shape: str
    bytes: int
    quantized: bool
    reason: str

    @property
    def is_matmul(self) -> bool:
        """Whether it multiplies matrices."""
        return self.op in MATMULS


@dataclass(frozen=True)
class Report:
    """One row for each operation that reads weights; printing it gives a table.

    Attributes:
        rows: In the order of the graph.
        bytes: Of all parameters, as captured.
        bytes_quantized: Of the parameters whose every reader is quantized.
        bytes_after: Of all weights after compilation, scales included.
    """

    rows: tuple[Row, ...]
    bytes: int
    bytes_quantized: int
    bytes_after: int

    @property
    def quantized(self) -> tuple[Row, ...]:
        """The rows that are quantized."""
        return tuple(row for row in self.rows if row.quantized)

    @property
    def left_alone(self) -> tuple[Row, ...]:
        """The matmuls that are not."""
        return tuple(row for row in self.rows if row.is_matmul and not row.quantized)

    def summary(self) -> str:
        """One line."""
        matmuls = sum(row.is_matmul for row in self.rows)
        share = 100 * self.bytes_quantized / self.bytes if self.bytes else 0.0
        return (
            f"{len(self.quantized)} of {matmuls} matmuls with a constant operand are quantized: {share:.1f}% of "
            f"{_size(self.bytes)} of parameters; {_size(self.bytes_after)} after"
        )

    def __str__(self) -> str:
        table = Table(box=SIMPLE, pad_edge=False)
        for heading in ("operation", "module", "weight", "bytes", "quantized", "why not"):
            table.add_column(heading, justify="right" if heading == "bytes" else "left", overflow="fold")
        for row in self._grouped():
            table.add_row(f"%{row.name}", row.module, row.shape, _size(row.bytes), "yes" if row.quantized else "no", row.reason)
        console = Console(width=160, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(table, soft_wrap=False)
        return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip()) + f"\n{self.summary()}"

    def _grouped(self) -> Iterator[Row]:
        """Every matmul, then one row for each kind of other reader."""
        yield from (row for row in self.rows if row.is_matmul)
        others: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if not row.is_matmul:
                others.setdefault((row.op, row.reason), []).append(row)
        for (op, reason), rows in others.items():
            names = f"{rows[0].name} and {len(rows) - 1} more" if len(rows) > 1 else rows[0].name
            yield Row(names, op, "", (), op, sum(row.bytes for row in rows), False, reason)


def build_report(captured: Graph, compiled: Graph, reasons: Mapping[str, str]) -> Report:
    """The report on what a pipeline did between two graphs.

    Args:
        captured: The graph before the first pass.
        compiled: The graph after the last.
        reasons: Why operations were left alone, by the name of their result.
    """
    after = {value.name: op for op in compiled for value in op.results}
    rows = []
    for op in captured.ops():
        params = {param for _, v in op.operands() if captured.is_constant(v) for param in parameters_of(v)}
        if op.name not in (*MATMULS, *OTHER_READERS) or not params:
            continue
        name = op.results[0].name
        quantized = name in after and after[name].name in QUANTIZED
        rows.append(_row(op, params, quantized, "" if quantized else reasons.get(name, NO_REASON)))
    kept = {op.attrs["name"] for op in compiled.ops() if op.name == "core.param"}
    params = {op for op in captured.ops() if op.name == "core.param"}
    return Report(
        tuple(rows),
        bytes=sum(map(_bytes, params)),
        bytes_quantized=sum(_bytes(op) for op in params if op.attrs["name"] not in kept and _read_by(op, rows)),
        bytes_after=sum(_bytes(op) for op in compiled.ops() if op.name == "core.param"),
    )


def _row(op: Op, params: set[Op], quantized: bool, reason: str) -> Row:
    largest = max(params, key=_bytes)
    names = tuple(sorted(str(param.attrs["name"]) for param in params))
    size = sum(map(_bytes, params))
    return Row(op.results[0].name, op.name, op.loc.module, names, str(largest.result.type), size, quantized, reason)


def _read_by(param: Op, rows: list[Row]) -> bool:
    return any(row.quantized and param.attrs["name"] in row.weights for row in rows)


def _bytes(param: Op) -> int:
    kind = param.result.type
    if not isinstance(kind, TensorType) or not isinstance(kind.elements, int):
        return 0
    return kind.elements * kind.dtype.bytes


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count = count / 1000  # type: ignore[assignment]  # shown only
    return f"{count:.4g} GB"
