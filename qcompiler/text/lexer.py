"""Text -> tokens, each with its offset, so that every message can show the row and a caret."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from qcompiler.errors import ParseError

TOKENS = r"""(?:
    (?P<arrow>->) | (?P<range>\.\.)
  | (?P<value>%[\w.$-]+) | (?P<func>@[\w.$-]+) | (?P<tag>\#\w[\w.:]*)
  | (?P<string>"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*")
  | (?P<float>[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?(?!\.)|\d+[eE][-+]?\d+)|[-+]inf\b)
  | (?P<int>-?\d+)
  | (?P<name>[A-Za-z_][\w.]*)
  | (?P<mark>//|[(){}\[\]<>=:;,+*/-])
  | (?P<end>\Z) | (?P<wrong>.)
)"""
WITH_COMMENTS = re.compile(r"(?:\s+|//[^\n]*)*" + TOKENS, re.VERBOSE | re.DOTALL)
WITHOUT_COMMENTS = re.compile(r"\s*" + TOKENS, re.VERBOSE | re.DOTALL)

NAME = re.compile(r"[\w.$-]+")
"""What may follow the `%` of a value and the `@` of a function."""


def legal_name(name: str) -> str:
    """A name of torch's, such as a weight's, as the text form can spell it."""
    return re.sub(r"[^\w.$-]", "_", name) or "_"


class Token(NamedTuple):
    """A piece of text: its kind (a group of TOKENS), the text, and its offset."""

    kind: str
    text: str
    at: int

    def __str__(self) -> str:
        """The token in a message."""
        return f"'{self.text}'" if self.text else "the end of the text"


class Source:
    """A text with a name, able to point at a place in itself.

    Args:
        text: The text.
        filename: Its name in messages.
        comments: Whether `//` begins a comment; otherwise it is an operator.
    """

    def __init__(self, text: str, filename: str, *, comments: bool = False) -> None:
        self.text, self.filename = text, filename
        self._pattern = WITH_COMMENTS if comments else WITHOUT_COMMENTS

    def tokens(self, at: int = 0) -> Iterator[Token]:
        """Every token from an offset on, without space and comments, then one of kind `end`, which is empty."""
        for match in self._pattern.finditer(self.text, at):
            kind, text, end = match.lastgroup or "", match[match.lastindex or 0], match.end()
            if kind == "wrong":
                problem = f"unexpected character {text!r}"
                if text == '"':
                    problem = "this string does not end on its line, or has an escape that JSON does not know"
                raise self.error(problem, end - 1)
            yield Token(kind, text, end - len(text))

    def error(self, problem: str, at: int, width: int = 1) -> ParseError:
        """`file:line:col: problem`, the row, and a caret below `width` characters."""
        return ParseError(self.excerpt(at, width, f" {problem}"))

    def excerpt(self, at: int, width: int, problem: str = "") -> str:
        """`file:line:col:`, the row, and a caret below `width` characters."""
        line = self.text.count("\n", 0, at) + 1
        start = self.text.rfind("\n", 0, at) + 1
        row = self.text[start:].split("\n", 1)[0].rstrip("\r")
        indent = re.sub(r"[^\t]", " ", row[: at - start])
        caret = indent + "^" * max(1, min(width, len(row) - (at - start)))
        return f"{self.filename}:{line}:{at - start + 1}:{problem}\n{row}\n{caret}"
