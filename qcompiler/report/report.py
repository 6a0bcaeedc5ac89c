"""The report: each operation that uses weights, quantized or why not, and the share of bytes that is quantized."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from html import escape
from itertools import takewhile

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from passes.analyses.candidates import OTHER_READERS, why_no_matmul
from qcompiler.dialects.kernel import is_fused
from qcompiler.dialects.quant import is_static, x_scale_of
from qcompiler.ir import Graph, Op, Role, TensorType
from qcompiler.ir.dataflow import ancestors, origins_of, parameters_of, users_through
from qcompiler.ir.graph import PARAM
from qcompiler.pass_manager.lineage import lineages
from qcompiler.report.rows import Row, collapsed
from qcompiler.schemes.quantized_formats import format_of

NO_REASON = "no pass of this pipeline quantizes it"
NO_MATMUL = "it is not a matmul"
AS_STORED = "uses the model's own codes and scales"
X_AS_STORED = "uses the model's own codes, scales and static activation scale"
X_UNUSED = "the model's static activation scale is not used: this scheme computes activation scales in each call"
DEAD = "it was removed because its result is not used"


@dataclass(frozen=True)
class Report:
    """One row for each operation that uses weights; printing it gives a table with equal layers on one line.

    Attributes:
        rows: In graph order.
        bytes: Size of all parameters, as captured.
        bytes_quantized: Size of the parameters that are kept in quantized form only.
        bytes_after: Size of all weights after compilation, scales included.
        notes: Further notes on the model, such as unused tensors of its checkpoint.
    """

    rows: tuple[Row, ...]
    bytes: int
    bytes_quantized: int
    bytes_after: int
    notes: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[Row, ...]:
        """The quantized rows."""
        return tuple(row for row in self.rows if row.quantized)

    @property
    def skipped(self) -> tuple[Row, ...]:
        """The matmuls that are not quantized."""
        return tuple(row for row in self.rows if row.is_matmul and not row.quantized)

    def summary(self) -> str:
        """Returns a one-line summary."""
        matmuls = sum(row.is_matmul for row in self.rows)
        if not matmuls:
            return f"no matmul has a constant operand; {_size(self.bytes)} of parameters"
        are = "is" if matmuls == 1 else "are"
        share = 100 * self.bytes_quantized / self.bytes if self.bytes else 0.0
        return (
            f"{len(self.quantized)} of {matmuls} matmuls with a constant operand {are} quantized: {share:.1f}% of "
            f"{_size(self.bytes)} of parameters; {_size(self.bytes_after)} after"
        )

    def __str__(self) -> str:
        headings, rows = self._table()
        table = Table(box=SIMPLE, pad_edge=False)
        for heading in headings:
            table.add_column(heading, justify="right" if heading == "bytes" else "left", overflow="fold")
        for cells in rows:
            table.add_row(*(cell.replace("[", "\\[") for cell in cells))
        console = Console(width=160, no_color=True, force_terminal=False, legacy_windows=False)
        with console.capture() as capture:
            console.print(table, soft_wrap=False)
        lines = [line.rstrip() for line in capture.get().splitlines() if line.strip()] if rows else []
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), self.summary()])

    def _repr_html_(self) -> str:
        """Returns the table as HTML for notebooks."""
        headings, rows = self._table()
        head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>" for cells in rows)
        notes = "".join(f"<p>note: {escape(note)}</p>" for note in self.notes)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
        return f"{table}{notes}<p>{escape(self.summary())}</p>"

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Returns headings and rows, with a column of remarks if there are any."""
        remarked = any(row.remark for row in self.rows)
        headings = ("operation", "module", "weight", "bytes", "quantized", "why not", *(["remarks"] * remarked))
        rows = [
            (
                f"%{row.name}", row.module, row.shape, _size(row.bytes),
                row.format or ("yes" if row.quantized else "no"), row.reason, row.remark,
            )[: len(headings)]
            for row in self._grouped()
        ]  # fmt: skip
        return headings, rows

    def _grouped(self) -> Iterator[Row]:
        """Yields all matmuls, equal layers of a stack in one row, then one row for each kind of other operation."""
        yield from collapsed([row for row in self.rows if row.is_matmul])
        others: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if not row.is_matmul:
                others.setdefault((row.op, row.reason), []).append(row)
        for (op, reason), rows in others.items():
            names = f"{rows[0].name} and {len(rows) - 1} more" if len(rows) > 1 else rows[0].name
            size = sum({row.weights: row.bytes for row in rows}.values())
            yield Row(names, op, "", (), op, size, all(row.quantized for row in rows), reason)


