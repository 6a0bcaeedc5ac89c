"""Values, operations, literals, and locations."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qcompiler.errors import did_you_mean
from qcompiler.ir.formats import Format
from qcompiler.ir.traits import Effects, Role, traits_of
from qcompiler.ir.types import DType, TensorType, Type

Path = tuple[int | str, ...]
"""Operand position: (0,) is the first argument, (0, 2) the third item of a list there, ("mask",) an attribute."""


@dataclass(frozen=True)
class Tag:
    """A literal that is a name in torch, such as a memory format; prints as `#contiguous_format`."""

    name: str

    def __str__(self) -> str:
        return f"#{self.name}"


@dataclass(frozen=True)
class Location:
    """The origin of an operation: source line, module path, and the pass that created it."""

    file: str = ""
    line: int = 0
    module: str = ""
    made_by: str = ""

    def __str__(self) -> str:
        parts = [f"{quote(self.file)}:{self.line}"] if self.file else []
        parts += [f"in {quote(self.module)}"] if self.module else []
        parts += [f"by {quote(self.made_by)}"] if self.made_by else []
        return f"loc({' '.join(parts)})" if parts else ""


class Value:
    """A named, typed result of an operation; compared by identity."""

    __slots__ = ("index", "name", "op", "type")

    def __init__(self, op: "Op", index: int, name: str, type: Type) -> None:
        self.op, self.index, self.name, self.type = op, index, name, type

    def __str__(self) -> str:
        return f"%{self.name}"

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"

    @property
    def tensor(self) -> TensorType:
        """The type as a TensorType; raises TypeError if it is not a tensor type."""
        if not isinstance(self.type, TensorType):
            raise TypeError(f"{self!r} is not a tensor")
        return self.type


Literal = None | bool | int | float | str | DType | Format | Tag
Argument = Value | Literal | tuple["Argument", ...]
LITERAL_TYPES = (type(None), bool, int, float, str, DType, Format, Tag)


@dataclass(eq=False)
class Op:
    """One operation: `results = name(args) {attrs}`. Arguments and attributes are trees of values and literals.

    Argument names come from the operation's declaration or torch's schema: `op["weight"]`, `op.get("bias")`.
    """

    name: str
    args: tuple[Argument, ...]
    attrs: dict[str, Argument]
    loc: Location
    results: tuple[Value, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        """The operation as a line of the graph's text."""
        return print_op(self)

    @property
    def result(self) -> Value:
        """The only result."""
        (value,) = self.results
        return value

    def operands(self) -> Iterator[tuple[Path, Value]]:
        """All values in the arguments and attributes, with their paths, in printing order."""
        for index, arg in enumerate(self.args):
            yield from _values(arg, (index,))
        for key in sorted(self.attrs):
            yield from _values(self.attrs[key], (key,))

    def __getitem__(self, name: str) -> Value:
        """The operand called `name`; raises KeyError if there is no such parameter, TypeError if it is not a value."""
        arg = self.argument(name)
        if not isinstance(arg, Value):
            raise TypeError(f"operand '{name}' of {self.name} is {arg!r}, not a value")
        return arg

    def get(self, name: str) -> Value | None:
        """The operand called `name`; None if there is no such parameter or it is not a value."""
        arg = self._find(name)
        return arg if isinstance(arg, Value) else None

    def argument(self, name: str) -> Argument:
        """The argument or attribute called `name`, or its default; raises KeyError if there is no such parameter."""
        self.path(name)
        return self._find(name)

    def path(self, name: str) -> Path:
        """The path of the argument called `name`, whether set or not; raises KeyError if there is no such parameter."""
        traits = traits_of(self.name)
        name = traits.aliases.get(name, name)
        index = traits.positions.get(name)
        if index is not None and index < len(self.args):
            return (index,)
        if index is None and name not in traits.defaults and name not in self.attrs:
            known = {*traits.positions, *traits.defaults, *self.attrs}
            raise KeyError(f"{self.name} has no parameter '{name}'. {did_you_mean(name, known)}")
        return (name,)

    def _find(self, name: str) -> Argument:
        traits = traits_of(self.name)
        name = traits.aliases.get(name, name)
        index = traits.positions.get(name, len(self.args))
        if index < len(self.args):
            return self.args[index]
        default: Argument = traits.defaults.get(name)
        return self.attrs.get(name, default)

    def format(self, name: str = "format") -> Format:
        """The attribute called `name` as a Format; raises TypeError if it is not a format."""
        found = self.attrs.get(name)
        if not isinstance(found, Format):
            raise TypeError(f"attribute '{name}' of {self.name} is {found!r}, not a format")
        return found

    @property
    def rest(self) -> tuple[Argument, ...]:
        """The arguments after the named ones."""
        start = traits_of(self.name).rest
        return () if start is None else self.args[start:]

    @property
    def role(self) -> Role | None:
        """The role of the operation in passes."""
        return traits_of(self.name).role

    @property
    def effects(self) -> Effects:
        """The side effects of the operation."""
        return traits_of(self.name).effects

    @property
    def is_state(self) -> bool:
        """Whether its result is state that the model may change, such as a buffer."""
        return self.role is Role.STATE and Effects.READS in self.effects

    @property
    def written(self) -> tuple["Value", ...]:
        """The state that it writes at once, in graph order; an operation with the role UPDATE writes later."""
        if Effects.WRITES not in self.effects or self.role is Role.UPDATE:
            return ()
        return tuple(value for _, value in self.operands() if value.op.is_state)


def _values(arg: Argument, path: Path) -> Iterator[tuple[Path, Value]]:
    if isinstance(arg, Value):
        yield path, arg
    elif isinstance(arg, tuple):
        for index, item in enumerate(arg):
            yield from _values(item, (*path, index))


def quote(text: str) -> str:
    """A JSON string on one line, with unprintable characters escaped."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def map_tree(function: Callable[[Any], Any], arg: Any) -> Any:
    """The same tree with `function` applied to every leaf."""
    if isinstance(arg, tuple):
        return tuple(map_tree(function, item) for item in arg)
    return function(arg)


def print_op(op: Op, *, locations: bool = True) -> str:
    """One operation on one line."""
    args = ", ".join(map(print_argument, op.args))
    if op.name == "core.return":
        return f"return {args}".rstrip()
    head = f"{', '.join(map(str, op.results))} = " if op.results else ""
    attrs = ", ".join(f"{key} = {print_argument(op.attrs[key])}" for key in sorted(op.attrs))
    text = f"{head}{op.name}({args})"
    text += f" {{{attrs}}}" if attrs else ""
    text += f" : {', '.join(str(value.type) for value in op.results)}" if op.results else ""
    return f"{text} {op.loc}" if locations and str(op.loc) else text


def print_argument(arg: Argument) -> str:
    """A value, a literal, or a list of them."""
    if isinstance(arg, tuple):
        return f"[{', '.join(map(print_argument, arg))}]"
    if arg is None or isinstance(arg, bool):
        return {None: "None", True: "true", False: "false"}[arg]
    if isinstance(arg, str):
        return quote(arg)
    return repr(arg) if isinstance(arg, int | float) else str(arg)
