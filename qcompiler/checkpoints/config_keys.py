"""Checks the keys and values of a quantization configuration against tables of known ones.

An unknown key may change the meaning of the weights, as a rotation does, so it is an error unless its value is empty.

    KEYS = {"num_bits": one_of(8), "observer": ANY}
    check_keys({"num_bits": 8, "rotation": "hadamard"}, KEYS, "the weights of group 'g'")    # error: 'rotation'
"""

from collections.abc import Callable, Mapping
from typing import Any

from qcompiler.errors import QCompilerError, did_you_mean

LONGEST = 80  # characters of a value in a message

Need = Callable[[Any], str | None]
"""Maps the value of a key to a description of valid values; None if the value is valid."""


def ANY(value: Any) -> str | None:  # noqa: N802  (a constant of the tables)
    """Accepts every value: the key is read elsewhere, or does not affect weights."""
    return None


def one_of(*values: Any) -> Need:
    """Accepts some values; true does not match 1."""

    def need(value: Any) -> str | None:
        if any(type(value) is type(known) and value == known for known in values):
            return None
        return " or ".join(map(repr, values))

    return need


def nothing(value: Any) -> str | None:
    """Accepts no value: the key is known, but not supported."""
    return "null"


def check_keys(said: Mapping[str, Any], known: Mapping[str, Need], what: str) -> None:
    """Raises QCompilerError for the first key that is unknown or has an unsupported value.

    Args:
        said: One object of a quantization configuration.
        known: Key -> valid values. Null and an empty list or object are always valid.
        what: Name of the object, for the message.
    """
    for key, value in said.items():
        if value is None or value == [] or value == {}:
            continue
        if key not in known:
            fix = f"It may change what the weights mean; remove it if it does not. {did_you_mean(key, known)}"
            raise QCompilerError(f"{what}: the key '{key}' is not known", got=_short(value), fix=fix)
        if (need := known[key](value)) is not None:
            raise QCompilerError(f"{what}: '{key}' has a value that is not supported", got=_short(value), need=need)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
