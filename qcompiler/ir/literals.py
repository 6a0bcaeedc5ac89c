"""Text -> literals and types of the graph IR.

    type     := tensor | ('int'|'float'|'bool') ['(' size ')'] | 'none' | cache
    tensor   := dtype '[' [size {',' size}] ']' ['<' placed {',' placed} '>']
    placed   := name '=' ('shard' | 'partial') '(' name '=' integer {',' name '=' integer} ')'
    size     := ['-'] term {('+' | '-') term}
    term     := factor {('*' | '//') factor}
    factor   := integer | symbol | function '(' size {',' size} ')' | '(' size ')'

    format   := '#' name ['<' [field {',' field}] '>']
    field    := dtype | name '=' value
    cache    := 'cache' '<' (dtype | format) {',' name '=' integer} '>'

A literal is a value in which a bare name is a dtype, and `#name` is a number format or a tag.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from qcompiler.errors import ParseError, QCompilerError, did_you_mean
from qcompiler.ir.cache_type import CacheType, read_cache
from qcompiler.ir.formats import FORMATS, Format, read_format
from qcompiler.ir.op import Argument, Tag
from qcompiler.ir.sharding import Placement, read_placement
from qcompiler.ir.sizes import Size, read_size
from qcompiler.ir.types import NONE, DType, ScalarType, TensorType, Type
from qcompiler.text import Source, Token, ValueReader


def parse_literal(text: str) -> Argument:
    """Parses a literal; raises ParseError if `text` is not a literal."""
    reader = LiteralReader(Source(text, "<option>"))
    value: Argument = reader.value()
    reader.expect_end()
    return value


@cache
def parse_format(text: str) -> Format:
    """Parses a format such as `#fp8_tile`; raises ParseError if `text` is not a format."""
    found = parse_literal(text)
    if not isinstance(found, Format):
        raise ParseError(f"{text!r} is not the name of a format. {did_you_mean(text.strip('#'), FORMATS)}")
    return found


def parse_type(text: str) -> Type:
    """Parses a type such as `f32[s0, 256]`; raises ParseError if `text` is not a type."""
    reader = LiteralReader(Source(text, "<type>"))
    found = reader.type()
    reader.expect_end()
    return found


class LiteralReader(ValueReader):
    """Reads literals and types."""

    def named(self, token: Token) -> Argument:
        """The dtype that a name spells."""
        return self.dtype(token)

    def tagged(self, token: Token) -> Argument:
        """`#fp8_tile`, `#fp8_tile<profile = "vllm">`, `#format<f8e4m3fn, block = [1, 64]>`; other names are tags."""
        name, fields = token.text[1:], dict[str, Argument]()
        if self.now.text != "<" and name not in FORMATS:
            return Tag(name)
        if self.accept("<"):
            self.list_of(lambda: self.field(fields), ">")
        try:
            return read_format(name, fields)
        except QCompilerError as error:
            raise self.fail(str(error), token) from None

    def field(self, fields: dict[str, Argument]) -> None:
        """Reads a field of a format into `fields`: `f8e4m3fn` (the element type) or `block = [1, 64]`."""
        key = self.expect_kind("name", "a field of a format, such as 'block'")
        named = self.accept("=")
        name = key.text if named else "element"
        if name in fields:
            raise self.fail(f"the {name} of a format is given twice", key)
        fields[name] = self.value() if named else self.dtype(key)

    def dtype(self, token: Token) -> DType:
        """The dtype that a name spells."""
        if token.text not in DType.__members__:
            raise self.fail(f"unknown dtype '{token.text}'. {did_you_mean(token.text, DType.__members__)}", token)
        return DType[token.text]

    def types(self) -> list[Type]:
        """One or more types, separated by commas."""
        found = [self.type()]
        while self.accept(","):
            found.append(self.type())
        return found

    def type(self) -> Type:
        """One type."""
        token = self.expect_kind("name", "a type")
        if token.text == "none":
            return NONE
        if token.text == "cache":
            return self.cache(token)
        if token.text in ("int", "float", "bool"):
            found = self.sizes("(", ")") if self.now.text == "(" else [None]
            if len(found) != 1:
                raise self.fail(f"{token.text} takes one size, not {len(found)}", token)
            return ScalarType(token.text, found[0])  # type: ignore[arg-type]  # one of the three, as just tested
        return self.tensor(self.dtype(token))

    def tensor(self, dtype: DType) -> TensorType:
        """The rest of `bf16[s0, 256]<tp = shard(axis = 1, parts = 2)>`, after the dtype."""
        shape, placed = tuple(self.sizes("[", "]")), dict[str, Placement]()
        if self.accept("<"):
            self.list_of(lambda: self.placement(placed), ">")
        return TensorType(dtype, shape, tuple(sorted(placed.items())))

    def placement(self, placed: dict[str, Placement]) -> None:
        """Reads `tp = shard(axis = 1, parts = 2)` into `placed`."""
        mesh = self.expect_kind("name", "an axis of the mesh, such as 'tp'")
        if mesh.text in placed:
            raise self.fail(f"the placement on '{mesh.text}' is given twice", mesh)
        self.expect("=")
        kind, fields = self.expect_kind("name", "a placement, such as 'shard'"), dict[str, int]()
        self.expect("(")
        self.list_of(lambda: self.placement_field(fields), ")")
        try:
            placed[mesh.text] = read_placement(kind.text, fields)
        except QCompilerError as error:
            raise self.fail(str(error), kind) from None

    def placement_field(self, fields: dict[str, int]) -> None:
        """Reads `axis = 1` into `fields`."""
        key = self.expect_kind("name", "a field of a placement, such as 'axis'")
        if key.text in fields:
            raise self.fail(f"the {key.text} of a placement is given twice", key)
        self.expect("=")
        fields[key.text] = self.integer(self.expect_kind("int", "an integer"))

    def cache(self, token: Token) -> CacheType:
        """The rest of `cache<bf16, slots = 16, …>`."""
        fields: dict[str, Any] = {}
        self.expect("<")
        self.list_of(lambda: self.cache_field(fields), ">")
        try:
            return read_cache(fields)
        except QCompilerError as error:
            raise self.fail(str(error), token) from None

    def cache_field(self, fields: dict[str, Any]) -> None:
        """Reads a field of a cache type into `fields`: `bf16` or `#fp8_row` (the element type), or `slots = 16`."""
        key, named = self.now, self.now.kind == "name" and self.now.text not in DType.__members__
        name = self.take().text if named else "element"
        if name in fields:
            raise self.fail(f"the {name} of a cache is given twice", key)
        if named:
            self.expect("=")
        fields[name] = self.value()

    def sizes(self, opening: str, closing: str) -> Sequence[Size]:
        """Sizes between brackets."""
        self.expect(opening)
        return self.list_of(lambda: read_size(self), closing)
