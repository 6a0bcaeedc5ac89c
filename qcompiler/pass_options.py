"""The options of a pass: fields of a dataclass, held to their type hints, in Python and in text.

    {profile=deepgemm, x_block=[1, 64]}

A value is a literal of the graph IR, or a bare word where a string is wanted.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qcompiler.errors import ParseError, PassError, did_you_mean
from qcompiler.ir import DType, parse_literal, print_argument
from qcompiler.ir.lexer import Source

WORD = re.compile(r"[A-Za-z][\w-]*")
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
CLOSING = {"{": "}", "[": "]", "(": ")"}


def default_of(option: "Field[Any]") -> Any:
    """The default of an option; MISSING when it must be given."""
    return option.default_factory() if option.default_factory is not MISSING else option.default


def print_option(value: Any) -> str:
    """An option's value as text: a string goes without quotes where it cannot be taken for a literal."""
    return (
        value
        if isinstance(value, str) and WORD.fullmatch(value) and _literal(value) is MISSING
        else print_argument(value)
    )


def _literal(text: str) -> Any:
    """The literal that `text` spells, or MISSING."""
    try:
        return parse_literal(text)
    except ParseError:
        return MISSING


def read_options(kind: Any, owner: str, names: Iterable[str], source: Source, start: int, end: int) -> dict[str, Any]:
    """The values in a stretch of text, `option=value, option=value`, by option.

    Args:
        kind: The dataclass whose fields the options are.
        owner: What has them, for messages: "pass 'fp8-tile'".
        names: The fields that may be given.
        source: The text.
        start: Where the options begin in it.
        end: Where they end.

    Raises:
        ParseError: The text is malformed.
        PassError: An option is unknown, or its value is wrong.
    """
    known = {option.name: option for option in fields(kind) if option.name in set(names)}
    given: dict[str, Any] = {}
    for first, last in parts(source, start, end, ","):
        key, equals, value = (part.strip() for part in source.text[first:last].partition("="))
        option = known.get(key.replace("-", "_"))
        if option is None:
            fix = did_you_mean(key, known) if known else "It has none."
            raise PassError(f"{owner} has no such option", got=repr(key), fix=fix)
        if not equals or not value or option.name in given:
            problem = f"option '{key}' is given twice" if option.name in given else f"option '{key}' has no value"
            raise source.error(problem, first, last - first)
        given[option.name] = read_option(kind, owner, option, value)
    return given


def read_option(kind: Any, owner: str, option: "Field[Any]", text: str) -> Any:
    """The value that `text` spells: a literal if that fits, else a bare word."""
    for value in (_literal(text), text if WORD.fullmatch(text) else MISSING):
        try:
            if value is not MISSING:
                return converted(value, hint_of(kind, option.name))
        except ValueError:
            continue
    raise wrong_value(kind, owner, option, text)


def hint_of(kind: Any, name: str) -> Any:
    """The type hint of an option; Any where it cannot be told."""
    try:
        return get_type_hints(kind).get(name, Any)
    except NameError:  # a class inside a function, with names that only the function knows
        return Any


def converted(value: Any, hint: Any) -> Any:
    """`value` as the type hint wants it: lists as tuples, integers as floats; ValueError when it does not fit."""
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
    elif hint is type(value) or (hint is None and value is None):
        return value
    raise ValueError(value)


def wrong_value(kind: Any, owner: str, option: "Field[Any]", got: str) -> PassError:
    """The error for a value that does not fit, with what would."""
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
    if get_origin(hint) is tuple:
        return f"[{', '.join('…' if inner is ... else _in_words(inner) for inner in get_args(hint))}]"
    if get_origin(hint) is Literal:
        return " or ".join(map(print_option, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_in_words, get_args(hint)))
    return words.get(hint, str(hint))


def parts(source: Source, start: int, end: int, mark: str) -> Iterator[tuple[int, int]]:
    """The stretches between marks that stand outside of brackets and strings, without space around them."""
    text, opened, begin, at = source.text, list[int](), start, start
    cuts = []
    while at < end:
        character = text[at]
        if character == '"':
            if (string := STRING.match(text, at, end)) is None:
                raise source.error("this string does not end", at)
            at = string.end()
            continue
        if character in CLOSING:
            opened.append(at)
        elif character in CLOSING.values():
            if not opened or CLOSING[text[opened.pop()]] != character:
                raise source.error(f"'{character}' closes no bracket", at)
        elif character == mark and not opened:
            cuts.append((begin, at))
            begin = at + 1
        at += 1
    if opened:
        raise source.error(f"'{text[opened[-1]]}' is not closed", opened[-1])
    for first, last in [*cuts, (begin, end)]:
        inner = text[first:last]
        if inner.strip():
            yield first + len(inner) - len(inner.lstrip()), first + len(inner.rstrip())
