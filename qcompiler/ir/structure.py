"""The structure of a graph: one function in SSA form over a networkx multigraph.

Nodes are operations; an edge runs from the operation that defines a value to each operation that reads it and carries
(result index, operand path). The operations also stand in one order, in which they print and run. Inputs are
`core.input` operations at the top; the last operation is always the one `core.return`.
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
    """One reader of a value: the operation, and where in its arguments the value stands."""

    op: Op
    path: Path


class Structure:
    """The operations of a graph, in order, and the network between them, without weights and text.

    Attributes:
        name: Printed after `@`.
        symbols: The range of each symbolic size that has one.
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
        """The operations between the inputs and the return, in order; only those called `name`, when it is given."""
        return [op for op in self if op.name not in (INPUT, RETURN) and name in (None, op.name)]

    def __iter__(self) -> Iterator[Op]:
        """Every operation in order, inputs and return included, as the order is now."""
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._net)

    def __contains__(self, op: object) -> bool:
        return op in self._net

    def __getitem__(self, name: str) -> Value:
        """The value called `name`, with or without its `%`; QCompilerError with the nearest name when there is none."""
        return self._names.find(name)

    @property
    def inputs(self) -> list[Value]:
        """The function's arguments."""
        return [op.result for op in self if op.name == INPUT]

    @property
    def outputs(self) -> tuple[Argument, ...]:
        """What the function returns: values and literals."""
        return self._return.args

    @property
    def return_op(self) -> Op:
        """The operation that ends the function and reads its outputs."""
        return self._return

    def is_constant(self, value: Value) -> bool:
        """Whether a value is computed from parameters and literals alone, and so is the same in every call."""
        return value.op in self._constants

    def uses(self, value: Value) -> list[Use]:
        """Every place that reads `value`, the return included, in order."""
        edges = self._net.out_edges(value.op, data=True)
        found = [Use(reader, data["path"]) for _, reader, data in edges if data["result"] == value.index]
        return sorted(found, key=lambda use: self._order.rank(use.op))

    def users(self, value: Value) -> list[Op]:
        """The operations that read `value`, each once, in order."""
        return list(dict.fromkeys(use.op for use in self.uses(value)))

    def rank(self, op: Op) -> float:
        """A number that grows along the order; changing the graph may change it."""
        return self._order.rank(op)

    @property
    def names(self) -> Mapping[str, Value]:
        """Every value by its name; read-only."""
        return MappingProxyType(self._names)

    @property
    def network(self) -> "nx.MultiDiGraph[Op]":
        """The network itself, for networkx to read; changing it raises an error."""
        return self._net.copy(as_view=True)

    # Building

    def add_input(self, name: str, type: Type, loc: Location | None = None) -> Value:
        """Adds a function argument after the ones that are there."""
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
        """Adds an operation in front of `before`.

        Args:
            before: An operation of this graph.
            name: `dialect.op`, with `.overload` where it is not the default one.
            *args: Values and literals; lists are tuples.
            attrs: Keyword arguments.
            types: One type a result; taken from the operation's type rule when left out.
            names: One name a result, made unique when it is taken; derived from the operation when left out.
            loc: Where the operation comes from.
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
        """Sets what the function returns."""
        self.set_args(self._return, tuple(outputs))

    # Changing

    def set_args(self, op: Op, args: tuple[Argument, ...], attrs: Mapping[str, Argument] | None = None) -> None:
        """Replaces the arguments of `op` (and its attributes, when given) and rewires the network."""
        self._hold(op)
        self._check_operands(op, args, op.attrs if attrs is None else attrs)
        self._net.remove_edges_from(list(self._net.in_edges(op, keys=True)))
        op.args = args
        if attrs is not None:
            op.attrs = dict(attrs)
        self._wire(op)

    def replace(self, old: Value, new: Value) -> None:
        """Makes every reader of `old` read `new`, except the one that makes `new`, which may itself read `old`."""
        for user in self.users(old):
            if user is not new.op:
                self.replace_in(user, old, new)

    def replace_in(self, op: Op, old: Value, new: Value) -> None:
        """Makes one operation read `new` wherever it read `old`."""

        def swap(leaf: object) -> object:
            return new if leaf is old else leaf

        self.set_args(op, map_tree(swap, op.args), {key: map_tree(swap, arg) for key, arg in op.attrs.items()})

    def erase(self, op: Op) -> None:
        """Removes an operation that nobody reads; QCompilerError when somebody does."""
        self._hold(op, but_return=True)
        if readers := [reader for value in op.results for reader in self.users(value)]:
            need = f"no reader, but {readers[0].name} is one of {len(readers)}"
            raise QCompilerError("an operation that is still read cannot be erased", got=op.name, need=need)
        self._order.remove(op)
        self._net.remove_node(op)
        self._constants.forget(op)
        for value in op.results:
            self._names.release(value)

    def move(self, op: Op, before: Op) -> None:
        """Puts `op` in front of `before`."""
        self._hold(op, but_return=True)
        self._hold(before)
        if op is not before:
            self._order.remove(op)
            self._order.place(op, before)

    def rename(self, value: Value, name: str) -> None:
        """Gives a value a new name, made unique when it is taken."""
        self._names.release(value)
        self._names.bind(value, name)

    def fresh(self, name: str) -> str:
        """`name`, or `name_1`, `name_2` … when it is taken."""
        return self._names.fresh(name)

    # Private

    def _bind_results(self, op: Op, types: Iterable[Type] | None, names: Iterable[str] | None) -> None:
        kinds = tuple(infer_types(op) if types is None else types)
        labels = [op.name.partition(".")[2].split(".")[0] or op.name] * len(kinds) if names is None else list(names)
        if len(labels) != len(kinds):
            raise QCompilerError(f"{op.name} needs one name a result", got=f"{len(labels)} names", need=len(kinds))
        op.results = tuple(Value(op, index, "", kind) for index, kind in enumerate(kinds))
        for value, label in zip(op.results, labels, strict=True):
            self._names.bind(value, label)

    def _hold(self, op: Op, but_return: bool = False) -> None:
        """QCompilerError unless `op` stands in this graph (and is not its return, with `but_return`)."""
        if op not in self._order:
            raise QCompilerError(f"the operation is not in @{self.name}", got=op.name)
        if but_return and op is self._return:
            raise QCompilerError("the return stands last in every graph and can be neither erased nor moved")

    def _check_operands(self, op: Op, args: tuple[Argument, ...], attrs: Mapping[str, Argument]) -> None:
        for _, value in Op(op.name, args, dict(attrs), op.loc).operands():
            if value.op not in self._order:
                raise QCompilerError(f"{op.name} cannot read a value that is not in @{self.name}", got=repr(value))

    def _wire(self, op: Op) -> None:
        for path, value in op.operands():
            self._net.add_edge(value.op, op, result=value.index, path=path)
        self._constants.update(op)
