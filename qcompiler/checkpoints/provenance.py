"""Traces the constants of a compiled graph to the model's weights through their derivations.

    q.weight_merged_q = quantize(cat([q.weight, k.weight]))   ->   q.weight and k.weight: their rows of codes and scales
    norm.weight_folded = cast(norm.weight × 1/s)              ->   norm.weight, changed

Passes record a derivation for each weight that they create (`graph.derivations`); parameter names are never guessed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from qcompiler import numerics
from qcompiler.checkpoints.layouts import restored, why_not_rows
from qcompiler.checkpoints.quantized_weight import QuantizedWeight, equal_bits, same
from qcompiler.dialects.gather import before_gather
from qcompiler.errors import QCompilerError
from qcompiler.interpreter import evaluate
from qcompiler.ir import Format, Graph, Op, Role, Value
from qcompiler.ir.dataflow import parameters_of
from qcompiler.ir.graph import PARAM

GATHER = "kernel.gather_codes"


@dataclass
class Provenance:
    """How the compiled graph stores the model's weights, by their names in the model.

    Attributes:
        quantized: Weights that the graph stores in 8 bits.
        changed: Weights with new values, such as a norm scaled by smoothing.
        kept: Unchanged weights, with their values; None if the graph stores only a constant that the model itself
            computes from the weight.
        scales: Scales of weights that the model itself stores in 8 bits.
        refused: Weights that cannot be recovered -> the reason.
    """

    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor | None] = field(default_factory=dict)
    scales: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)

    def refuse(self, name: str, why: str) -> None:
        """Records why a weight cannot be recovered; the first reason wins."""
        self.refused.setdefault(name, why)

    def spread(self, ties: Mapping[str, tuple[str, ...]]) -> None:
        """Copies the result for one name of a tied parameter to its other names."""
        for name, weight in list(self.quantized.items()):
            self.quantized.update(dict.fromkeys(ties.get(name, ()), weight))
        for name, tensor in list(self.changed.items()):
            self.changed.update(dict.fromkeys(ties.get(name, ()), tensor))


@dataclass(frozen=True)
class _Pair:
    """A quantized weight, its tensor scale or zero points, and how its activation in a matmul is quantized."""

    codes: Value
    scale: Value
    level: Value | None
    format: Format
    x_format: Format | None
    x_scale: Value | None
    prescale: Value | None


def trace(structure: Graph, compiled: Graph, model_names: set[str]) -> Provenance:
    """Traces the model's weights through a compiled graph.

    Args:
        structure: The last stage in which each layer is a separate operation.
        compiled: The graph after the last pass, with weights and derivations.
        model_names: The weights that the graph read when it was captured.
    """
    return _Tracer(structure, compiled, model_names).run()


class _Tracer:
    """The state of one trace."""

    def __init__(self, structure: Graph, compiled: Graph, model_names: set[str]) -> None:
        self.structure, self.compiled, self.model_names = structure, compiled, model_names
        self.found = Provenance()
        self.done: set[str] = set()

    def run(self) -> Provenance:
        """Traces quantized weights first, then the remaining float weights."""
        for op in self.structure.ops():
            for pair in _pairs(op, self.structure):
                self.quantized(pair)
        for op in self.structure.ops(PARAM):
            if str(op.attrs["name"]) not in self.done:
                self.plain(op)
        for name in self.found.kept.keys() & {*self.found.quantized, *self.found.changed}:
            self.found.refuse(name, "the graph also uses it unchanged")
        for name in self.found.changed.keys() & self.found.quantized.keys():
            self.found.refuse(name, "the graph also reads it in float, changed")
        return self.found

    def quantized(self, pair: _Pair) -> None:
        """Records one quantized weight, or several merged ones."""
        operands = (pair.codes, pair.scale, pair.level, pair.x_scale, pair.prescale)
        read = [value for value in operands if value is not None]
        self.done.update(str(param.attrs["name"]) for value in read for param in parameters_of(value))
        source, origin = self.expanded(pair.codes), self.expanded(pair.scale)
        if source.op.role is Role.QUANTIZE:
            if source.op is not origin.op:
                raise QCompilerError("the scale of a weight does not belong to its codes", got=str(pair.scale))
            parts = _parts(source.op["x"])
        else:
            self.found.scales |= self.names(origin)
            parts = _parts(source)
        codes, scale = self.tensor(pair.codes), self.tensor(pair.scale)
        static = None if pair.x_scale is None else self.tensor(pair.x_scale)
        prescale = None if pair.prescale is None else self.tensor(pair.prescale)
        self.found.scales |= set() if pair.prescale is None else self.names(pair.prescale)
        start = 0
        for part in parts:
            end = start + _rows(part)
            name = self.name_of(part)
            if name is not None and (why := why_not_rows(part, self.model_names) or self.why_not_cut(pair, start)):
                self.found.refuse(name, why)
            elif name is not None:
                down = pair.format.block[0]
                rows = scale if down == numerics.ALL or len(parts) == 1 else scale[start // down : -(-end // down)]
                weight = QuantizedWeight(codes[start:end], rows, pair.format, pair.x_format, static, prescale)
                self.add(name, weight)
            start = end

    def why_not_cut(self, pair: _Pair, start: int) -> str | None:
        """The reason why a merged weight cannot be split off: it begins inside a block and shares its scale."""
        rows = pair.format.block[0]
        if start and (rows == numerics.ALL or start % rows):
            return f"it was merged into a block of {rows} rows that it does not begin"
        return None

    def add(self, name: str, weight: QuantizedWeight) -> None:
        """Records a quantized weight; rejects a second form under the same name."""
        known = self.found.quantized.setdefault(name, weight)
        if not same(known, weight):
            self.found.refuse(name, "the graph holds it in two quantized forms")
        elif known.x_format is None or (known.x_scale is None) != (weight.x_scale is None):
            self.found.quantized[name] = weight

    def plain(self, op: Op) -> None:
        """Records a parameter that is not quantized."""
        name = str(op.attrs["name"])
        if name in self.model_names:
            self.found.kept[name] = self.compiled.weights[name]
            return
        if name not in self.compiled.derivations:
            users = ", ".join(str(user.results[0]) for user in self.structure.users(op.result) if user.results)
            self.found.refuse(
                name, f"it cannot be folded into a weight: {users or 'an operation'} reads it in each call"
            )
            return
        parts, start = _parts(self.expanded(op.result)), 0
        for part in parts:
            end = start + _rows(part)
            tensor = self.compiled.weights[name]
            self.changed(part, tensor if len(parts) == 1 else tensor[start:end])
            start = end

    def changed(self, part: Value, tensor: Tensor) -> None:
        """Records the value that a pass computed from one model weight."""
        leaves = {str(param.attrs["name"]) for param in parameters_of(part)}
        if leaves <= self.model_names:  # the model's own arithmetic, computed once
            self.found.kept |= dict.fromkeys(leaves, tensor if part.op.name == PARAM else None)
            return
        name = self.name_of(part)
        if name is None:
            return
        value = restored(part, tensor, self.model_names)
        if isinstance(value, str):
            self.found.refuse(name, value)
        elif not equal_bits(self.found.changed.setdefault(name, value), value):
            self.found.refuse(name, "the graph holds it in two changed forms")

    # Names and numbers

    def expanded(self, value: Value) -> Value:
        """The value that derives a stored weight; a model weight itself."""
        while value.op.name == PARAM and (derivation := self.compiled.derivations.get(str(value.op.attrs["name"]))):
            if not isinstance(made := derivation.graph.outputs[derivation.output], Value):
                raise QCompilerError("a derivation does not give a tensor", got=repr(made), where=str(value))
            value = made
        return value

    def names(self, value: Value) -> set[str]:
        """The model weights that a value is computed from, through all derivations."""
        found = set()
        for param in parameters_of(value):
            source = self.expanded(param.result)
            found |= {str(param.attrs["name"])} if source is param.result else self.names(source)
        return found & self.model_names

    def name_of(self, part: Value) -> str | None:
        """The single model weight in a constant; otherwise refuses the weights and returns None."""
        names = sorted(self.names(part))
        if len(names) == 1:
            return names[0]
        why = f"one constant is computed from it and {len(names) - 1} other weights of the model"
        for name in names or [part.name]:
            self.found.refuse(name, why if names else "its source weight in the model is unknown")
        return None

    def tensor(self, value: Value) -> Tensor:
        """The value of a constant."""
        if value.op.name == PARAM:
            stored: Tensor = self.compiled.weights[str(value.op.attrs["name"])]
            return stored
        made: Tensor = evaluate(value.op, _with_weights(self.structure, self.compiled))[value.index]
        return made


def _pairs(op: Op, graph: Graph) -> Iterator[_Pair]:
    """The quantized weights that an operation multiplies or dequantizes."""
    if op.role is Role.QUANTIZED_MATMUL:
        activation, format = before_gather(op["x"]), op.format("w_format")
        level = op.get(f"w_{format.level}")
        static, prescale = _static_scale(activation), _prescale(activation)
        yield _Pair(op["w"], op["w_scale"], level, format, op.format("x_format"), static, prescale)
    elif op.role is Role.DEQUANTIZE and graph.is_constant(op.result):
        stored = op["data"], op["scale"], op.get(str(op.format().level)), op.format()
        for x in dict.fromkeys(x.op for user in graph.users(op.result) for _, x in user.operands()):
            if x.role is Role.DEQUANTIZE and x is not op:
                yield _Pair(*stored, x.format(), _static_scale(x["data"]), _prescale(x["data"]))
                return
        yield _Pair(*stored, None, None, None)


def _static_scale(codes: Value) -> Value | None:
    """The calibrated scale of an activation; None if it is computed in each call."""
    return _quantize_of(codes).get("scale")


def _prescale(codes: Value) -> Value | None:
    """The factors of the channels of an activation, if it is multiplied before it is quantized."""
    return _quantize_of(codes).get("prescale")


def _quantize_of(codes: Value) -> Op:
    """The operation that quantizes an activation, of which a matmul may read some rows."""
    op = codes.op
    while op.name == GATHER:
        op = op["data"].op
    if op.role is not Role.QUANTIZE:
        raise QCompilerError("the quantization of an activation is unknown", got=op.name, where=str(codes))
    return op


def _parts(value: Value) -> list[Value]:
    """The parts that a constant concatenates along its rows; the constant itself if there is no concatenation."""
    op = value.op
    joined = op.argument("tensors") if op.name == "aten.cat" and op.argument("dim") == 0 else None
    return (
        [part for item in joined if isinstance(item, Value) for part in _parts(item)]
        if isinstance(joined, tuple)
        else [value]
    )


def _rows(value: Value) -> int:
    rows = value.tensor.shape[0] if value.tensor.shape else 1
    if not isinstance(rows, int):
        raise QCompilerError("a weight has no fixed size", got=repr(value))
    return rows


def _with_weights(structure: Graph, compiled: Graph) -> Graph:
    """A stage graph with the weights of the compiled graph."""
    graph = structure.clone()
    graph.weights = compiled.weights
    return graph
