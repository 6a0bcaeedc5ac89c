"""Holds the keys of a quantization configuration to those that are known, each with the values that are right.

A key that no reader knows may change what the weights mean, as a rotation does, so it is an error unless it is empty.

    KEYS = {"num_bits": one_of(8), "observer": ANY}
    check_keys({"num_bits": 8, "rotation": "hadamard"}, KEYS, "the weights of group 'g'")    # error: 'rotation'
"""

from collections.abc import Callable, Mapping
from typing import Any

from qcompiler.errors import QCompilerError, did_you_mean

LONGEST = 80  # characters of a value in a message

Need = Callable[[Any], str | None]
"""From the value of a key to what is needed in its place; None if the value is right."""


def ANY(value: Any) -> str | None:  # noqa: N802  (a constant of the tables)
    """Every value: the key is read elsewhere, or says nothing of the weights."""
    return None


def one_of(*values: Any) -> Need:
    """Some values; true is not 1."""

    def need(value: Any) -> str | None:
        if any(type(value) is type(known) and value == known for known in values):
            return None
        return " or ".join(map(repr, values))

    return need


def nothing(value: Any) -> str | None:
    """No value: the key is known and means what is not supported."""
    return "null"


def check_keys(said: Mapping[str, Any], known: Mapping[str, Need], what: str) -> None:
    """QCompilerError for the first key that is not known, or has a value that is not supported.

    Args:
        said: One object of a quantization configuration.
        known: Key -> the values that are right. A key that is null or an empty list or object is right in any case.
        what: The object, for the message.
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
