"""Whether a model is causal: the analysis of a graph along the sequence.

    match analyze(graph):
        case Sequence() as sequence: ...    # every path from token ids to the outputs is position-wise or causal
        case Refused(why, op): ...          # the first operation that is neither

A causal graph can run in parts: earlier positions do not change when tokens are added, so their keys and values can be
kept. It depends on the place of a token only through position numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from passes.analyses.sequence_labels import (
    Digit,
    Extent,
    Fact,
    Groups,
    Label,
    Mixed,
    Mixes,
    Number,
    Order,
    plain,
)
from passes.analyses.sequence_rules import CAUSAL, facts_of
from passes.analyses.sequence_site import Site
from qcompiler.ir import Effects, Expr, Graph, Op, ScalarType, Size, TensorType, Value

SCALARS = "core."


@dataclass(frozen=True)
class Refused:
    """Why a graph is not causal.

    Attributes:
        why: The reason, without a final period.
        op: The operation at fault.
    """

    why: str
    op: Op

    def __str__(self) -> str:
        """The reason with the source line."""
        return f"{self.why} {self.op.loc}".rstrip()


@dataclass(frozen=True, eq=False)
class Sequence:
    """A causal graph.

    Attributes:
        ids: The input of token ids, [batch, length].
        batch: The size of the batch.
        length: The number of positions.
        labels: The label of each position-wise value that the outputs depend on.
        positions: Values that are position numbers -> offset: the element at position p is p + offset. All other values
            depend on the place of a token only through these.
        tokens: The narrowest values that separate the last attention from the outputs: all that follows needs one token
            only if one token of each is gathered. Each is [batch, positions, ...]; empty if there are none.
    """

    ids: Value
    batch: Size
    length: Size
    labels: Mapping[Value, Label]
    positions: Mapping[Value, int]
    tokens: tuple[Value, ...]


def analyze(graph: Graph, ids: str = "input_ids", positions: str = "position_ids") -> Sequence | Refused:
    """The labels of all values that the outputs depend on, or why the graph is not causal.

    Args:
        graph: A graph that maps token ids to outputs, after the pass `attention`.
        ids: The name of the input that holds token ids, integers [batch, length], both of symbolic size.
        positions: The name of the input that holds position numbers, if the graph has it: each row is 0, 1, 2, ….
    """
    given = next((value for value in graph.inputs if value.name == ids), None)
    if given is None:
        return Refused(f"the graph has no input '{ids}'", graph.return_op)
    sizes = given.type.shape if isinstance(given.type, TensorType) else ()
    if len(sizes) != 2 or not all(isinstance(size, Expr) for size in sizes) or sizes[0] == sizes[1]:
        return Refused(f"{ids} is {given.type}, not a matrix with two symbolic sizes, batch and positions", given.op)
    facts: dict[Value, Fact] = {}
    live = _live(graph)
    for op in graph:
        if op not in live or op is graph.return_op:
            continue
        try:
            facts.update(zip(op.results, _facts(graph, op, facts, given, positions), strict=True))
        except Mixes as reason:
            if any(_has_content(facts.get(value)) for _, value in op.operands()) or not op.results:
                return Refused(reason.why, op)
            mixed = [fact for _, value in op.operands() if isinstance(fact := facts.get(value), Mixed)]
            facts.update((value, mixed[0] if mixed else Mixed(reason.why, op)) for value in op.results)
    for value in _outputs(graph):
        if isinstance(fact := facts[value], Mixed):
            return Refused(fact.why, fact.op)
        if not isinstance(fact, Label | Extent):
            return Refused(f"the output {value} depends on the order of all tokens", value.op)
    labels = {value: fact for value, fact in facts.items() if isinstance(fact, Label)}
    numbers = {value: label.known.offset for value, label in labels.items() if isinstance(label.known, Number)}
    return Sequence(given, sizes[0], sizes[1], labels, numbers, _narrowest(graph, live, labels))


def _live(graph: Graph) -> set[Op]:
    """The operations that an output or a buffer depends on."""
    live: set[Op] = set()
    stack = [graph.return_op, *(op for op in graph if op.effects & Effects.WRITES)]
    while stack:
        if (op := stack.pop()) not in live:
            live.add(op)
            stack += [value.op for _, value in op.operands()]
    return live


def _outputs(graph: Graph) -> list[Value]:
    return [value for _, value in graph.return_op.operands()]


def _has_content(fact: Fact | None) -> bool:
    """Whether a value depends on token ids."""
    return fact.content if isinstance(fact, Label) else isinstance(fact, Order | Groups)


def _facts(graph: Graph, op: Op, facts: Mapping[Value, Fact], ids: Value, positions: str) -> tuple[Fact, ...]:
    if op.name == "core.input":
        return (_input(op.result, ids, positions),)
    if all(graph.is_constant(value) for value in op.results) and op.results:
        return tuple(plain(v.type.shape) if isinstance(v.type, TensorType) else Extent() for v in op.results)
    if op.name.startswith(SCALARS) and op.results and all(isinstance(v.type, ScalarType) for v in op.results):
        return _numbers(op, facts)
    return facts_of(Site(op, facts, ids.tensor.shape[1]))


def _input(value: Value, ids: Value, positions: str) -> Fact:
    batch, length = ids.tensor.shape
    rows, columns = (Digit("batch", batch),), (Digit("positions", length),)
    if value is ids:
        return Label((rows, columns), content=True)
    shape = value.type.shape if isinstance(value.type, TensorType) else ()
    if value.name == positions and shape in ((batch, length), (1, length)):
        axes = (rows if shape[0] == batch else (), columns)
        return Label(axes, numbers=frozenset((value,)), known=Number(0))
    if isinstance(value.type, ScalarType):
        return Extent()
    return Mixed(f"the input {value.name} holds neither token ids nor position numbers", value.op)


def _numbers(op: Op, facts: Mapping[Value, Fact]) -> tuple[Fact, ...]:
    """Arithmetic on sizes."""
    for _, value in op.operands():
        if not isinstance(facts[value], Extent):
            raise Mixes(f"{op.name} computes a number from {value}")
    return (Extent(),) * len(op.results)


def _narrowest(graph: Graph, live: set[Op], labels: Mapping[Value, Label]) -> tuple[Value, ...]:
    """The cut of least bytes between the last attention and the outputs, of those along the order of operations."""
    cut = dict.fromkeys(value for value in _outputs(graph) if _has_content(labels.get(value)))
    best: tuple[Value, ...] = ()
    least: int | None = None
    for op in [op for op in reversed(graph.ops()) if op in live]:
        if op is graph.return_op:
            pass
        elif not any(value in cut for value in op.results):
            continue
        elif op.name == CAUSAL:
            break
        else:
            for value in op.results:
                cut.pop(value, None)
            operands = [value for _, value in op.operands()]
            cut.update((value, None) for value in operands if value in labels and not labels[value].free)
        width = _bytes(cut, labels)
        if width is not None and (least is None or width < least):
            best, least = tuple(cut), width
    return best


def _bytes(cut: Mapping[Value, None], labels: Mapping[Value, Label]) -> int | None:
    """Bytes of a token in all values of a cut; None if one of them is not [batch, positions, ...] in floating point."""
    total = 0
    for value in cut:
        axes, dtype = labels[value].axes, value.tensor.dtype
        lead = [[digit.kind for digit in axis] for axis in axes[:2]]
        if lead != [["batch"], ["positions"]] or not dtype.is_float or dtype.bits < 16:
            return None
        width = dtype.bits // 8
        for size in value.tensor.shape[2:]:
            width *= size if isinstance(size, int) else 0
        total += width
    return total or None
