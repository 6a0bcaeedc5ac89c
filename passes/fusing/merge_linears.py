"""Merges linears that read one input, so that one GEMM computes all of their columns.

    %q = aten.linear(%x, %wq, %bq) : bf16[s0, 256]
    %k = aten.linear(%x, %wk, %bk) : bf16[s0, 128]
  ->
    %wq_merged = aten.cat([%wq, %wk]) : bf16[384, 512]
    %bq_merged = aten.cat([%bq, %bk]) : bf16[384]
    %q_merged = aten.linear(%x, %wq_merged, %bq_merged) : bf16[s0, 384]
    %q = aten.slice.Tensor(%q_merged, -1, 0, 256) : bf16[s0, 256]
    %k = aten.slice.Tensor(%q_merged, -1, 256, 384) : bf16[s0, 128]

Runs after calibration and smoothing, which process layers one by one, and before the pass that quantizes. A merged
weight has the codes and scales that its parts would have had, because no quantization block spans two parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from passes.analyses.candidates import is_stored_quantized, why_not_quantized
from passes.analyses.constants import is_read_elsewhere
from passes.analyses.layers import EVERYTHING, check_patterns, why_not_selected
from passes.analyses.memory import is_view, leaves_the_graph
from qcompiler.dialects.quant import x_scale_of
from qcompiler.errors import PassError
from qcompiler.ir import ALL, Format, Graph, Missed, Op, Rewriter, Role, TensorType, Value
from qcompiler.ir.dataflow import ancestors, users_through
from qcompiler.ir.formats import FP8_BLOCK
from qcompiler.ir.sizes import product
from qcompiler.pass_manager.pipeline import Effect, Pass

VIEWS = ("aten.view", "aten._unsafe_view")
"""Views that fail for some strides; `aten.reshape` copies in that case."""

READ_STRIDES = (
    "aten.as_strided", "aten.view.dtype", "aten.view_as_complex", "aten.sym_stride.int", "aten.sym_storage_offset",
)  # fmt: skip
"""Operations that depend on strides and have no such substitute."""

ANY_STRIDES = ("aten", "prims", "core", "attention", "state", "quant", "kernel")
"""Namespaces whose other operations accept any strides; custom operations may not."""


@dataclass(frozen=True)
class Plan:
    """The decision for each linear that shares its input with another one.

    Attributes:
        groups: Linears to merge, two or more each, in order.
        reasons: The others, in order -> why they are not merged.
    """

    groups: Sequence[Sequence[Op]]
    reasons: dict[Op, str]


@dataclass(frozen=True)
class MergeLinears(Pass):
    """linear(x, wq), linear(x, wk)  ->  the parts of linear(x, cat(wq, wk)).

    Attributes:
        w_format: The format that weights will be quantized to.
        layers: Patterns for weight names that select linears; the same as in the pass that quantizes.
        min_columns: Linears with fewer columns are not merged.
        static: Whether the pass that quantizes uses the activation scales stored with weights. If so, linears with
            different scales are not merged; otherwise a merged weight has none.
    """

    name: ClassVar[str] = "merge-linears"
    effect: ClassVar[Effect] = Effect.REORDERS

    w_format: Format = FP8_BLOCK
    layers: tuple[str, ...] = EVERYTHING
    min_columns: int = 128
    static: bool = False

    def __post_init__(self) -> None:
        """Raises PassError unless `min_columns` is positive."""
        super().__post_init__()
        if self.min_columns < 1:
            need = "1 or more"
            raise PassError(f"option 'min_columns' of pass '{self.name}' is too small", got=self.min_columns, need=need)

    def run(self, graph: Graph) -> bool:
        """Processes groups from top to bottom."""
        check_patterns(self.layers, graph)
        groups = self.plan(graph).groups
        for group in groups:
            merge(group, graph, self.name)
        return bool(groups)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Reports only linears that share their input with another one that can be quantized."""
        reasons = self.plan(graph).reasons
        return {op.result.name: why for op, why in reasons.items() if op.loc.made_by != self.name}

    def plan(self, graph: Graph) -> Plan:
        """Adds linears of one input to a group until something forbids it."""
        groups: list[list[Op]] = []
        reasons: dict[Op, str] = {}
        latest: dict[Value, list[Op]] = {}
        ended: set[Value] = set()
        """Inputs whose latest group is followed by a matmul of another input."""
        shared = sharing_an_input(graph)
        for op in graph.ops():
            if op.role is not Role.MATMUL or graph.is_constant(op.results[0]):
                continue
            ended |= latest.keys() - {value for _, value in op.operands()}
            if op not in shared:
                continue
            if missed := self.why_alone(op, graph):
                reasons[op] = str(missed)
                continue
            x = op["input"]
            group = latest.get(x, [])
            why = self.why_apart(group[-1], op, x in ended) if group else None
            if group and why is None:
                group.append(op)
                continue
            groups.append([op])
            latest[x] = groups[-1]
            ended.discard(x)
            if why is not None:
                reasons[op] = why
                reasons.setdefault(group[-1], why)
        merged = [group for group in groups if len(group) > 1]
        together = {op for group in merged for op in group}
        alone = "no other linear of its input can be merged"
        return Plan(merged, {op: reasons.get(op, alone) for op in shared if op not in together})

    def why_alone(self, op: Op, graph: Graph) -> Missed | None:
        """Why a linear that can be quantized is not merged; None if it may be."""
        columns = op["weight"].tensor.shape[0]
        if missed := why_not_selected(self.layers, op, graph):
            return missed
        if not self.w_format.symmetric:
            return Missed("its weight has zero points")
        if self.w_format.block[0] == ALL or self.w_format.tensor_scale:
            return Missed("its weight has one scale, which all merged layers would have to share")
        if isinstance(columns, int) and columns < self.min_columns:
            return Missed(f"it has {columns} columns, fewer than {self.min_columns}")
        if (bias := op.get("bias")) is not None and not graph.is_constant(bias):
            return Missed("its bias is computed from the inputs", bias)
        if is_stored_quantized(w := op["weight"]) and not w.op.format().decodes_like(self.w_format):
            return Missed(f"its weight is stored as {w.op.format()}", w)
        if is_read_elsewhere(op, graph):
            return Missed("its weight has other users, so both copies would be stored", op["weight"])
        if leaves_the_graph(graph, op.result):
            return Missed("it is an output of the graph, and must not be part of a larger tensor")
        for user in users_through(graph, op.result, is_view):
            if user.name in READ_STRIDES or user.name.split(".")[0] not in ANY_STRIDES:
                return Missed(f"{user.name} reads it and may need contiguous strides")
        return None

    def why_apart(self, before: Op, op: Op, ended: bool) -> str | None:
        """Why one linear cannot follow another in a merged one; None if it can."""
        pair, rows = f"{before.result} and {op.result}", before["weight"].tensor.shape[0]
        types = [_weight_type(linear["weight"]) for linear in (before, op)]
        biases = [bias and bias.tensor.dtype for bias in (before.get("bias"), op.get("bias"))]
        if ended:
            return f"a matmul of another input lies between {pair}"
        if types[0] != types[1]:
            return f"the weights of {pair} are {types[0]} and {types[1]}"
        if None in biases and biases != [None, None]:
            return f"of {pair}, only one has a bias"
        if biases[0] is not biases[1]:
            return f"the biases of {pair} are {biases[0]} and {biases[1]}"
        scales = [x_scale_of(linear["weight"]) for linear in (before, op)]
        if self.static and scales[0] != scales[1]:
            return f"the activation scales of {pair} are {scales[0]} and {scales[1]}"
        if isinstance(rows, int) and rows % self.w_format.block[0]:
            return f"{before.result} has {rows} columns, so that {op.result} would begin inside a block of the weight"
        return None


