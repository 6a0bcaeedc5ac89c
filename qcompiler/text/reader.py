"""Reads tokens one at a time: what every parser of ours is made of."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from qcompiler.errors import ParseError, QCompilerError
from qcompiler.text.lexer import Source, Token

T = TypeVar("T")
DEEPEST = 64
"""Brackets inside brackets: far more than any text has, and few enough for every function that walks the tree."""


OPENING = {")": "(", "]": "[", "}": "{", ">": "<"}


class Reader:
    """Recursive descent, one token ahead.

    Attributes:
        source: The text.
        now: The next token.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.depth = 0
        self.go_to(0)

    def go_to(self, at: int) -> None:
        """Reads on at an offset."""
        self._tokens = self.source.tokens(at)
        self.now = next(self._tokens)

    def fail(self, problem: str, token: Token) -> ParseError:
        """The error for `token`."""
        return self.source.error(problem, token.at, len(token.text))

    def since(self, start: Token) -> Token:
        """Everything from `start` up to the next token, as one token."""
        return Token("text", self.source.text[start.at : self.now.at].rstrip(), start.at)

    @contextmanager
    def blaming(self, token: Token) -> Iterator[None]:
        """Shows `token` in its row, below the message of an error about its meaning."""
        try:
            yield
        except QCompilerError as error:
            if not isinstance(error, ParseError) and token.text != self.source.text.strip():
                error.excerpt = error.excerpt or self.source.excerpt(token.at, len(token.text))
            raise

    def take(self) -> Token:
        """The next token; moves on, except at the end."""
        token = self.now
        self.now = next(self._tokens, token)
        return token

    def accept(self, text: str) -> bool:
        """Moves past `text` if it is next."""
        if self.now.text == text:
            self.take()
            return True
        return False

    def expect(self, *texts: str) -> Token:
        """The next token, which must be one of the given texts; an empty one is the end."""
        if self.now.text not in texts:
            wanted = " or ".join(map(str, (Token("mark", text, 0) for text in texts)))
            opened = OPENING.get(texts[-1]) if self.now.kind == "end" else None
            unclosed = f"; '{opened}' is not closed" if opened else ""
            raise self.fail(f"expected {wanted}, but got {self.now}{unclosed}", self.now)
        return self.take()

    def expect_kind(self, kind: str, wanted: str) -> Token:
        """The next token, which must be of the given kind; `wanted` says so in words."""
        if self.now.kind != kind:
            raise self.fail(f"expected {wanted}, but got {self.now}", self.now)
        return self.take()

    def expect_end(self) -> None:
        """ParseError unless everything is read."""
        self.expect_kind("end", "the end of the text")

    def word(self, pattern: "re.Pattern[str]", wanted: str) -> Token:
        """What `pattern` matches at the next token, such as a name with dashes; `wanted` says so in words."""
        match = pattern.match(self.source.text, self.now.at)
        if match is None:
            raise self.fail(f"expected {wanted}, but got {self.now}", self.now)
        self.go_to(match.end())
        return Token("word", match[0], match.start())

    def operator(self) -> str:
        """The text of the next token, which is not taken; of a number with a sign, the sign alone is the token."""
        token = self.now
        if token.kind in ("int", "float") and token.text[0] in "+-":
            self._tokens = self.source.tokens(token.at + 1)
            self.now = Token("mark", token.text[0], token.at)
        return self.now.text

    def list_of(self, item: Callable[[], T], close: str) -> list[T]:
        """Items with commas between, up to and past `close`."""
        self._enter()
        items: list[T] = []
        while not self.accept(close):
            if items:
                self.expect(",", close)
            items.append(item())
        self.depth -= 1
        return items

    def bracketed(self, item: Callable[[], T], close: str) -> T:
        """One item, up to and past `close`."""
        self._enter()
        found = item()
        self.expect(close)
        self.depth -= 1
        return found

    def _enter(self) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.fail(f"brackets are nested more than {DEEPEST} deep", self.now)

    def separated(self, item: Callable[[], T], mark: str, close: str = "") -> list[T]:
        """Items with marks between, and perhaps more marks than that, up to and past `close`, or up to the end."""
        items: list[T] = []
        while self.now.kind != "end" and self.now.text != close:
            if not self.accept(mark):
                items.append(item())
                if self.now.text not in (mark, close):
                    self.expect(mark, close)
        self.expect(close)
        return items

    def arithmetic(
        self,
        left: T,
        operand: Callable[[], T],
        join: Callable[[Token, T, T], T],
        strengths: Mapping[str, int],
        least: int = 1,
    ) -> T:
        """The value of `left {operator operand}`, from left to right among operators of equal strength.

        Args:
            left: The first operand, which has been read.
            operand: Reads another one.
            join: The result of an operator, given its token and both sides.
            strengths: How strongly each operator binds.
            least: The least strength of an operator that belongs to this expression.
        """
        while (strength := strengths.get(self.operator(), 0)) >= least:
            operator = self.take()
            left = join(operator, left, self.arithmetic(operand(), operand, join, strengths, strength + 1))
        return left

    def integer(self, token: Token) -> int:
        """The integer that a token spells."""
        try:
            return int(token.text)
        except ValueError:  # Python's own limit, without which the time would grow with the square of the length
            raise self.fail(f"this integer has {len(token.text)} digits, which is too many", token) from None
