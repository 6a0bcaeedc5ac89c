"""The grammar of values, shared by all text forms.

    value    := None | true | false | inf | nan | integer | float | string | name | #name | %name | list
    list     := '[' [value {',' value}] ']'

Each text form defines the meaning of names.
"""

import json
import math
from abc import ABC, abstractmethod
from typing import Any

from qcompiler.text.lexer import Token
from qcompiler.text.reader import Reader

WORDS: dict[str, Any] = {"None": None, "true": True, "false": False, "inf": math.inf, "nan": math.nan}


class ValueReader(Reader, ABC):
    """Reads values; subclasses define the meaning of names and references."""

    wanted = "a literal"

    def value(self) -> Any:
        """Reads a value; lists become tuples."""
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
        """The value of a name."""

    @abstractmethod
    def tagged(self, token: Token) -> Any:
        """The value of `#name`; may read more tokens, such as fields between `<` and `>`."""

    def reference(self, token: Token) -> Any:
        """The value of `%name`."""
        raise self.fail(f"expected {self.wanted}, but got {token}", token)
