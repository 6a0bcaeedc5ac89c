"""Traits of an operation, looked up by name: its parameters, role, and effects.

    traits_of("quant.dequantize").positions     {"data": 0, "scale": 1}
    traits_of("quant.dequantize").role          Role.DEQUANTIZE
    traits_of("aten.bernoulli").effects         Effects.RANDOM

Declared operations have traits in the table. A resolver derives the traits of torch operations from their schemas.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, Flag, auto
from typing import Any


class Role(Enum):
    """The role of an operation in passes and reports; the operand names below are the ones that passes use."""

    STATE = "reads a parameter or a buffer from the weights store, or a cache of the caller"
    UPDATE = "writes value to target, a buffer or an input, at the end of the call"
    VIEW = "rearranges the elements of x, or selects some of them"
    CAST = "converts the element type of x"
    MATMUL = "multiplies x by w in floating point"
    QUANTIZED_MATMUL = "multiplies codes and scales: x, x_scale, w, w_scale"
    QUANTIZE = "returns the codes of x, and their scales unless it has a scale operand"
    DEQUANTIZE = "multiplies data (the codes) by their scale"


class Effects(Flag):
    """Side effects of an operation, and inputs other than its operands."""

    PURE = 0
    READS = auto()
    """The results depend on state, such as the contents of a buffer or a cache."""
    WRITES = auto()
    """It changes state: a buffer, an operand, or something outside the process; at once, unless its role is UPDATE."""
    COMMUNICATES = auto()
    """It communicates with other processes, which must all participate in the same order."""
    RANDOM = auto()
    """It draws random numbers; removing it would change what later operations draw."""
    CONTROLS = auto()
    """It is part of the call: an argument, the return, or a check that raises an error."""
    UNDEFINED = auto()
    """The results are uninitialized memory."""

    @property
    def ordered(self) -> bool:
        """Whether it must run, in graph order: it must not be removed or moved, even if unused."""
        return bool(self & (Effects.WRITES | Effects.COMMUNICATES | Effects.RANDOM | Effects.CONTROLS))

    @property
    def repeatable(self) -> bool:
        """Whether equal operands always give equal results, so it may be constant-folded or deduplicated."""
        return self is Effects.PURE


@dataclass(frozen=True)
class Traits:
    """Properties of an operation that follow from its name.

    Attributes:
        positions: Parameter -> its index in the arguments; other parameters are passed by name, as attributes.
        defaults: Parameter -> its default literal.
        aliases: Parameter name in the role -> parameter name in torch's schema.
        rest: Index of the first unnamed argument; None if all arguments have names.
        role: Its role in passes; None if no pass treats it specially.
        effects: Its side effects.
    """

    positions: Mapping[str, int] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    rest: int | None = None
    role: Role | None = None
    effects: Effects = Effects.PURE


UNKNOWN = Traits(rest=0, effects=Effects.READS | Effects.WRITES)
"""Traits of an undeclared operation: it may have any effect."""

_KNOWN: dict[str, Traits] = {}
_RESOLVERS: list[Callable[[str], Traits | None]] = []


def set_traits(name: str, traits: Traits) -> None:
    """Registers the traits of a declared operation."""
    _KNOWN[name] = traits


def add_resolver(resolver: Callable[[str], Traits | None]) -> None:
    """Adds a function that returns the traits of an undeclared operation, or None; results are cached."""
    _RESOLVERS.append(resolver)


def traits_of(name: str) -> Traits:
    """The traits of an operation; `UNKNOWN` if it is neither declared nor resolved."""
    known = _KNOWN.get(name)
    if known is None:
        known = next(filter(None, (resolve(name) for resolve in _RESOLVERS)), None)
        if known is None:
            return UNKNOWN
        _KNOWN[name] = known
    return known
