"""The operation table: each operation is declared once, with its type rule and torch definition.

A dialect module calls `declare` for its operations. Torch's namespaces (aten, prims and others) are open:
`declare_open_namespaces` registers a resolver for their traits, and their types are recorded by capture.
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
    """An operation violates its declaration; `operand` is the name or index of the argument at fault, if any."""

    def __init__(self, problem: str, operand: int | str | None = None) -> None:
        super().__init__(problem)
        self.operand = operand


AttributeCheck = Callable[[Argument], bool]
TypeRule = Callable[[Op], tuple[Type, ...]]
Meaning = Callable[..., Any]


@dataclass(frozen=True)
class OpDef:
    """The declaration of an operation.

    Attributes:
        name: `dialect.op`.
        doc: One sentence.
        operands: Names of the arguments, each a value; a name ending in `?` may be None, `*` accepts any trees.
        attributes: Name -> (check, description of accepted values); all are required.
        optional: The same for optional attributes.
        types: Result types from the operands and attributes; None if the declared types are used as given.
        meaning: The operation in plain torch: operands in order, attributes as keyword arguments.
        role: Its role in passes; None if no pass treats it specially.
        effects: Its side effects.
        implements: The operation that `to-kernels` replaces by this one: the same function of the same operands and
            attributes, except that formats also give the memory layout of scales.
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
    implements: str | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The named operands."""
        return tuple(name.removesuffix("?") for name in self.operands if name != "*")

    @property
    def traits(self) -> Traits:
        """The traits that follow from this declaration."""
        rest = len(self.named) if "*" in self.operands else None
        positions = {name: index for index, name in enumerate(self.named)}
        defaults = dict.fromkeys((*self.attributes, *self.optional))
        return Traits(positions, defaults, rest=rest, role=self.role, effects=self.effects)


_TABLE: dict[str, OpDef] = {}
_DIALECTS: set[str] = set()
_OPEN: list["OpenNamespaces"] = []


@dataclass(frozen=True)
class OpenNamespaces:
    """A source of operations outside the table.

    Attributes:
        traits: Returns the traits of an operation; None if it is unknown.
        names: Returns candidates for did-you-mean hints.
    """

    traits: Callable[[str], Traits | None]
    names: Callable[[], Iterable[str]]


def declare(definition: OpDef) -> OpDef:
    """Adds an operation to the table; raises QCompilerError if another declaration has the same name."""
    if _TABLE.setdefault(definition.name, definition) is not definition:
        raise QCompilerError("an operation is declared twice", got=definition.name, need="an unused name")
    _DIALECTS.add(definition.name.split(".")[0])
    set_traits(definition.name, definition.traits)
    return definition


def declare_open_namespaces(namespaces: OpenNamespaces) -> None:
    """Allows operations outside the table."""
    _OPEN.append(namespaces)
    add_resolver(namespaces.traits)


def lookup(name: str) -> OpDef | None:
    """The declaration of an operation in the table, or None."""
    return _TABLE.get(name)


def declared(role: Role | None = None) -> list[OpDef]:
    """All declarations, or the ones with a given role, sorted by name."""
    return [_TABLE[name] for name in sorted(_TABLE) if role is None or _TABLE[name].role is role]


def implementation_of(name: str) -> OpDef | None:
    """The declaration that implements an operation, or None."""
    return next((definition for definition in _TABLE.values() if definition.implements == name), None)


def is_known(name: str) -> bool:
    """Whether an operation is declared or belongs to an open namespace."""
    return name in _TABLE or (name.split(".")[0] not in _DIALECTS and traits_of(name) is not UNKNOWN)


def is_ours(name: str) -> bool:
    """Whether an operation of this name would belong to one of our dialects or to `aten`: nothing else declares it."""
    return name.split(".")[0] in _DIALECTS | {"aten"}


def unknown_op(name: str) -> str:
    """The error message for an unknown operation."""
    names = list(_TABLE)
    if name.split(".")[0] not in _DIALECTS:
        names += [candidate for space in _OPEN for candidate in space.names()]
    hint = nearest(name.removesuffix(".default"), names) or f"Known dialects: {dialects()}."
    return f"unknown operation '{name}'. {hint}"


def dialects() -> str:
    """The names of the dialects, for messages."""
    return ", ".join(sorted(_DIALECTS | {"aten"}))


def infer_types(op: Op) -> tuple[Type, ...]:
    """The result types by the operation's type rule; raises OpError if it has none or the operands are invalid."""
    definition = lookup(op.name)
    if definition is None or definition.types is None:
        raise OpError(f"{op.name} has no type rule, so its result types must be given")
    check_signature(op, definition)
    return definition.types(op)


def check_signature(op: Op, definition: OpDef) -> None:
    """Checks the arguments and attributes against the declaration; raises OpError."""
    _check_operands(op, definition.operands)
    if missing := sorted(set(definition.attributes) - set(op.attrs)):
        raise OpError(f"attribute '{missing[0]}' is missing; it must be {definition.attributes[missing[0]][1]}")
    legal = {**definition.attributes, **definition.optional}
    for key, value in op.attrs.items():
        if key not in legal:
            raise OpError(f"{op.name} has no attribute '{key}'. {did_you_mean(key, legal)}")
        check, words = legal[key]
        if not check(value):
            raise OpError(f"attribute '{key}' is {print_argument(value)}, but {op.name} expects {words}")


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


# Attribute checks, each with a description of the accepted values

TEXT: tuple[AttributeCheck, str] = (lambda a: isinstance(a, str), "a string")
INTEGER: tuple[AttributeCheck, str] = (lambda a: isinstance(a, int) and not isinstance(a, bool), "an integer")
BOOLEAN: tuple[AttributeCheck, str] = (lambda a: isinstance(a, bool), "true or false")
DTYPE: tuple[AttributeCheck, str] = (lambda a: isinstance(a, DType), "a dtype such as bf16")


__all__ = [
    "BOOLEAN", "DTYPE", "INTEGER", "TEXT", "OpDef", "OpError", "OpenNamespaces", "Tag", "check_signature",
    "declare", "declare_open_namespaces", "declared", "dialects", "implementation_of", "infer_types", "is_known",
    "lookup", "unknown_op",
]  # fmt: skip
