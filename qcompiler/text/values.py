"""Values, as every text of ours spells them.

    value    := None | true | false | inf | nan | integer | float | string | name | #name | %name | list
    list     := '[' [value {',' value}] ']'

Each kind of text says what names stand for.
"""

import json
import math
from abc import ABC, abstractmethod
from typing import Any

from qcompiler.text.lexer import Token
from qcompiler.text.reader import Reader

WORDS: dict[str, Any] = {"None": None, "true": True, "false": False, "inf": math.inf, "nan": math.nan}


class ValueReader(Reader, ABC):
    """Reads values; a subclass says what names and references stand for."""

    wanted = "a literal"

    def value(self) -> Any:
        """The next value; lists are tuples."""
        token = self.take()
        match token.kind:
            case "value":
                return self.reference(token)
            case "int":
                return self.integer(token)
            case "name":
                return WORDS[token.text] if token.text in WORDS else self.named(token)
            case "string":
                return json.loads(token.text)
            case "float":
                return float(token.text)
            case "tag":
                return self.tagged(token)
        if token.text == "[":
            return tuple(self.list_of(self.value, "]"))
        raise self.fail(f"expected {self.wanted}, but got {token}", token)

    @abstractmethod
    def named(self, token: Token) -> Any:
        """What a name stands for."""

    @abstractmethod
    def tagged(self, token: Token) -> Any:
        """What `#name` stands for; it may read on, such as fields between `<` and `>`."""

    def reference(self, token: Token) -> Any:
        """What `%name` stands for."""
        raise self.fail(f"expected {self.wanted}, but got {token}", token)
