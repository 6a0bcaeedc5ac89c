"""Observes, on real inputs, the activations that later passes will quantize.

    linear(x, w)   ->   the same, and graph.calibration.statistics["x"]

Activations with known statistics are not observed again; if all are known, nothing runs. The input of a stored weight
whose checkpoint has a static activation scale needs no calibration.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from passes.analyses.candidates import TOP_1, TOP_K, is_stored_quantized, why_not_quantized
from passes.analyses.layers import EVERYTHING, naming_pattern, why_not_selected
from qcompiler.calibration import Calibration, Statistics
from qcompiler.dialects.quant import x_scale_of
from qcompiler.errors import PassError
from qcompiler.ir import Graph, Op, TensorType, Value
from qcompiler.ir.dataflow import parameters_of
from qcompiler.pass_manager.pipeline import Effect, Pass

MORE_DATA = "compile(..., calibration=batches)"

SHOWN = 5
"""Maximum number of names in a message."""

SUMS = (
    "add", "sub", "rsub", "cat", "stack", "index_add", "index_put", "_index_put_impl", "scatter", "scatter_add",
    "scatter_reduce", "index_copy", "masked_scatter", "slice_scatter", "select_scatter", "maximum", "minimum",
)  # fmt: skip
"""Operations whose result is zero only where all operands are."""


@dataclass(frozen=True)
class Calibrate(Pass):
    """linear(x, w)  ->  the same; statistics of x are collected on the calibration data.

    Attributes:
        histogram: Whether to keep a histogram of magnitudes, which the observers percentile and mse need.
        rows: How many rows of each activation to keep as a sample.
        layers: Patterns for weight names: which linears' activations to observe (see `passes.analyses.layers`).
    """

    name: ClassVar[str] = "calibrate"
    effect: ClassVar[Effect] = Effect.EXACT

    histogram: bool = False
    rows: int = 0
    layers: tuple[str, ...] = EVERYTHING

    def __post_init__(self) -> None:
        """Raises PassError for a negative number of rows."""
        super().__post_init__()
        if self.rows < 0:
            raise PassError("option 'rows' of pass 'calibrate' is negative", got=self.rows, need="0 or more")

    def run(self, graph: Graph) -> bool:
        """Fills `graph.calibration`; the graph itself does not change."""
        values = list(dict.fromkeys(activations(graph, self.layers)))
        if values:
            self.check_known(graph)
            calibration = calibration_of(graph)
            self.observe_missing(graph, values, calibration)
            routed = after_top_k(graph)
            for value in values:
                calibration.check_seen(graph, value.name, after_top_k=value in routed)
        return False

    def check_known(self, graph: Graph) -> None:
        """PassError with the layers that lack an activation scale, if others have one and there is no data."""
        if graph.calibration is not None or all(x_scale_of(op["weight"]) is None for op in graph.ops("aten.linear")):
            return
        names = [_weight_name(op) for op in lacking_scales(graph, self.layers)]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise PassError(
            "the checkpoint has static activation scales for some layers only, and there is no calibration data",
            got=f"no scale for {', '.join(names[:SHOWN])}{more}",
            fix=f"Give the data: {MORE_DATA}; or leave these layers in float: overrides={{name: None}}.",
        )

    def observe_missing(self, graph: Graph, values: list[Value], calibration: Calibration) -> None:
        """Observes the `values` whose statistics are incomplete."""
        known = calibration.statistics
        for value in values:
            if value.name in known and known[value.name].channels != value.tensor.shape[-1]:
                raise PassError(
                    "the calibration belongs to another model",
                    got=f"{known[value.name].channels} channels of %{value.name}",
                    need=value.tensor.shape[-1],
                    fix=f"Calibrate this model: {MORE_DATA}.",
                )
        missing = [value.name for value in values if not self.is_enough(known.get(value.name))]
        if not missing:
            return
        if calibration.batches is None:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            asked = ["a histogram"] * self.histogram + [f"a sample of {self.rows} rows"] * (self.rows > 0)
            what = f" with {' and '.join(asked)}"
            raise PassError(
                "the calibration lacks statistics, and there is no data to compute them from",
                got=f"none of %{missing[0]}{more}{what if missing[0] in known else ''}",
                fix=f"Give the data: {MORE_DATA}.",
            )
        calibration.observe(graph, missing, histogram=self.histogram, rows=self.rows)

    def is_enough(self, known: Statistics | None) -> bool:
        """Whether these statistics satisfy the options."""
        if known is None or (self.histogram and known.histogram is None):
            return False
        return not self.rows or (known.sample is not None and known.sample.capacity >= self.rows)


def activations(graph: Graph, layers: Sequence[str] = EVERYTHING) -> Iterator[Value]:
    """The inputs of the linears that `lacking_scales` returns."""
    for op in lacking_scales(graph, layers):
        yield op["input"]


def lacking_scales(graph: Graph, layers: Sequence[str] = EVERYTHING) -> Iterator[Op]:
    """Linears that can be quantized and are selected, and whose checkpoint has no activation scale."""
    for op in graph.ops("aten.linear"):
        if why_not_quantized(op, graph, named=True) is not None or why_not_selected(layers, op, graph) is not None:
            continue
        able = why_not_quantized(op, graph) is None or naming_pattern(layers, op, graph) is not None
        if able and x_scale_of(op["weight"]) is None:
            yield op


def _weight_name(op: Op) -> str:
    """The model's name for the weight of a linear."""
    weight = op["weight"]
    params = parameters_of(weight.op["data"] if is_stored_quantized(weight) else weight)
    return str(params[0].attrs["name"]) if params else op.result.name


def calibration_of(graph: Graph) -> Calibration:
    """The calibration of a graph; raises PassError if there is none."""
    found = graph.calibration
    if found is None:
        problem = "there is no calibration data, and this pipeline needs some"
        raise PassError(problem, fix=f"Give it: {MORE_DATA}, a list of real calls of the model.")
    if not isinstance(found, Calibration):
        raise PassError("the calibration of the graph has the wrong type", got=type(found).__name__, need="Calibration")
    return found


def statistics_of(graph: Graph, value: Value) -> Statistics:
    """The calibration statistics of a value; raises PassError if there are none of that type."""
    known = calibration_of(graph).statistics
    if value.name not in known:
        fix = "Put the pass 'calibrate' before the pass that needs it."
        raise PassError("a value was not observed in calibration", got=value, fix=fix)
    return known[value.name]


def saw_no_token(graph: Graph, value: Value) -> bool:
    """Whether calibration saw only zeros or no rows of a value; raises PassError if it was not observed."""
    return statistics_of(graph, value).unseen


def after_top_k(graph: Graph) -> set[Value]:
    """Values that may be zero or have no rows because of a top-k: those inside experts.

    The results of a top-k are included, and so are values computed from one. A sum is included only if all of its terms
    are, so the residual stream after a mixture of experts is not.
    """
    found: set[Value] = set()
    for op in graph.ops():
        if op.name in TOP_K or op.name in TOP_1 or _follows(op, graph, found):
            found.update(op.results)
    return found


def _follows(op: Op, graph: Graph, found: set[Value]) -> bool:
    """Whether the results of `op` depend on a top-k, given the operands in `found`."""
    terms = [v for _, v in op.operands() if isinstance(v.type, TensorType) and not graph.is_constant(v)]
    marked = [value in found for value in terms]
    return bool(terms) and (all(marked) if op.name.split(".")[1] in SUMS else any(marked))
