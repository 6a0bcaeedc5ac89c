"""Rewrite rules: match a pattern, check a condition, replace; a rule reports why it did not match.

    class DoubleNegation(Rule):
        '''neg(neg(x))  ->  x'''

        root = ("aten.neg",)

        def match(self, op, graph):
            inner = op["self"].op
            return {"x": inner["self"]} if inner.name == "aten.neg" else Missed("its input is not a neg", op["self"])

        def rewrite(self, op, rewriter, x):
            rewriter.replace(op, x)

Rules are stateless: `rewrite` receives the result of `match`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from qcompiler.errors import PassError
from qcompiler.ir.graph import PARAM, Graph
from qcompiler.ir.op import Argument, Op, Value
from qcompiler.ir.op_table import is_known, is_ours, unknown_op
from qcompiler.ir.traits import Role
from qcompiler.ir.types import Type

SWEEPS = 100
"""Sweeps before rewriting is assumed not to terminate."""


@dataclass(frozen=True)
class Missed:
    """Why a rule did not match: a clause without a final period, and the value at fault, if any."""

    why: str
    value: Value | None = None

    def __str__(self) -> str:
        return f"{self.why} ({self.value})" if self.value is not None else self.why


Match = Mapping[str, Any]


class Rule(ABC):
    """One local rewrite; its docstring shows `before -> after`. `root`: names or roles of operations to start at."""

    root: ClassVar[tuple[str | Role, ...]]

    @abstractmethod
    def match(self, op: Op, graph: Graph) -> Match | Missed:
        """Keyword arguments for `rewrite`, or why the rule does not apply at `op`. Must not change the graph."""

    @abstractmethod
    def rewrite(self, op: Op, rewriter: "Rewriter", /, *_: Any, **match: Any) -> None:
        """Changes the graph through the rewriter, given the result of `match`."""

    def starts_at(self, op: Op) -> bool:
        """Whether `root` contains the name or the role of an operation."""
        return op.name in self.root or op.role in self.root

    @property
    def name(self) -> str:
        """The class name, for messages."""
        return type(self).__name__


class Rewriter:
    """Changes a graph around one operation; inserted operations come before it and inherit its location."""

    def __init__(self, graph: Graph, anchor: Op, made_by: str) -> None:
        self.graph, self.anchor, self.made_by = graph, anchor, made_by
        self.changed = False
        self._inserted: set[Op] = set()

    def insert(
        self,
        name: str,
        *args: Argument,
        attrs: Mapping[str, Argument] | None = None,
        types: Iterable[Type] | None = None,
        names: Iterable[str] | None = None,
    ) -> Op:
        """Inserts an operation before the anchor; see `Graph.insert`."""
        self.changed = True
        loc = replace(self.anchor.loc, made_by=self.made_by)
        op = self.graph.insert(self.anchor, name, *args, attrs=attrs, types=types, names=names, loc=loc)
        self._inserted.add(op)
        return op

    def replace(self, op: Op, *values: Value, keep_names: bool = True) -> None:
        """Replaces the results of `op` by `values`, one per result and of the same type, and erases `op`.

        Values inserted by this rewriter take over the names, unless `keep_names` is false.
        """
        if len(values) != len(op.results):
            raise PassError(f"{op.name} has {len(op.results)} results, but got {len(values)} replacement values")
        for old, new in zip(op.results, values, strict=True):
            if new.type != old.type:
                raise PassError(
                    f"{old} would be replaced by {new}, which has another type", got=new.type, need=old.type
                )
        self.changed = True
        names = [old.name for old in op.results]
        for old, new in zip(op.results, values, strict=True):
            self.graph.replace(old, new)
        self.graph.erase(op)
        for name, new in zip(names, values, strict=True):
            # A parameter is named after its weight.
            if keep_names and new.op in self._inserted and new.op.name != PARAM:
                self.graph.rename(new, name)

    def erase_unread(self, op: Op) -> None:
        """Erases `op` and the operations that only it used, if they have no users and no side effects."""
        stack = [op]
        while stack:
            op = stack.pop()
            if op not in self.graph or op.effects.ordered or any(map(self.graph.uses, op.results)):
                continue
            stack += [value.op for _, value in op.operands()]
            self.graph.erase(op)
            self.changed = True


def apply_rules(graph: Graph, rules: Sequence[Rule], made_by: str) -> bool:
    """Applies the rules in graph order until none matches; returns whether anything changed.

    Raises PassError if rewriting does not finish within 100 sweeps, or a rule is malformed.
    """
    for rule in rules:
        _check_root(rule)
    for sweep in range(SWEEPS):
        if not (busy := _sweep(graph, rules, made_by)):
            return sweep > 0
    names = ", ".join(dict.fromkeys(rule.name for rule in busy))
    raise PassError(
        f"rewriting does not terminate: after {SWEEPS} sweeps, {names} still matches", where=f"pass '{made_by}'"
    )


def _sweep(graph: Graph, rules: Sequence[Rule], made_by: str) -> list[Rule]:
    """Tries every rule at every operation once; returns the rules that changed the graph."""
    busy = []
    for op in graph.ops():
        for rule in rules:
            if not rule.starts_at(op) or op not in graph:
                continue
            rewriter = Rewriter(graph, op, made_by)
            try:
                match = rule.match(op, graph)
                if not isinstance(match, Missed):
                    rule.rewrite(op, rewriter, **_checked(match, rule))
            except Exception as error:
                error.add_note(f"in rule {rule.name}, at {op.name} {op.loc}".rstrip())
                raise
            busy += [rule] if rewriter.changed else []
    return busy


def _check_root(rule: Rule) -> None:
    """Raises PassError if no operation can have one of the names at which a rule starts."""
    root = getattr(rule, "root", ())  # a rule that overrides `starts_at` needs none
    if not isinstance(root, tuple):
        need = 'a tuple of names or roles, such as ("aten.mul.Tensor",)'
        raise PassError(f"root of rule {rule.name} is of a wrong type", got=repr(root), need=need)
    for name in root:
        if isinstance(name, str) and is_ours(name) and not is_known(name):
            raise PassError(f"rule {rule.name} starts at an {unknown_op(name)}")


def _checked(match: Any, rule: Rule) -> Match:
    """Returns the keyword arguments that `match` returned; PassError if it returned something else."""
    if not isinstance(match, Mapping):
        need = "the keyword arguments of rewrite, as a dict, or Missed(reason)"
        raise PassError(f"rule {rule.name} does not say whether it matches", got=repr(match), need=need)
    return match


def explain(graph: Graph, rules: Sequence[Rule]) -> list[tuple[Op, Rule, Missed]]:
    """Every candidate that a rule does not match: the operation, the rule, and why."""
    skipped = []
    for op in graph.ops():
        for rule in rules:
            if rule.starts_at(op) and isinstance(missed := rule.match(op, graph), Missed):
                skipped.append((op, rule, missed))
    return skipped
