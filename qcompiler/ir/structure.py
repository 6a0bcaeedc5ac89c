"""The structure of a graph: one SSA function stored in a networkx multigraph.

Nodes are operations. An edge leads from the operation that defines a value to each user, and carries (result index,
operand path). Operations also have a total order, in which they print and run. Inputs are `core.input` operations at
the top; the last operation is always the single `core.return`.
"""

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import networkx as nx

from qcompiler.errors import QCompilerError
from qcompiler.ir.constants import Constants
from qcompiler.ir.names import Names
from qcompiler.ir.op import Argument, Location, Op, Path, Value, map_tree
from qcompiler.ir.op_table import infer_types
from qcompiler.ir.order import Order
from qcompiler.ir.ranges import Range
from qcompiler.ir.types import Type

INPUT, RETURN = "core.input", "core.return"


class Use(NamedTuple):
    """One use of a value: the user operation and the position in its arguments."""

    op: Op
    path: Path


class Structure:
    """The ordered operations of a graph and the dataflow network, without weights and text.

    Attributes:
        name: The function name, printed after `@`.
        symbols: Symbol -> range, for the symbolic sizes that have a range.
    """

    def __init__(self, name: str = "main") -> None:
        self.name = name
        self.symbols: dict[str, Range] = {}
        self._net: nx.MultiDiGraph[Op] = nx.MultiDiGraph()
        self._constants = Constants(self._net)
        self._names = Names()
        self._return = Op(RETURN, (), {}, Location())
        self._order = Order(self._return)
        self._net.add_node(self._return)

    # Reading

    def ops(self, name: str | None = None) -> list[Op]:
        """The operations except inputs and return, in order; with `name`, only operations of that name."""
        return [op for op in self if op.name not in (INPUT, RETURN) and name in (None, op.name)]

    def __iter__(self) -> Iterator[Op]:
        """Iterates over a snapshot of all operations in order, including inputs and return."""
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._net)

    def __contains__(self, op: object) -> bool:
        return op in self._net

    def __getitem__(self, name: str) -> Value:
        """The value called `name`, with or without `%`; raises QCompilerError with the closest name if missing."""
        return self._names.find(name)

    @property
    def inputs(self) -> list[Value]:
        """The function's arguments."""
        return [op.result for op in self if op.name == INPUT]

    @property
    def outputs(self) -> tuple[Argument, ...]:
        """The function's outputs: values and literals."""
        return self._return.args

    @property
    def return_op(self) -> Op:
        """The `core.return` operation, which uses the outputs."""
        return self._return

    def is_constant(self, value: Value) -> bool:
        """Whether a value depends only on parameters and literals, so it is the same in every call."""
        return value.op in self._constants

    def uses(self, value: Value) -> list[Use]:
        """All uses of `value` in order, including the return."""
        edges = self._net.out_edges(value.op, data=True)
        found = [Use(user, data["path"]) for _, user, data in edges if data["result"] == value.index]
        return sorted(found, key=lambda use: self._order.rank(use.op))

    def users(self, value: Value) -> list[Op]:
        """The operations that use `value`, each once, in order."""
        return list(dict.fromkeys(use.op for use in self.uses(value)))

    def rank(self, op: Op) -> float:
        """A number that increases along the order; it may change when the graph changes."""
        return self._order.rank(op)

    def after(self, op: Op) -> Op:
        """The operation after `op`, which is not the return."""
        return self._order.after(op)

    @property
    def names(self) -> Mapping[str, Value]:
        """Name -> value, read-only."""
        return MappingProxyType(self._names)

    @property
    def network(self) -> "nx.MultiDiGraph[Op]":
        """A read-only view of the network, for networkx."""
        return self._net.copy(as_view=True)

    # Building

    def add_input(self, name: str, type: Type, loc: Location | None = None) -> Value:
        """Adds a function argument after the existing ones."""
        first_body = next(op for op in self if op.name != INPUT)
        return self.insert(first_body, INPUT, types=(type,), names=(name,), loc=loc).result

    def append(
        self,
        name: str,
        *args: Argument,
        attrs: Mapping[str, Argument] | None = None,
        types: Iterable[Type] | None = None,
        names: Iterable[str] | None = None,
        loc: Location | None = None,
    ) -> Op:
        """Adds an operation at the end of the body; see `insert`."""
        return self.insert(self._return, name, *args, attrs=attrs, types=types, names=names, loc=loc)

    def insert(
        self,
        before: Op,
        name: str,
        *args: Argument,
        attrs: Mapping[str, Argument] | None = None,
        types: Iterable[Type] | None = None,
        names: Iterable[str] | None = None,
        loc: Location | None = None,
    ) -> Op:
        """Adds an operation before `before`.

        Args:
            before: An operation of this graph.
            name: `dialect.op`, plus `.overload` unless it is the default overload.
            *args: Values and literals; lists are tuples.
            attrs: Keyword arguments.
            types: One type per result; inferred by the operation's type rule by default.
            names: One name per result, made unique if taken; derived from the operation name by default.
            loc: The source location of the operation.
        """
        self._hold(before)
        op = Op(name, args, dict(attrs or {}), loc or Location())
        self._check_operands(op, args, op.attrs)
        self._bind_results(op, types, names)
        self._net.add_node(op)
        self._wire(op)
        self._order.place(op, before)
        return op

    def set_outputs(self, outputs: Iterable[Argument]) -> None:
        """Sets the function's outputs."""
        self.set_args(self._return, tuple(outputs))

    # Changing

    def set_args(self, op: Op, args: tuple[Argument, ...], attrs: Mapping[str, Argument] | None = None) -> None:
        """Replaces the arguments of `op` (and its attributes, if given) and updates the network."""
        self._hold(op)
        self._check_operands(op, args, op.attrs if attrs is None else attrs)
        self._net.remove_edges_from(list(self._net.in_edges(op, keys=True)))
        op.args = args
        if attrs is not None:
            op.attrs = dict(attrs)
        self._wire(op)

    def replace(self, old: Value, new: Value) -> None:
        """Replaces `old` by `new` in all users except the operation that defines `new`, which may use `old`."""
        for user in self.users(old):
            if user is not new.op:
                self.replace_in(user, old, new)

    def replace_in(self, op: Op, old: Value, new: Value) -> None:
        """Replaces `old` by `new` in all operands of one operation."""

        def swap(leaf: object) -> object:
            return new if leaf is old else leaf

        self.set_args(op, map_tree(swap, op.args), {key: map_tree(swap, arg) for key, arg in op.attrs.items()})

    def erase(self, op: Op) -> None:
        """Removes an operation; raises QCompilerError if its results have users."""
        self._hold(op, but_return=True)
        if users := [user for value in op.results for user in self.users(value)]:
            need = f"no users, but it has {len(users)}, such as {users[0].name}"
            raise QCompilerError("an operation whose results have users cannot be erased", got=op.name, need=need)
        self._order.remove(op)
        self._net.remove_node(op)
        self._constants.forget(op)
        for value in op.results:
            self._names.release(value)

    def move(self, op: Op, before: Op) -> None:
        """Moves `op` before `before`."""
        self._hold(op, but_return=True)
        self._hold(before)
        if op is not before:
            self._order.remove(op)
            self._order.place(op, before)

    def rename(self, value: Value, name: str) -> None:
        """Renames a value; the new name is made unique if it is taken."""
        self._names.release(value)
        self._names.bind(value, name)

    def fresh(self, name: str) -> str:
        """`name`, or `name_1`, `name_2` … if it is taken."""
        return self._names.fresh(name)

    # Private

    def _bind_results(self, op: Op, types: Iterable[Type] | None, names: Iterable[str] | None) -> None:
        kinds = tuple(infer_types(op) if types is None else types)
        labels = [op.name.partition(".")[2].split(".")[0] or op.name] * len(kinds) if names is None else list(names)
        if len(labels) != len(kinds):
            raise QCompilerError(f"{op.name} needs one name per result", got=f"{len(labels)} names", need=len(kinds))
        op.results = tuple(Value(op, index, "", kind) for index, kind in enumerate(kinds))
        for value, label in zip(op.results, labels, strict=True):
            self._names.bind(value, label)

    def _hold(self, op: Op, but_return: bool = False) -> None:
        """Raises QCompilerError unless `op` is in this graph (and, with `but_return`, is not its return)."""
        if op not in self._order:
            raise QCompilerError(f"the operation is not in @{self.name}", got=op.name)
        if but_return and op is self._return:
            raise QCompilerError("the return must be the last operation and cannot be erased or moved")

    def _check_operands(self, op: Op, args: tuple[Argument, ...], attrs: Mapping[str, Argument]) -> None:
        for _, value in Op(op.name, args, dict(attrs), op.loc).operands():
            if value.op not in self._order:
                raise QCompilerError(f"{op.name} cannot read a value that is not in @{self.name}", got=repr(value))

    def _wire(self, op: Op) -> None:
        for path, value in op.operands():
            self._net.add_edge(value.op, op, result=value.index, path=path)
        self._constants.update(op)
