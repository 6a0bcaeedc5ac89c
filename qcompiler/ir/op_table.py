"""The table of operations: each declared once, as data, with its type rule and its meaning.

A dialect file calls `declare` for its operations. Namespaces that are not ours (aten, and whatever else torch knows)
are open: `declare_open_namespaces` hands over a resolver, and their types are what capture recorded.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qcompiler.errors import QCompilerError, did_you_mean
from qcompiler.ir.names import nearest
from qcompiler.ir.op import Argument, Op, Tag, Value, print_argument
from qcompiler.ir.traits import UNKNOWN, Effects, Role, Traits, add_resolver, set_traits, traits_of
from qcompiler.ir.types import DType, Type


class OpError(QCompilerError):
    """An operation breaks its own declaration; `operand` is the name or index of the guilty argument, if any."""

    def __init__(self, problem: str, operand: int | str | None = None) -> None:
        super().__init__(problem)
        self.operand = operand


AttributeCheck = Callable[[Argument], bool]
TypeRule = Callable[[Op], tuple[Type, ...]]
Meaning = Callable[..., Any]


@dataclass(frozen=True)
class OpDef:
    """What an operation is.

    Attributes:
        name: `dialect.op`.
        doc: One sentence.
        operands: Names of the arguments, each a value; a name that ends with `?` may be None, `*` takes any tree.
        attributes: Name -> (check, what the check wants in words); each must be given.
        optional: The same for attributes that may be left out.
        types: Result types from the operands and attributes; None where the declared types are taken as they are.
        meaning: The operation in plain torch: operands in order, attributes as keyword arguments.
        role: What the operation is to a pass; None for anything that no pass treats specially.
        effects: What it does beyond computing results.
    """

    name: str
    doc: str
    operands: tuple[str, ...] = ()
    attributes: Mapping[str, tuple[AttributeCheck, str]] = field(default_factory=dict)
    optional: Mapping[str, tuple[AttributeCheck, str]] = field(default_factory=dict)
    types: TypeRule | None = None
    meaning: Meaning | None = None
    role: Role | None = None
    effects: Effects = Effects.PURE

    @property
    def named(self) -> tuple[str, ...]:
        """The operands that have names."""
        return tuple(name.removesuffix("?") for name in self.operands if name != "*")

    @property
    def traits(self) -> Traits:
        """What is known of the operation by its name."""
        rest = len(self.named) if "*" in self.operands else None
        positions = {name: index for index, name in enumerate(self.named)}
        defaults = dict.fromkeys((*self.attributes, *self.optional))
        return Traits(positions, defaults, rest=rest, role=self.role, effects=self.effects)


_TABLE: dict[str, OpDef] = {}
_DIALECTS: set[str] = set()
_OPEN: list["OpenNamespaces"] = []


@dataclass(frozen=True)
class OpenNamespaces:
    """What somebody else knows about operations outside of the table.

    Attributes:
        traits: The traits of an operation; None if it is not legal.
        names: Candidates for did-you-mean.
    """

    traits: Callable[[str], Traits | None]
    names: Callable[[], Iterable[str]]


def declare(definition: OpDef) -> OpDef:
    """Adds an operation to the table; QCompilerError when the name is taken by another declaration."""
    if _TABLE.setdefault(definition.name, definition) is not definition:
        raise QCompilerError("an operation is declared twice", got=definition.name, need="a name that is free")
    _DIALECTS.add(definition.name.split(".")[0])
    set_traits(definition.name, definition.traits)
    return definition


def declare_open_namespaces(namespaces: OpenNamespaces) -> None:
    """Makes operations outside of the table legal."""
    _OPEN.append(namespaces)
    add_resolver(namespaces.traits)


def lookup(name: str) -> OpDef | None:
    """The declaration of an operation of ours, or None."""
    return _TABLE.get(name)


def declared(role: Role | None = None) -> list[OpDef]:
    """Every declaration, or those with a role, sorted by name."""
    return [_TABLE[name] for name in sorted(_TABLE) if role is None or _TABLE[name].role is role]


def is_known(name: str) -> bool:
    """Whether an operation is declared or belongs to an open namespace."""
    return name in _TABLE or (name.split(".")[0] not in _DIALECTS and traits_of(name) is not UNKNOWN)


def unknown_op(name: str) -> str:
    """The sentence for an operation that is not known."""
    names = list(_TABLE)
    if name.split(".")[0] not in _DIALECTS:
        names += [candidate for space in _OPEN for candidate in space.names()]
    return f"unknown operation '{name}'. {nearest(name, names) or f'Known dialects: {dialects()}.'}"


def dialects() -> str:
    """The names of the dialects, for messages."""
    return ", ".join(sorted(_DIALECTS | {"aten"}))


def infer_types(op: Op) -> tuple[Type, ...]:
    """The result types by the operation's own rule; OpError when it has none, or its operands are wrong."""
    definition = lookup(op.name)
    if definition is None or definition.types is None:
        raise OpError(f"{op.name} has no type rule, so its result types must be given")
    check_signature(op, definition)
    return definition.types(op)


def check_signature(op: Op, definition: OpDef) -> None:
    """Holds the arguments and attributes to their declaration; OpError otherwise."""
    _check_operands(op, definition.operands)
    if missing := sorted(set(definition.attributes) - set(op.attrs)):
        raise OpError(f"attribute '{missing[0]}' is missing; it wants {definition.attributes[missing[0]][1]}")
    legal = {**definition.attributes, **definition.optional}
    for key, value in op.attrs.items():
        if key not in legal:
            raise OpError(f"{op.name} has no attribute '{key}'. {did_you_mean(key, legal)}")
        check, words = legal[key]
        if not check(value):
            raise OpError(f"attribute '{key}' is {print_argument(value)}, but {op.name} wants {words}")


def _check_operands(op: Op, operands: tuple[str, ...]) -> None:
    named, open_end = [name for name in operands if name != "*"], "*" in operands
    required = sum(not name.endswith("?") for name in named)
    if not (required <= len(op.args) and (open_end or len(op.args) <= len(named))):
        most = "or more" if open_end else f"to {len(named)}"
        wanted = str(required) if required == len(operands) else f"{required} {most}"
        raise OpError(f"{op.name} takes {wanted} arguments ({', '.join(operands)}), but got {len(op.args)}")
    for index, (name, arg) in enumerate(zip(named, op.args, strict=False)):
        if not isinstance(arg, Value) and not (arg is None and name.endswith("?")):
            raise OpError(f"argument '{name}' of {op.name} must be a value, but is {print_argument(arg)}", index)


# Checks for attributes, each with its words

TEXT: tuple[AttributeCheck, str] = (lambda a: isinstance(a, str), "a string")
INTEGER: tuple[AttributeCheck, str] = (lambda a: isinstance(a, int) and not isinstance(a, bool), "an integer")
BOOLEAN: tuple[AttributeCheck, str] = (lambda a: isinstance(a, bool), "true or false")
DTYPE: tuple[AttributeCheck, str] = (lambda a: isinstance(a, DType), "a dtype such as bf16")


__all__ = [
    "BOOLEAN", "DTYPE", "INTEGER", "TEXT", "OpDef", "OpError", "OpenNamespaces", "Tag", "check_signature",
    "declare", "declare_open_namespaces", "declared", "dialects", "infer_types", "is_known", "lookup",
    "unknown_op",
]  # fmt: skip
