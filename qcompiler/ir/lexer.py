"""Text -> tokens, each with its place, so that every message can show the row and a caret."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from qcompiler.errors import ParseError

TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*)
      | (?P<arrow>->) | (?P<range>\.\.)
      | (?P<value>%[\w.$-]+) | (?P<func>@[\w.$-]+) | (?P<tag>\#\w[\w.:]*)
      | (?P<string>"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*")
      | (?P<float>[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?(?!\.)|\d+[eE][-+]?\d+)|[-+]inf\b)
      | (?P<int>-?\d+)
      | (?P<name>[A-Za-z_][\w.]*)
      | (?P<mark>[(){}\[\]=:,+*/-])""",
    re.VERBOSE,
)

NAME = re.compile(r"[\w.$-]+")
"""What may follow the `%` of a value and the `@` of a function."""


def legal_name(name: str) -> str:
    """A name of torch's, such as a weight's, as the text form can spell it."""
    return re.sub(r"[^\w.$-]", "_", name) or "_"


class Token(NamedTuple):
    """A piece of text: its kind (a group of TOKEN, or `end`), the text, and its offset."""

    kind: str
    text: str
    at: int

    @property
    def shown(self) -> str:
        """The token in a message."""
        return self.text if self.kind == "end" else f"'{self.text}'"


class Source:
    """A text with a name, able to point at a place in itself."""

    def __init__(self, text: str, filename: str) -> None:
        self.text, self.filename = text, filename

    def tokens(self) -> Iterator[Token]:
        """Every token but space and comments, then one of kind `end`."""
        at = 0
        while at < len(self.text):
            match = TOKEN.match(self.text, at)
            if match is None and self.text[at] == '"':
                raise self.error("this string does not end on its line, or has an escape that JSON does not know", at)
            if match is None:
                raise self.error(f"unexpected character {self.text[at]!r}", at)
            if match.lastgroup != "space":
                yield Token(str(match.lastgroup), match.group(), at)
            at = match.end()
        yield Token("end", "the end of the text", at)

    def error(self, problem: str, at: int, width: int = 1) -> ParseError:
        """`file:line:col: problem`, the row, and a caret below `width` characters."""
        line = self.text.count("\n", 0, at) + 1
        start = self.text.rfind("\n", 0, at) + 1
        row = self.text[start:].split("\n", 1)[0].rstrip("\r")
        indent = re.sub(r"[^\t]", " ", row[: at - start])
        caret = indent + "^" * max(1, min(width, len(row) - (at - start)))
        return ParseError(f"{self.filename}:{line}:{at - start + 1}: {problem}\n{row}\n{caret}")
