"""Pass options: dataclass fields, checked against their type hints, with a text form.

    pipeline := [pass] {';' [pass]}
    pass     := word ['{' [option] {',' [option]} '}']
    option   := word '=' (value | word)

A word is a name with dashes, such as `fp8-tile`; as a value, it is a string if the option accepts one. Schemes use the
same syntax as passes.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qcompiler.errors import PassError, did_you_mean
from qcompiler.ir import Argument, DType, Format, print_argument
from qcompiler.ir.formats import FORMATS
from qcompiler.ir.literals import LiteralReader
from qcompiler.text import WORDS, Token

WORD = re.compile(r"[A-Za-z][\w-]*")
"""Strings that do not need quotes, and valid pass names."""

DASHED = re.compile(r"[\w-]+")
DOTTED = re.compile(r"[\w.-]+")


def default_of(option: "Field[Any]") -> Any:
    """The default of an option; MISSING if it is required."""
    return option.default_factory() if option.default_factory is not MISSING else option.default


def print_option(value: Any) -> str:
    """An option's value as text; a string has no quotes unless it could be read as a literal."""
    bare = isinstance(value, str) and WORD.fullmatch(value) and _meaning(value) is MISSING
    return value if bare else print_argument(value)


def _meaning(name: str) -> Any:
    """The literal that a name spells; MISSING if it is not a literal."""
    return WORDS[name] if name in WORDS else DType.__members__.get(name, MISSING)


class OptionReader(LiteralReader):
    """Reads `name{option=value, option=value}`, with dashes in names."""

    def named(self, token: Token) -> Argument:
        """The dtype of a name inside a list."""
        if token.text not in DType.__members__:
            raise self.fail(f"'{token.text}' is not a literal; a string inside a list needs quotes", token)
        return DType[token.text]

    def options(self, kind: Any, owner: str, names: Iterable[str]) -> dict[str, Any]:
        """Reads options in braces, by field name; empty if there are no braces.

        Args:
            kind: The dataclass whose fields are the options.
            owner: The owner of the options, for messages: "pass 'fp8-tile'".
            names: The fields that may be given.

        Raises:
            ParseError: The text is malformed.
            PassError: An option is unknown, or its value is invalid.
        """
        given: dict[str, Any] = {}
        if self.accept("{"):
            known = {option.name: option for option in fields(kind) if option.name in set(names)}
            self.separated(lambda: self._option(kind, owner, known, given), ",", "}")
        elif self.now.kind == "name":
            raise self.fail("options must be in braces: {option=value, option=value}", self.now)
        return given

    def _option(self, kind: Any, owner: str, known: "Mapping[str, Field[Any]]", given: dict[str, Any]) -> None:
        key = self.word(DASHED, "the name of an option")
        option = known.get(key.text.replace("-", "_"))
        with self.blaming(key):
            if option is None:
                fix = did_you_mean(key.text, known) if known else "It has no options."
                raise PassError(f"{owner} has no such option", got=repr(key.text), fix=fix)
        if option.name in given:
            raise self.fail(f"option '{key.text}' is given twice", key)
        if not self.accept("=") or self.now.text in (",", "}"):
            raise self.fail(f"option '{key.text}' has no value", key)
        start = self.now
        if start.kind == "name":
            text = self.word(DOTTED, "a value").text
            meanings = (_meaning(text), text if WORD.fullmatch(text) else MISSING)
        else:
            meanings = (self.value(), MISSING)
        with self.blaming(self.since(start)):
            given[option.name] = _fitting(meanings, kind, owner, option, self.since(start).text)


def _fitting(meanings: Iterable[Any], kind: Any, owner: str, option: "Field[Any]", text: str) -> Any:
    """The first meaning of a text that the option's type hint allows; raises PassError if there is none."""
    for value in meanings:
        try:
            if value is not MISSING:
                return converted(value, hint_of(kind, option.name))
        except ValueError:
            continue
    raise wrong_value(kind, owner, option, text)


def hint_of(kind: Any, name: str) -> Any:
    """The type hint of an option; Any if it cannot be resolved."""
    try:
        return get_type_hints(kind).get(name, Any)
    except NameError:  # a class inside a function, with local names in its hints
        return Any


def converted(value: Any, hint: Any) -> Any:
    """Converts `value` to the type hint: lists to tuples, integers to floats, names to formats.

    Raises ValueError on a mismatch.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal and value in inner:
        return value
    if origin in (Union, UnionType):
        for choice in inner:
            try:
                return converted(value, choice)
            except ValueError:
                continue
    elif origin is tuple and isinstance(value, tuple | list):
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return tuple(converted(item, kind) for item, kind in zip(value, kinds, strict=True))
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint is Format and isinstance(value, str) and value in FORMATS:
        return FORMATS[value]
    elif hint is type(value) or (hint is None and value is None):
        return value
    raise ValueError(value)


def convert_options(made: Any, owner: str) -> None:
    """Converts the fields of a frozen dataclass to their type hints; raises PassError for a wrong value.

    Args:
        made: Called in its `__post_init__`.
        owner: The owner of the options, for messages: "pass 'fp8-tile'".
    """
    for option in fields(made):
        value = getattr(made, option.name)
        try:
            object.__setattr__(made, option.name, converted(value, hint_of(type(made), option.name)))
        except ValueError:
            raise wrong_value(type(made), owner, option, repr(value)) from None


def wrong_value(kind: Any, owner: str, option: "Field[Any]", got: str) -> PassError:
    """The error for an invalid value, with the accepted values."""
    hint, default = hint_of(kind, option.name), default_of(option)
    fix = None
    if get_origin(hint) is Literal:
        need = "one of " + ", ".join(map(print_option, get_args(hint)))
    else:
        need = _in_words(hint)
        fix = f"The default is {print_option(default)}." if default is not MISSING else None
    return PassError(f"option '{option.name}' of {owner} has a wrong value", got=got, need=need, fix=fix)


def _in_words(hint: Any) -> str:
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a word or a string", NoneType: "None"}
    if hint is DType:
        return "a dtype such as bf16"
    if hint is Format:
        return "a format such as #fp8_tile"
    if get_origin(hint) is tuple:
        return f"[{', '.join('…' if inner is ... else _in_words(inner) for inner in get_args(hint))}]"
    if get_origin(hint) is Literal:
        return " or ".join(map(print_option, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_in_words, get_args(hint)))
    return words.get(hint, str(hint))
