"""Where a positive factor per channel can be moved: the scale region, the part of a graph that such a move changes.

    %x = aten.mul.Tensor(%gain, %xhat)         %x = aten.mul.Tensor(%gain / s, %xhat)
    %q = aten.linear(%x, %wq)             ->   %q = aten.linear(%x, %wq · s)
    %k = aten.linear(%x, %wk)                  %k = aten.linear(%x, %wk · s)

SmoothQuant (Xiao et al., 2023) divides the channels of an activation by s and multiplies the weights that read them.
The dataflow alone decides whether that is legal: every producer and every user of a scaled value must absorb the factor
or pass it on. `solve` finds all values that become scaled, the operations that absorb the factor, and the weights that
undo it. Channels that must have the same factor are tied.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from passes.analyses.candidates import is_stored_quantized
from passes.analyses.channel_labels import ALL, PART, Fork, Labels, Refused, Site, Slot, last_axis
from passes.analyses.channel_rules import RULES, SHAPE_ONLY
from qcompiler.ir import DType, Effects, Graph, Missed, Op, TensorType, Value
from qcompiler.ir.op import Path

LINEAR = "aten.linear"
NORMS = ("aten.layer_norm", "aten.rms_norm", "aten.native_layer_norm")
PARAMETERS = {name: ("weight",) if name == "aten.rms_norm" else ("weight", "bias") for name in (LINEAR, *NORMS)}
"""The operands that absorb a factor, by torch schema name."""

FLOATS = (DType.f64, DType.f32, DType.f16, DType.bf16)

TRIES = 200
"""Maximum number of options to try before the search gives up."""


@dataclass(frozen=True, eq=False)
class Absorber:
    """An operation that absorbs the factors 1/s.

    Attributes:
        op: The operation.
        kind: "constant": its constant operand at `path` is multiplied. "linear": the rows of its weight and its bias
            are. "norm": its gain and its bias are.
        path: The path of the constant; empty for the other kinds.
        labels: The labels of the constant, or of the result of the linear or norm.
    """

    op: Op
    kind: Literal["constant", "linear", "norm"]
    path: Path
    labels: Labels


@dataclass(frozen=True)
class ScaledLinear:
    """An `aten.linear` whose weight undoes the scale: the channel of each column, or UNSCALED."""

    op: Op
    labels: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ScaleRegion:
    """All changes that dividing the channels of `value` by s requires.

    Attributes:
        value: The value whose channels are numbered.
        classes: Channel -> class; the channels of one class must have the same factor.
        scaled: Every value that is scaled and not constant, in order, with its labels; `value` is one of them.
        absorbers: The operations that absorb the factors.
        linears: The linears that read a scaled value.
    """

    value: Value
    classes: tuple[int, ...]
    scaled: Mapping[Value, Labels]
    absorbers: tuple[Absorber, ...]
    linears: tuple[ScaledLinear, ...]


def solve(graph: Graph, value: Value) -> ScaleRegion | Missed:
    """The changes needed to scale the last axis of `value`; Missed says what forbids it."""
    if graph.is_constant(value):
        return Missed("it is constant", value)
    if not isinstance(value.type, TensorType) or value.type.dtype not in FLOATS:
        return Missed("it is not a floating-point tensor", value)
    if not value.type.shape or not isinstance(channels := value.type.shape[-1], int) or channels == 0:
        return Missed("its last axis has no fixed size", value)
    try:
        return _search(_State(graph, value, channels), [TRIES]).region()
    except Refused as reason:
        return Missed(reason.why, reason.value)


def _search(state: "_State", tries: list[int]) -> "_State":
    """Propagates the scale, trying the options at each choice in turn; returns the first legal result.

    Of several refusals, the one with the most values scaled is reported: it is the most specific.
    """
    state.spread()
    if (choice := state.choice()) is None:
        return state
    op, options = choice
    worst: Refused | None = None
    for option in options:
        tries[0] -= 1
        if tries[0] < 0:
            raise Refused(f"the search for operands that carry the scale stopped after {TRIES} tries", op.results[0])
        child = state.copy()
        try:
            child.take(op, option)
            return _search(child, tries)
        except Refused as reason:
            reason.depth = max(reason.depth, len(child.labels))
            if worst is None or reason.depth > worst.depth:
                worst = reason
    raise worst or Refused(f"no operand of {op.name} can be scaled", op.results[0])


class _State:
    """The labels known so far, and the values whose producers and users are still to be checked."""

    def __init__(self, graph: Graph, value: Value, channels: int) -> None:
        self.graph, self.value = graph, value
        self.labels: dict[Value, Labels] = {}
        self.constants: dict[tuple[Op, Path], Labels] = {}
        self.same = list(range(channels))
        """Union-find: channel -> another channel with the same factor."""
        self.reached: dict[Value, tuple[Value, Op] | None] = {}
        """Where a value first got its labels: the scaled value they come from, and the operation between."""
        self.waiting: deque[Value] = deque()
        self.forks: dict[Op, None] = {}
        self.at: tuple[Value, Op] | None = None
        shape = (1,) * (len(value.tensor.shape) - 1) + (channels,)
        self.add(value, np.arange(channels, dtype=np.intp).reshape(shape))

    def copy(self) -> "_State":
        """An independent copy; label arrays are never modified in place."""
        twin = object.__new__(_State)
        twin.graph, twin.value, twin.at = self.graph, self.value, self.at
        twin.labels, twin.constants = dict(self.labels), dict(self.constants)
        twin.same, twin.reached = list(self.same), dict(self.reached)
        twin.waiting, twin.forks = deque(self.waiting), dict(self.forks)
        return twin

    # Labels

    def add(self, value: Value, labels: Labels) -> None:
        """Adds to the labels of a value that is not constant."""
        merged = self.merged(value, self.labels.get(value), labels)
        if merged is not None:
            self.labels[value] = merged
            self.reached.setdefault(value, self.at)
            self.waiting.append(value)

    def add_constant(self, op: Op, path: Path, value: Value, labels: Labels) -> None:
        """Adds to the labels of a constant, for one operation that reads it."""
        merged = self.merged(value, self.constants.get((op, path)), labels)
        if merged is not None:
            self.constants[op, path] = merged

    def merged(self, value: Value, old: Labels | None, new: Labels) -> Labels | None:
        """Merges both labels into the smallest array; None if nothing is new."""
        if not (new >= 0).any():
            return None
        if not isinstance(value.type, TensorType) or value.type.dtype not in FLOATS:
            raise Refused("a scaled value would not be a floating-point tensor", value)
        if old is not None:
            self.tie(old, new)
            new = np.where(old >= 0, old, new)
        for axis, size in enumerate(value.type.shape):
            first = new.take([0], axis)
            if (new == first).all():
                new = first
            elif new.shape[axis] != size:
                raise Refused("the factor would vary along an axis of symbolic size", value)
        return None if old is not None and np.array_equal(old, new) else new

    def tie(self, first: Labels, second: Labels) -> None:
        """Ties channels elementwise; UNSCALED ties nothing."""
        first, second = np.broadcast_arrays(first, second)
        differ = (first != second) & (first >= 0) & (second >= 0)
        for a, b in {*zip(first[differ].tolist(), second[differ].tolist(), strict=True)}:
            a, b = self.find(a), self.find(b)
            self.same[max(a, b)] = min(a, b)

    def find(self, channel: int) -> int:
        """The representative channel of a class."""
        while (above := self.same[channel]) != channel:
            self.same[channel] = channel = self.same[above]
        return channel

    # Producers and users of a value

    def spread(self) -> None:
        """Checks the producer and the users of each scaled value until nothing changes."""
        while self.waiting:
            value = self.waiting.popleft()
            try:
                self.made_by(value)
                for op, path in self.graph.uses(value):
                    self.at = value, op
                    self.read_by(op, path, value)
            except Refused as reason:
                reason.why += self.detour(value)
                reason.depth = max(reason.depth, len(self.labels))
                raise

    def detour(self, value: Value) -> str:
        """How the scale reached `value`: the first operation on the path."""
        step = None
        while (before := self.reached[value]) is not None:
            value, step = before
        return "" if step is None or not step.results else f", reached through {step.results[0]}"

    def made_by(self, value: Value) -> None:
        """Makes the producer of a value absorb the factor or pass it on."""
        op = value.op
        self.at = value, op
        if op.name == "core.input":
            raise Refused("a graph input cannot absorb a scale", value)
        if op.is_state:
            raise Refused("a buffer cannot absorb a scale", value)
        if op.name in (LINEAR, *NORMS):
            self.absorbed(op, value)
        else:
            self.related(op)

    def absorbed(self, op: Op, value: Value) -> None:
        """Requires constant parameters in a linear or norm, and a factor that varies along the last axis."""
        given = [arg for name in PARAMETERS[op.name] if (arg := op.get(name)) is not None]
        shape = op.argument("normalized_shape") if op.name in NORMS else (None,)
        if changing := [arg for arg in given if not self.graph.is_constant(arg)]:
            raise Refused(f"{op.name} cannot absorb a scale: {changing[0]} is computed from the inputs", value)
        if op.name in NORMS and op.get("weight") is None:
            raise Refused(f"{op.name} has no gain that could absorb the scale", value)
        whole = isinstance(shape, tuple) and len(shape) == 1 and isinstance(value.tensor.shape[-1], int)
        if value.index or not whole or _varies_elsewhere(self.labels[value]):
            raise Refused(f"{op.name} can absorb a scale only along the last axis of its result", value)
        if any(len(arg.tensor.shape) != 1 + (op.name == LINEAR and not at) for at, arg in enumerate(given)):
            raise Refused(f"the parameters of {op.name} are not a matrix and a vector", value)
        if stored := [arg for arg in given if is_stored_quantized(arg)]:
            raise Refused(f"{op.name} cannot absorb a scale: {stored[0]} is stored quantized", value)
        if odd := [arg for arg in given if arg.tensor.dtype not in FLOATS]:
            raise Refused(f"{op.name} cannot absorb a scale: {odd[0]} is {odd[0].tensor.dtype}", value)

    def read_by(self, op: Op, path: Path, value: Value) -> None:
        """Makes a user of a value undo the factor or pass it on."""
        if op.name == "core.return":
            raise Refused("an output of the graph must not be scaled", value)
        if Effects.WRITES in op.effects:
            raise Refused(f"a value that {op.name} stores must not be scaled", value)
        if op.name in SHAPE_ONLY:
            return None
        if op.name != LINEAR:
            return self.related(op)
        if path != op.path("input"):
            raise Refused(f"{op.name} reads it, but not as its input", value)
        weight = op.get("weight")
        if weight is None or not self.graph.is_constant(weight) or len(weight.tensor.shape) != 2:
            raise Refused(f"{op.name} ({op.result}) reads it with a weight that is not a constant matrix", value)
        if is_stored_quantized(weight):
            raise Refused(f"{op.name} ({op.result}) reads it with a weight that is stored quantized", value)
        if not isinstance(value.tensor.shape[-1], int):
            raise Refused(f"the reduction dimension of {op.name} ({op.result}) has symbolic size", value)
        if weight.tensor.dtype not in FLOATS:
            raise Refused(f"{op.name} ({op.result}) reads it with a weight of {weight.tensor.dtype}", value)
        if _varies_elsewhere(self.labels[value]):
            raise Refused(
                f"{op.name} ({op.result}) reads it, and the factor varies along more than its last axis", value
            )
        return None

    def related(self, op: Op) -> None:
        """Passes the factor through an operation of the table, in all directions."""
        if (rule := RULES.get(op.name)) is None:
            named = op.results or _operands(op)
            raise Refused(f"{op.name} does not commute with a scale", named[0])
        site = _Place(self, op)
        for path, operand in op.operands():
            if operand in self.labels and (name := site.name_at(path)) not in rule.carries:
                raise site.refused(f"{op.name} does not commute with a scale of its '{name}'")
        if isinstance(rule.relate(site), Fork):
            self.forks[op] = None

    # Choices

    def choice(self) -> tuple[Op, list[Path]] | None:
        """An operation with an open choice, and its options, best first."""
        while self.forks:
            op, _ = self.forks.popitem()
            site = _Place(self, op)
            fork = RULES[op.name].relate(site)
            if isinstance(fork, Fork):
                return op, sorted(fork.options, key=site.preference)
        return None

    def take(self, op: Op, option: Path) -> None:
        """Makes a choice."""
        self.at = next(value for value in (*op.results, *_operands(op)) if value in self.labels), op
        site = _Place(self, op)
        site.chosen = option
        RULES[op.name].relate(site)

    # The result

    def region(self) -> ScaleRegion:
        """The solved region."""
        order = {op: at for at, op in enumerate(self.graph)}
        values = sorted(self.labels, key=lambda value: (order[value.op], value.index))
        absorbers = [Absorber(op, "constant", path, labels) for (op, path), labels in self.constants.items()]
        linears = []
        for value in values:
            labels, op = self.labels[value], value.op
            if op.name in (LINEAR, *NORMS):
                absorbers.append(Absorber(op, "linear" if op.name == LINEAR else "norm", (), labels))
            for linear in (use.op for use in self.graph.uses(value) if use.op.name == LINEAR):
                linears.append(ScaledLinear(linear, tuple(last_axis(labels, value.tensor.shape[-1]).tolist())))
        numbers: dict[int, int] = {}
        classes = tuple(numbers.setdefault(self.find(channel), len(numbers)) for channel in range(len(self.same)))
        absorbers.sort(key=lambda absorber: order[absorber.op])
        linears.sort(key=lambda linear: order[linear.op])
        return ScaleRegion(self.value, classes, {v: self.labels[v] for v in values}, tuple(absorbers), tuple(linears))


class _Place(Site):
    """One operation, with the labels of a state."""

    def __init__(self, state: _State, op: Op) -> None:
        super().__init__(op)
        self.state = state

    def labels(self, slot: Slot) -> Labels | None:
        value = self.value(slot)
        if isinstance(slot, tuple) and value is not None and self.state.graph.is_constant(value):
            return self.state.constants.get((self.op, slot))
        return None if value is None else self.state.labels.get(value)

    def assign(self, slot: Slot, labels: Labels) -> None:
        if (value := self.value(slot)) is None:
            raise self.refused(f"{self.op.name} has an operand that is not a tensor")
        if isinstance(slot, tuple) and self.state.graph.is_constant(value):
            self.state.add_constant(self.op, slot, value, labels)
        else:
            self.state.add(value, labels)

    def is_constant(self, path: Path) -> bool:
        """Whether an operand is the same in every call."""
        return (value := self.value(path)) is not None and self.state.graph.is_constant(value)

    def preference(self, option: Path) -> tuple[bool, bool]:
        """Sorts the options: operands that tie no channels come first; of these, constant operands come first.

        An operand with one element for several elements of different factors would tie channels.
        """
        if option in (ALL, PART) or (labels := self.labels(0)) is None:
            return option == PART, False
        sizes = self.shape(option)
        own = (1,) * (labels.ndim - len(sizes)) + sizes
        ties = any(n > 1 and size == 1 for n, size in zip(labels.shape, own, strict=True))
        return ties, not self.is_constant(option)


def _operands(op: Op) -> list[Value]:
    return [value for _, value in op.operands()]


def _varies_elsewhere(labels: Labels) -> bool:
    """Whether a factor varies along more than the last axis."""
    return any(size > 1 for size in labels.shape[:-1])