def build_report(
    stages: Mapping[str, Graph], compiled: Graph, reasons: Mapping[str, str], remarks: Mapping[str, str] | None = None
) -> Report:
    """Builds the report for a pipeline run.

    Args:
        stages: The graph before the first pass and after each pass, in order.
        compiled: The graph after the last pass.
        reasons: Why operations were skipped, by the name of their result.
        remarks: Remarks of passes on operations, by the name of their result.
    """
    graphs = unfused(stages.values())
    captured, last = graphs[0], graphs[-1]
    known_as = lineages(graphs)
    rows = []
    for op, params in _readers(captured):
        name = op.results[0].name
        names = known_as.get(name, [])
        # What multiplies the input of a matmul may have become a part of it, and is not a matmul itself.
        quantized = op.role is Role.MATMUL and bool(names) and _is_quantized(last[names[-1]].op)
        known = next((reasons[each] for each in names if each in reasons), None) or _why_not(op)
        reason = "" if quantized else known if names else DEAD
        notes = [remarks[each] for each in names or [name] if each in remarks] if remarks else []
        notes += _of_stored(op, captured, last[names[-1]].op) if quantized else []
        format = format_of(_matmul(last[names[-1]].op)) if quantized else ""
        rows.append(replace(_row(op, params, quantized, reason), remark="; ".join(notes), format=format))
    params = captured.ops(PARAM)
    quantized_names = _quantized_params(graphs, compiled)
    return Report(
        tuple(rows),
        bytes=sum(map(_bytes, params)),
        bytes_quantized=sum(_bytes(op) for op in params if op.attrs["name"] in quantized_names),
        bytes_after=sum(map(_bytes, compiled.ops(PARAM))),
    )


def unfused(graphs: Iterable[Graph]) -> list[Graph]:
    """Returns the stages up to the last one before layers are fused into kernels."""
    return list(takewhile(lambda graph: not any(map(is_fused, graph)), graphs))


def _readers(graph: Graph) -> Iterator[tuple[Op, list[Op]]]:
    """Yields each operation with its weights that uses both inputs and weights.

    A matmul of weights alone, such as the two factors of a merged adapter, is part of the weight that it computes.
    """
    for op in graph.ops():
        if not op.results or graph.is_constant(op.results[0]):
            continue
        constant = dict.fromkeys(value for _, value in op.operands() if graph.is_constant(value))
        if params := dict.fromkeys(param for value in constant for param in parameters_of(value)):
            yield op, list(params)


def _is_quantized(op: Op) -> bool:
    """Whether an operation multiplies quantized operands, fused with their dequantization or not."""
    op = _matmul(op)
    if op.role is Role.QUANTIZED_MATMUL:
        return True
    return op.role is Role.MATMUL and sum(value.op.role is Role.DEQUANTIZE for _, value in op.operands()) > 1


def _matmul(op: Op) -> Op:
    """Returns the matmul whose result an operation casts, slices or reshapes; any other operation itself."""
    return op["x"].op if op.role in (Role.VIEW, Role.CAST) else op


def _quantized_params(graphs: list[Graph], compiled: Graph) -> set[str]:
    """Returns the weights that a pass quantized and whose originals are unused, and those that came quantized."""
    quantized = {
        origin
        for graph in graphs
        for op in graph.ops()
        if op.role is Role.QUANTIZE and graph.is_constant(op["x"])
        for param in parameters_of(op["x"])
        for origin in origins_of(compiled, str(param.attrs["name"]))
    }

    def constant(op: Op) -> bool:
        return op.role is not Role.QUANTIZE and bool(op.results) and compiled.is_constant(op.results[0])

    for param in compiled.ops(PARAM):
        ends = [op for op in users_through(compiled, param.result, constant) if not constant(op)]
        if any(op.role is not Role.QUANTIZE for op in ends):
            quantized.discard(str(param.attrs["name"]))
    return quantized | _stored(graphs[0])


def _of_stored(op: Op, captured: Graph, became: Op) -> list[str]:
    """Returns remarks on a matmul whose weight the model already holds quantized."""
    constant = [value for _, value in op.operands() if captured.is_constant(value)]
    stored = [inner for value in constant for inner in ancestors(value) if inner.role is Role.DEQUANTIZE]
    if all(x_scale_of(inner.result) is None for inner in stored):
        return [AS_STORED] * bool(stored)
    return [X_AS_STORED] if _is_static(became) else [AS_STORED, X_UNUSED]


def _is_static(op: Op) -> bool:
    """Whether the activation of a quantized matmul has a static scale."""
    while op.role in (Role.VIEW, Role.CAST):
        op = op["x"].op
    codes = op["x"]
    return is_static((codes.op["data"] if codes.op.role is Role.DEQUANTIZE else codes).op)


def _stored(captured: Graph) -> set[str]:
    """Returns the codes of weights that the model already holds quantized."""
    constant = (op for op in captured if op.role is Role.DEQUANTIZE and captured.is_constant(op.result))
    return {str(param.attrs["name"]) for op in constant for param in parameters_of(op["data"])}


def _why_not(op: Op) -> str:
    if op.name in OTHER_READERS:
        return why_no_matmul(op)
    return NO_REASON if op.role is Role.MATMUL else NO_MATMUL


def _row(op: Op, params: list[Op], quantized: bool, reason: str) -> Row:
    largest = max(params, key=_bytes)
    names = tuple(sorted(str(param.attrs["name"]) for param in params))
    size = sum(map(_bytes, params))
    return Row(op.results[0].name, op.name, op.loc.module, names, str(largest.result.type), size, quantized, reason)


def _bytes(param: Op) -> int:
    kind = param.result.type
    size = kind.bytes if isinstance(kind, TensorType) else 0
    return size if isinstance(size, int) else 0


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count = count / 1000
    return f"{count:.4g} GB"
