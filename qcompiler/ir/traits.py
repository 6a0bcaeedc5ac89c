"""What is known of an operation by its name alone: its parameters, its role and its effects.

    traits_of("quant.dequantize").positions     {"data": 0, "scale": 1}
    traits_of("quant.dequantize").role          Role.DEQUANTIZE
    traits_of("aten.bernoulli").effects         Effects.RANDOM

Declared operations have traits in the table. Torch's operations get them from a resolver, which reads their schemas.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, Flag, auto
from typing import Any


class Role(Enum):
    """What an operation is to passes and reports, whatever its name; the names of its operands are those used here."""

    STATE = "reads a parameter or a buffer from the weights store"
    VIEW = "arranges the elements of x anew, or takes a part of them"
    CAST = "converts the element type of x"
    MATMUL = "multiplies x by w in floating point"
    QUANTIZED_MATMUL = "multiplies codes and scales: x, x_scale, w, w_scale"
    QUANTIZE = "gives the codes of x, and their scales unless it has an operand scale"
    DEQUANTIZE = "multiplies data, which are codes, by their scale"


class Effects(Flag):
    """What an operation does beyond computing results from its operands, and what else its results depend on."""

    PURE = 0
    READS = auto()
    """The results depend on state, such as a buffer: on what it holds when the call begins."""
    WRITES = auto()
    """It changes state: a buffer, an operand, or something outside of the process."""
    COMMUNICATES = auto()
    """It exchanges data with other processes, which must all take part, in the same order."""
    RANDOM = auto()
    """It draws random numbers; without it, later operations would draw others."""
    CONTROLS = auto()
    """It belongs to the call itself: an argument, the return, or a check that raises an error."""
    UNDEFINED = auto()
    """The elements of the results are whatever memory holds."""

    @property
    def ordered(self) -> bool:
        """Whether it must happen, in the order of the graph: it is neither removed nor moved, even if unused."""
        return bool(self & (Effects.WRITES | Effects.COMMUNICATES | Effects.RANDOM | Effects.CONTROLS))

    @property
    def repeatable(self) -> bool:
        """Whether equal operands always give equal results: it may be evaluated early, or shared by its users."""
        return self is Effects.PURE


@dataclass(frozen=True)
class Traits:
    """What is known of an operation by its name.

    Attributes:
        positions: Parameter -> its place among the arguments; the others are given by name, as attributes.
        defaults: Parameter -> the literal that it has when it is left out.
        aliases: What the role calls a parameter -> what torch's schema calls it.
        rest: Place of the first argument without a name; None if all arguments have names.
        role: What it is to a pass; None for anything that no pass treats specially.
        effects: What it does beyond computing results.
    """

    positions: Mapping[str, int] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    rest: int | None = None
    role: Role | None = None
    effects: Effects = Effects.PURE


UNKNOWN = Traits(rest=0, effects=Effects.READS | Effects.WRITES)
"""An operation that nothing declares may do anything."""

_KNOWN: dict[str, Traits] = {}
_RESOLVERS: list[Callable[[str], Traits | None]] = []


def set_traits(name: str, traits: Traits) -> None:
    """Makes the traits of a declared operation known."""
    _KNOWN[name] = traits


def add_resolver(resolver: Callable[[str], Traits | None]) -> None:
    """Adds a function that gives the traits of operations that are not declared, or None; answers are kept."""
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
