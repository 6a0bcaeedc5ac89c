"""Text -> literals and types of the graph IR.

    type     := dtype '[' [size {',' size}] ']' | ('int'|'float'|'bool') ['(' size ')'] | 'none'
    size     := ['-'] term {('+' | '-') term}
    term     := factor {('*' | '//') factor}
    factor   := integer | symbol | function '(' size {',' size} ')' | '(' size ')'

A literal is a value in which a name is a dtype and `#name` is a tag.
"""

from collections.abc import Sequence

from qcompiler.errors import did_you_mean
from qcompiler.ir.op import Argument, Tag
from qcompiler.ir.sizes import Size, read_size
from qcompiler.ir.types import NONE, DType, ScalarType, TensorType, Type
from qcompiler.text import Source, Token, ValueReader


def parse_literal(text: str) -> Argument:
    """The literal that `text` spells; ParseError if it is not a literal."""
    reader = LiteralReader(Source(text, "<option>"))
    value: Argument = reader.value()
    reader.expect_end()
    return value


def parse_type(text: str) -> Type:
    """The type that `text` spells, such as `f32[s0, 256]`; ParseError if it is not a type."""
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
        """`#contiguous_format`"""
        return Tag(token.text[1:])

    def dtype(self, token: Token) -> DType:
        """The dtype that a name spells."""
        if token.text not in DType.__members__:
            raise self.fail(f"unknown dtype '{token.text}'. {did_you_mean(token.text, DType.__members__)}", token)
        return DType[token.text]

    def types(self) -> list[Type]:
        """One type or more, with commas between."""
        found = [self.type()]
        while self.accept(","):
            found.append(self.type())
        return found

    def type(self) -> Type:
        """One type."""
        token = self.expect_kind("name", "a type")
        if token.text == "none":
            return NONE
        if token.text in ("int", "float", "bool"):
            found = self.sizes("(", ")") if self.now.text == "(" else [None]
            if len(found) != 1:
                raise self.fail(f"{token.text} holds one size, not {len(found)}", token)
            return ScalarType(token.text, found[0])  # type: ignore[arg-type]  # one of the three, as just tested
        return TensorType(self.dtype(token), tuple(self.sizes("[", "]")))

    def sizes(self, opening: str, closing: str) -> Sequence[Size]:
        """Sizes between brackets."""
        self.expect(opening)
        return self.list_of(lambda: read_size(self), closing)
