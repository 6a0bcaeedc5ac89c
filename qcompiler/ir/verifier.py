"""Verifier rules of the graph IR.

    V1   every name is defined once, is valid in text, and is in the graph's name table, which has no other names
    V2   every operand is a result of an operation in the graph
    V3   every operand is defined before its user
    V4   the network has no cycle
    V5   every operation is known
    V6   arguments and attributes are values, literals, or tuples of them, and match the operation's declaration
    V7   result types match the operation's type rule
    V8   the network's edges match the arguments
    V9   inputs come first, take no arguments, and have one result
    V10  the last operation is the only return, and has no attributes or results
    V11  at most one operation reads a weight or a cache, and it has one result
    V12  an update writes a value of the same type to a buffer or an input, at most once each
    V13  every symbol is in an input, is unbacked (u…), or has a range; ranges are not empty
    V14  sizes are not negative
    V15  a stored weight has the type that the graph declares
    V16  only operations that read or write state use a buffer that is written during the call
    V17  a cache comes from an operation that reads state; at most one operation writes it, before the others read it
    V18  a tensor is cut along an axis of fixed size into equal parts of whole units
    V19  an operation that reads a partial sum returns a partial sum, or communicates

The error message has the rule number, the pass that ran last, the operation, the lines around it, a caret, and the
source line.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import networkx as nx

from qcompiler.errors import QCompilerError, VerifyError
from qcompiler.ir.cache_type import CacheType
from qcompiler.ir.op import LITERAL_TYPES, Argument, Op, Value, map_tree, print_argument, print_op, quote
from qcompiler.ir.op_table import OpError, check_signature, is_known, lookup, unknown_op
from qcompiler.ir.sharding import Shard
from qcompiler.ir.structure import INPUT, Structure
from qcompiler.ir.traits import Effects, Role
from qcompiler.ir.types import TensorType
from qcompiler.text import NAME

WINDOW = 2
"""Operations shown above and below the operation at fault."""

RING = 6
"""Maximum number of values shown in a cycle."""

SPELLING = "use letters, digits, '_', '.', '$' and '-'"
KEY = re.compile(r"[A-Za-z_][\w.]*")
SYMBOL = re.compile(r"[A-Za-z_]\w*")


class Broken(NamedTuple):
    """A violated rule: its number, the operation, the problem, and the caret position.

    `culprit` is the index of an argument, or text in the operation's line (its last occurrence); if empty, the caret
    covers the whole line.
    """

    rule: int
    op: Op
    sentence: str
    culprit: int | str = ""


def verify_graph(graph: Structure, weights: Mapping[str, Any], after: str = "") -> None:
    """Raises VerifyError for the first violated rule.

    Args:
        graph: The graph to check.
        weights: Its stored weights by name; if empty, rule V15 is not checked.
        after: The name of the pass that ran last.
    """
    broken = next(filter(None, (check(graph) for check in CHECKS)), None) or _stored(graph, weights)
    if broken is not None:
        raise VerifyError(describe(graph, broken, after))


def describe(graph: Structure, broken: Broken, after: str) -> str:
    """The error message: the problem, the surrounding lines with a caret, and the source line."""
    head = f"after pass '{after}', " if after else ""
    lines = [f"{head}in @{graph.name}: rule V{broken.rule}: {broken.op.name}: {broken.sentence}"]
    order = list(graph)
    at = next((i for i, op in enumerate(order) if op is broken.op), len(order) - 1)
    for op in order[max(0, at - WINDOW) : at + WINDOW + 1]:
        row = ("  > " if op is broken.op else "    ") + print_op(op, locations=False)
        lines.append(row)
        if op is broken.op:
            column, width = _caret(row, broken)
            lines.append(" " * column + "^" * width)
    if broken.op.loc.file:
        lines.append(f"  source: {broken.op.loc.file}:{broken.op.loc.line}")
    return "\n".join(lines)


def _caret(row: str, broken: Broken) -> tuple[int, int]:
    culprit = broken.culprit
    if isinstance(culprit, int) and culprit < len(broken.op.args):
        start = row.index("(", row.index(f"{broken.op.name}(")) + 1 if broken.op.name != "core.return" else 11
        before = [print_argument(arg) + ", " for arg in broken.op.args[:culprit]]
        return start + len("".join(before)), len(print_argument(broken.op.args[culprit]))
    matches = list(re.finditer(re.escape(str(culprit)) + r"(?![\w.$-])", row)) if culprit else []
    return (matches[-1].start(), len(str(culprit))) if matches else (4, max(1, len(row) - 4))


def _names(graph: Structure) -> Broken | None:
    if not NAME.fullmatch(graph.name):
        return Broken(1, graph.return_op, f"{graph.name!r} is not a valid function name; {SPELLING}")
    values = [value for op in graph for value in op.results]
    count, names = Counter(value.name for value in values), graph.names
    for value in values:
        if count[value.name] > 1:
            return Broken(1, value.op, f"the name {value} is defined {count[value.name]} times", str(value))
        if names.get(value.name) is not value:
            return Broken(
                1, value.op, f"{value} is not the value called {value.name} in the graph's name table", str(value)
            )
        if not NAME.fullmatch(value.name):
            return Broken(1, value.op, f"{value.name!r} is not a valid value name; {SPELLING}", str(value))
    if stale := sorted(set(names) - set(count)):
        return Broken(1, graph.return_op, f"the graph's name table has %{stale[0]}, which no operation defines")
    return None


def _literals(graph: Structure) -> Broken | None:
    for op in graph:
        places: list[tuple[int | str, Argument]] = [*enumerate(op.args), *op.attrs.items()]
        for key, arg in places:
            if (strange := _strange(arg)) is not None:
                what = f"argument {key}" if isinstance(key, int) else f"attribute '{key}'"
                return Broken(6, op, f"{what} holds a {strange}, which is not a value, literal, or tuple", key)
            if isinstance(key, str) and not KEY.fullmatch(key):
                return Broken(6, op, f"{key!r} is not a valid attribute name", key)
    return None


def _strange(arg: object) -> str | None:
    """The name of the first type in a tree that is not allowed in arguments."""
    if type(arg) is tuple:
        return next(filter(None, map(_strange, arg)), None)
    return None if isinstance(arg, Value) or type(arg) in LITERAL_TYPES else type(arg).__name__


def _definitions(graph: Structure) -> Broken | None:
    position = {op: at for at, op in enumerate(graph)}
    for op in graph:
        for path, value in op.operands():
            culprit = path[0] if isinstance(path[0], int) and len(path) == 1 else str(value)
            if value.op not in position or value.op.results[value.index : value.index + 1] != (value,):
                return Broken(
                    2, op, f"operand {value} is dangling: its defining operation is not in the graph", culprit
                )
            if position[value.op] >= position[op] and value.op is not op:
                return Broken(3, op, f"operand {value} is used before it is defined", culprit)
    return None


def _acyclic(graph: Structure) -> Broken | None:
    network = graph.network
    if nx.is_directed_acyclic_graph(network):
        return None
    ring = nx.find_cycle(network)
    values = [str(definer.results[network.edges[definer, reader, key]["result"]]) for definer, reader, key in ring]
    shown = values[:RING] + ["…"] * (len(values) > RING) + values[:1]
    return Broken(4, ring[0][0], f"it depends on its own result, through {' -> '.join(shown)}", values[-1])


def _known(graph: Structure) -> Broken | None:
    for op in graph:
        if not is_known(op.name):
            return Broken(5, op, unknown_op(op.name), op.name)
    return None


def _signatures(graph: Structure) -> Broken | None:
    placed = any(_is_placed(value) for op in graph for value in op.results)
    for op in graph:
        if (definition := lookup(op.name)) is None:
            continue
        seen = _whole(op) if placed else op
        try:
            check_signature(op, definition)
        except QCompilerError as error:
            return Broken(6, op, str(error), _operand(op, error))
        try:
            types = definition.types(seen) if definition.types else None
        except QCompilerError as error:
            return Broken(7, op, str(error), _operand(op, error))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            return Broken(7, op, f"the type rule failed for these operands: {error}")
        if types is not None and types != tuple(value.type for value in seen.results):
            got = ", ".join(str(value.type) for value in op.results)
            wanted = ", ".join(map(str, types)) or "nothing"
            return Broken(7, op, f"the result types are {got or 'nothing'}, but the type rule requires {wanted}", got)
    return None


def _whole(op: Op) -> Op:
    """The operation as its type rule sees it: without placements, unless it communicates."""
    if Effects.COMMUNICATES in op.effects:
        return op

    def whole(leaf: Any) -> Any:
        placed = isinstance(leaf, Value) and _is_placed(leaf)
        return Value(leaf.op, leaf.index, leaf.name, leaf.tensor.whole) if placed else leaf

    attrs = {key: map_tree(whole, arg) for key, arg in op.attrs.items()}
    return Op(op.name, map_tree(whole, op.args), attrs, op.loc, map_tree(whole, op.results))


def _is_placed(value: Value) -> bool:
    return isinstance(value.type, TensorType) and bool(value.type.sharding)


def _operand(op: Op, error: QCompilerError) -> int | str:
    operand = error.operand if isinstance(error, OpError) else None
    return "" if operand is None else op.path(operand)[0] if isinstance(operand, str) else operand


def _edges(graph: Structure) -> Broken | None:
    network = graph.network
    for op in graph:
        wanted = Counter((id(value.op), value.index, path) for path, value in op.operands())
        edges = network.in_edges(op, data=True) if op in graph else []
        if wanted != Counter((id(definer), data["result"], data["path"]) for definer, _, data in edges):
            return Broken(8, op, "the network does not match its arguments; were they changed without set_args?")
    if len(graph) != (count := len(list(graph))):
        return Broken(8, graph.return_op, f"the network has {len(graph)} operations, but the order has {count}")
    return None


def _ends(graph: Structure) -> Broken | None:
    body_began = False
    for op in graph:
        if not isinstance(op.args, tuple):
            return Broken(6, op, f"the arguments are a {type(op.args).__name__}, not a tuple")
        if op.name == "core.input":
            if body_began:
                return Broken(9, op, "an input is below the first operation of the body")
            if op.args or op.attrs or len(op.results) != 1:
                return Broken(9, op, "an input takes no arguments and has one result")
        else:
            body_began = True
        if op.name == "core.return" and op is not graph.return_op:
            return Broken(10, op, "there is more than one return")
    if graph.return_op.attrs or graph.return_op.results:
        return Broken(10, graph.return_op, "the return has no attributes and no results")
    return None


def _weights(graph: Structure) -> Broken | None:
    seen: dict[str, Op] = {}
    for op in graph:
        if op.role is not Role.STATE:
            continue
        if len(op.results) != 1:
            return Broken(11, op, f"a parameter or buffer has one result, not {len(op.results)}")
        name = str(op.attrs["name"])
        if name in seen:
            kind = "cache" if isinstance(op.result.type, CacheType) else "weight"
            reader = f"{seen[name].result} ({seen[name].name})"
            return Broken(11, op, f"the {kind} {quote(name)} is already read by {reader}", quote(name))
        seen[name] = op
    return None


def _stored(graph: Structure, weights: Mapping[str, Any]) -> Broken | None:
    # `type_of` gives the type without loading the weight; None means unknown.
    type_of = getattr(weights, "type_of", None) or (lambda name: TensorType.of(weights[name]))
    for op in graph:
        if not weights or op.role is not Role.STATE or isinstance(op.result.type, CacheType):
            continue
        name = str(op.attrs["name"])
        if name not in weights:
            return Broken(15, op, f"the weights store has no {quote(name)}", quote(name))
        kind, wanted = op.result.type, str(op.result.type)
        if (stored := type_of(name)) not in (None, kind.stored if isinstance(kind, TensorType) else kind):
            return Broken(15, op, f"{op.result} is {wanted}, but the stored weight is {stored}", wanted)
    return None


def _caches(graph: Structure) -> Broken | None:
    for value in (value for op in graph for value in op.results if isinstance(value.type, CacheType)):
        if value.op.role is not Role.STATE:
            return Broken(17, value.op, f"{value} is a cache, but {value.op.name} does not read state", str(value))
        users = graph.users(value)
        writers = [user for user in users if Effects.WRITES in user.effects]
        if len(writers) > 1:
            return Broken(17, writers[1], f"{value} is already written by an earlier {writers[0].name}", str(value))
        if writers and users[0] is not writers[0]:
            return Broken(17, users[0], f"{value} is read before {writers[0].name} writes it", str(value))
    return None


def _updates(graph: Structure) -> Broken | None:
    written: set[Value] = set()
    for op in graph:
        if op.role is not Role.UPDATE:
            continue
        target, new = op["target"], op["value"]
        if target.op.name != INPUT and not target.op.is_state:
            return Broken(12, op, f"{target} comes from {target.op.name}, not from a buffer or an input", 0)
        if target.type != new.type:
            return Broken(12, op, f"{target} is {target.type}, but its new value is {new.type}", 1)
        if target in written:
            return Broken(12, op, f"{target} is updated twice", 0)
        written.add(target)
    return None


def _written(graph: Structure) -> Broken | None:
    for op in graph:
        for state in op.written:
            for user in graph.users(state):
                if user.role is Role.UPDATE or not user.effects & (Effects.READS | Effects.WRITES):
                    problem = (
                        f"{op.name} writes {state} during the call, so only operations that read or write state may"
                    )
                    return Broken(16, user, f"{problem} use it", str(state))
    return None


def _symbols(graph: Structure) -> Broken | None:
    for name, bounds in graph.symbols.items():
        if bounds.low < 0 or (bounds.high is not None and bounds.high < bounds.low):
            return Broken(13, graph.return_op, f"the range of {name} is {bounds}, which is empty or has negative sizes")
    known = set(graph.symbols).union(*(value.type.symbols for value in graph.inputs))
    if odd := sorted(name for name in known if not SYMBOL.fullmatch(name)):
        return Broken(13, graph.return_op, f"{odd[0]!r} is not a valid symbol name")
    for op in graph:
        for value in op.results:
            if strange := sorted(s for s in value.type.symbols - known if not s.startswith("u")):
                problem = f"{value} is {value.type}, but no input has the symbol {strange[0]}"
                return Broken(13, op, problem, str(value.type))
            if isinstance(value.type, TensorType) and any(isinstance(n, int) and n < 0 for n in value.type.shape):
                return Broken(14, op, f"{value} is {value.type}, which has a negative size", str(value.type))
    return None


def _placements(graph: Structure) -> Broken | None:
    for op in graph:
        for value in op.results:
            if _is_placed(value) and (broken := _cut(value, value.tensor) or _unresolved(graph, value, value.tensor)):
                return broken
    return None


def _cut(value: Value, kind: TensorType) -> Broken | None:
    for mesh, placement in kind.sharding:
        why = placement.why_not(kind.shape) if isinstance(placement, Shard) else None
        if why is not None:
            return Broken(18, value.op, f"{value} is cut along '{mesh}', but {why}", str(placement))
    return None


def _unresolved(graph: Structure, value: Value, kind: TensorType) -> Broken | None:
    for op in graph.users(value) if kind.partials else ():
        returned = (result.type.partials for result in op.results if isinstance(result.type, TensorType))
        lost = kind.partials - frozenset().union(*returned)
        if lost and Effects.COMMUNICATES not in op.effects:
            problem = f"{value} is a partial sum along '{min(lost)}', which a collective must add first"
            return Broken(19, op, problem, str(value))
    return None


CHECKS: tuple[Callable[[Structure], Broken | None], ...] = (
    _names, _ends, _literals, _known, _acyclic, _definitions, _edges,
    _signatures, _weights, _updates, _written, _caches, _symbols, _placements,
)  # fmt: skip
