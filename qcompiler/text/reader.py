"""Base class of all parsers: reads tokens one at a time."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from qcompiler.errors import ParseError, QCompilerError
from qcompiler.text.lexer import Source, Token

T = TypeVar("T")
DEEPEST = 64
"""Maximum nesting of brackets; keeps recursive functions on the tree within Python's limit."""


OPENING = {")": "(", "]": "[", "}": "{", ">": "<"}


class Reader:
    """Recursive descent with one token of lookahead.

    Attributes:
        source: The text.
        now: The next token.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.depth = 0
        self.go_to(0)

    def go_to(self, at: int) -> None:
        """Continues at an offset."""
        self._tokens = self.source.tokens(at)
        self.now = next(self._tokens)

    def fail(self, problem: str, token: Token) -> ParseError:
        """A ParseError at `token`."""
        return self.source.error(problem, token.at, len(token.text))

    def since(self, start: Token) -> Token:
        """The text from `start` up to the next token, as one token."""
        return Token("text", self.source.text[start.at : self.now.at].rstrip(), start.at)

    @contextmanager
    def blaming(self, token: Token) -> Iterator[None]:
        """Adds an excerpt with `token` to errors raised in the block that are not parse errors."""
        try:
            yield
        except QCompilerError as error:
            if not isinstance(error, ParseError) and token.text != self.source.text.strip():
                error.excerpt = error.excerpt or self.source.excerpt(token.at, len(token.text))
            raise

    def take(self) -> Token:
        """Returns the next token and advances, except at the end."""
        token = self.now
        self.now = next(self._tokens, token)
        return token

    def accept(self, text: str) -> bool:
        """Skips `text` if it is next; returns whether it was."""
        if self.now.text == text:
            self.take()
            return True
        return False

    def expect(self, *texts: str) -> Token:
        """Takes the next token, which must be one of `texts`; the empty text means the end."""
        if self.now.text not in texts:
            wanted = " or ".join(map(str, (Token("mark", text, 0) for text in texts)))
            opened = OPENING.get(texts[-1]) if self.now.kind == "end" else None
            unclosed = f"; '{opened}' is not closed" if opened else ""
            raise self.fail(f"expected {wanted}, but got {self.now}{unclosed}", self.now)
        return self.take()

    def expect_kind(self, kind: str, wanted: str) -> Token:
        """Takes the next token, which must be of the given kind; `wanted` describes it in errors."""
        if self.now.kind != kind:
            raise self.fail(f"expected {wanted}, but got {self.now}", self.now)
        return self.take()

    def expect_end(self) -> None:
        """Raises ParseError unless all text is read."""
        self.expect_kind("end", "the end of the text")

    def word(self, pattern: "re.Pattern[str]", wanted: str) -> Token:
        """Takes the match of `pattern`, such as a name with dashes; `wanted` describes it in errors."""
        match = pattern.match(self.source.text, self.now.at)
        if match is None:
            raise self.fail(f"expected {wanted}, but got {self.now}", self.now)
        self.go_to(match.end())
        return Token("word", match[0], match.start())

    def operator(self) -> str:
        """The text of the next token, without taking it; splits the sign off a number."""
        token = self.now
        if token.kind in ("int", "float") and token.text[0] in "+-":
            self._tokens = self.source.tokens(token.at + 1)
            self.now = Token("mark", token.text[0], token.at)
        return self.now.text

    def list_of(self, item: Callable[[], T], close: str) -> list[T]:
        """Reads items separated by commas, up to and including `close`."""
        self._enter()
        items: list[T] = []
        while not self.accept(close):
            if items:
                self.expect(",", close)
            items.append(item())
        self.depth -= 1
        return items

    def bracketed(self, item: Callable[[], T], close: str) -> T:
        """Reads one item and `close`."""
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
        """Reads items separated by one or more marks, up to and including `close`; an empty `close` means the end."""
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
        """Reads `left {operator operand}` by precedence; operators of equal precedence are left-associative.

        Args:
            left: The first operand, already read.
            operand: Reads the next operand.
            join: Returns the result of an operator, given its token and both operands.
            strengths: Operator -> precedence; higher binds tighter.
            least: The lowest precedence of the operators in this expression.
        """
        while (strength := strengths.get(self.operator(), 0)) >= least:
            operator = self.take()
            left = join(operator, left, self.arithmetic(operand(), operand, join, strengths, strength + 1))
        return left

    def integer(self, token: Token) -> int:
        """The integer that a token spells."""
        try:
            return int(token.text)
        except ValueError:  # Python limits the digits, because parsing takes quadratic time
            raise self.fail(f"this integer has too many digits ({len(token.text)})", token) from None