def sharing_an_input(graph: Graph) -> dict[Op, None]:
    """The linears that can be quantized and whose input another such linear reads, in order."""
    users: dict[Value, list[Op]] = {}
    for op in graph.ops("aten.linear"):
        users.setdefault(op["input"], []).append(op)
    shared = {
        op: None
        for group in users.values()
        if len(group) > 1 and len(able := [op for op in group if why_not_quantized(op, graph) is None]) > 1
        for op in able
    }
    return {op: None for op in graph.ops("aten.linear") if op in shared}


def merge(group: Sequence[Op], graph: Graph, made_by: str) -> None:
    """Inserts one linear before the first of a group, and replaces each by its part of the result."""
    first = group[0]
    rewriter = Rewriter(graph, first, made_by)
    weights, biases = [op["weight"] for op in group], [bias for op in group if (bias := op.get("bias")) is not None]
    _raise(graph, [*weights, *biases], first)
    args = [first["input"], *(_joined(rewriter, values) for values in (weights, biases) if values)]
    kind = TensorType(first.result.tensor.dtype, (*first.result.tensor.shape[:-1], args[1].tensor.shape[0]))
    name = f"{first.result.name}_merged"
    merged = rewriter.insert("aten.linear", *args, types=[kind], names=[name]).result
    start = 0
    for op in group:
        end = start + _rows(op["weight"])
        here = Rewriter(graph, op, made_by)
        part = here.insert("aten.slice.Tensor", merged, -1, start, end, types=[op.result.type]).result
        here.replace(op, part)
        if is_stored_quantized(op["weight"]):
            here.erase_unread(op["weight"].op)  # or its codes would seem to have two users
        _allow_strides(graph, part, made_by)
        start = end


