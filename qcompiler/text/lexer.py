"""Text -> tokens with offsets, so that error messages can show the line and a caret."""

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
"""A name after the `%` of a value or the `@` of a function."""


def legal_name(name: str) -> str:
    """A torch name, such as a weight name, made valid for the text form."""
    return re.sub(r"[^\w.$-]", "_", name) or "_"


class Token(NamedTuple):
    """A token: its kind (a group of TOKENS), its text, and its offset."""

    kind: str
    text: str
    at: int

    def __str__(self) -> str:
        """The token for messages."""
        return f"'{self.text}'" if self.text else "the end of the text"


class Source:
    """A text with a file name for error messages.

    Args:
        text: The text.
        filename: The file name in messages.
        comments: Whether `//` starts a comment; otherwise it is an operator.
    """

    def __init__(self, text: str, filename: str, *, comments: bool = False) -> None:
        self.text, self.filename = text, filename
        self._pattern = WITH_COMMENTS if comments else WITHOUT_COMMENTS

    def tokens(self, at: int = 0) -> Iterator[Token]:
        """The tokens from an offset on, without space and comments, then an empty token of kind `end`."""
        for match in self._pattern.finditer(self.text, at):
            kind, text, end = match.lastgroup or "", match[match.lastindex or 0], match.end()
            if kind == "wrong":
                problem = f"unexpected character {text!r}"
                if text == '"':
                    problem = "this string is not closed on its line, or has an escape that is not valid JSON"
                raise self.error(problem, end - 1)
            yield Token(kind, text, end - len(text))

    def error(self, problem: str, at: int, width: int = 1) -> ParseError:
        """The error `file:line:col: problem`, with the line and a caret below `width` characters."""
        return ParseError(self.excerpt(at, width, f" {problem}"))

    def excerpt(self, at: int, width: int, problem: str = "") -> str:
        """`file:line:col:`, the line, and a caret below `width` characters."""
        line = self.text.count("\n", 0, at) + 1
        start = self.text.rfind("\n", 0, at) + 1
        row = self.text[start:].split("\n", 1)[0].rstrip("\r")
        indent = re.sub(r"[^\t]", " ", row[: at - start])
        caret = indent + "^" * max(1, min(width, len(row) - (at - start)))
        return f"{self.filename}:{line}:{at - start + 1}:{problem}\n{row}\n{caret}"