def _raise(graph: Graph, values: Sequence[Value], before: Op) -> None:
    """Moves the operations that compute constants before an operation, unless they already are."""
    later = set()
    for op in reversed(list(graph)):
        if op is before:
            break
        later.add(op)
    for value in values:
        for op in ancestors(value):
            if op in later:
                graph.move(op, before)
                later.discard(op)


def _joined(rewriter: Rewriter, values: Sequence[Value]) -> Value:
    """Concatenates constants along their first axis; for stored quantized weights, codes and scales."""
    if all(map(is_stored_quantized, values)):
        codes, scales = (_joined(rewriter, [value.op[name] for value in values]) for name in ("data", "scale"))
        attrs, names = dict(values[0].op.attrs), [f"{values[0].name}_merged"]
        if len({x_scale_of(value) for value in values}) > 1:
            attrs.pop("x_scale", None)
        return rewriter.insert("quant.dequantize", codes, scales, attrs=attrs, names=names).result
    kind = values[0].tensor
    rows = sum(map(_rows, values))
    types, names = [TensorType(kind.dtype, (rows, *kind.shape[1:]))], [f"{values[0].name}_merged"]
    return rewriter.insert("aten.cat", tuple(values), types=types, names=names).result


def _weight_type(weight: Value) -> str:
    """The element types of a weight, as text: equal for all weights that are merged."""
    dtype = weight.tensor.dtype
    return f"{weight.op['data'].tensor.dtype} of {dtype}" if is_stored_quantized(weight) else str(dtype)


def _rows(value: Value) -> int:
    return value.tensor.shape[0]  # type: ignore[return-value]  # weights that can be quantized have fixed sizes


def _allow_strides(graph: Graph, part: Value, made_by: str) -> None:
    """Turns views of a part that its strides may not allow into reshapes.

    The rows of a part are not adjacent, but equally spaced: a view may split and regroup rows, but no axis may span
    two rows.
    """
    for op in list(users_through(graph, part, is_view)):
        if op.name not in VIEWS:
            continue
        shape, columns = op.result.tensor.shape, part.tensor.shape[-1]
        if op["x"] is part and any(product(shape[at:]) == columns for at in range(len(shape))):
            continue
        rewriter = Rewriter(graph, op, made_by)
        rewriter.replace(op, rewriter.insert("aten.reshape", *op.args, attrs=op.attrs, types=[op.result.type]).result)
