"""Text -> graph, by recursive descent over this grammar:

    func    := 'func' '@'name '(' [input {',' input}] ')' '->' '(' [claim {',' claim}] ')' [where] '{' {op} return '}'
    input   := %name ':' type [loc]
    claim   := type | literal | '[' [claim {',' claim}] ']'
    where   := 'where' symbol 'in' low '..' [high] {',' …}
    op      := [%name {',' %name} '='] dialect.op '(' [arg {',' arg}] ')' [attrs] [':' type {',' type}] [loc]
    attrs   := '{' key '=' arg {',' key '=' arg} '}'
    return  := 'return' [arg {',' arg}]
    arg     := %name | literal | '[' [arg {',' arg}] ']'
    literal := None | true | false | inf | nan | integer | float | string | dtype | #tag
    type    := dtype '[' [size {',' size}] ']' | ('int'|'float'|'bool') ['(' size ')'] | 'none'
    loc     := 'loc' '(' [string ':' line] ['in' string] ['by' string] ')'

Comments begin with `//`. Every message is `file:line:column: what is wrong`, then the row and a caret.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from qcompiler.errors import ParseError, QCompilerError, did_you_mean
from qcompiler.ir.lexer import Source, Token
from qcompiler.ir.op import Argument, Location, Op, Tag, Value, print_argument
from qcompiler.ir.op_table import is_known, unknown_op
from qcompiler.ir.printer import print_claim
from qcompiler.ir.sizes import Size, parse_size
from qcompiler.ir.types import NONE, DType, ScalarType, TensorType, Type

if TYPE_CHECKING:
    from qcompiler.ir.graph import Graph, Range

    MakeGraph = Callable[[str], Graph]
    MakeRange = Callable[[int, int | None], Range]

T = TypeVar("T")
WORDS: dict[str, Argument] = {"None": None, "true": True, "false": False, "inf": math.inf, "nan": math.nan}
SIZE_MARKS = ("(", ")", ",", "+", "-", "*", "/")
DEEPEST = 64
"""Brackets inside brackets: far more than any graph has, and few enough for every function that walks the tree."""
IN_HEAD = {
    "core.input": "an input stands in the head of the function, not in its body",
    "core.return": "the return is spelled 'return' and stands last",
}


def parse_graph(text: str, filename: str, make_graph: "MakeGraph", make_range: "MakeRange") -> "Graph":
    """The one function in `text`; ParseError when it is malformed."""
    parser = Parser(Source(text, filename))
    graph = parser.function(make_graph, make_range)
    parser.expect_kind("end", "the end of the text")
    return graph


def parse_literal(text: str) -> Argument:
    """The literal that `text` spells, such as an option of a pass; ParseError when it spells none."""
    parser = Parser(Source(text, "<option>"))
    value = parser.argument(None)
    parser.expect_kind("end", "the end of the text")
    return value


def parse_type(text: str) -> Type:
    """The type that `text` spells, such as `f32[s0, 256]`; ParseError when it is none."""
    parser = Parser(Source(text, "<type>"))
    found = parser.type()
    parser.expect_kind("end", "the end of the text")
    return found


class Parser:
    """Recursive descent, one token ahead."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.tokens = source.tokens()
        self.now = next(self.tokens)
        self.depth = 0

    # Tokens

    def fail(self, problem: str, token: Token) -> ParseError:
        """The error for `token`."""
        return self.source.error(problem, token.at, len(token.text) if token.kind != "end" else 1)

    def take(self) -> Token:
        """The current token; moves on."""
        token = self.now
        if token.kind != "end":
            self.now = next(self.tokens)
        return token

    def accept(self, text: str) -> bool:
        """Moves past `text` if it is next."""
        if self.now.text == text:
            self.take()
            return True
        return False

    def expect(self, *texts: str) -> Token:
        """The current token, which must be one of the given texts."""
        if self.now.text not in texts:
            wanted = " or ".join(f"'{text}'" for text in texts)
            raise self.fail(f"expected {wanted}, but got {self.now.shown}", self.now)
        return self.take()

    def expect_kind(self, kind: str, wanted: str) -> Token:
        """The current token, which must be of the given kind; `wanted` says so in words."""
        if self.now.kind != kind:
            raise self.fail(f"expected {wanted}, but got {self.now.shown}", self.now)
        return self.take()

    def list_of(self, item: Callable[[], T], close: str) -> list[T]:
        """Items with commas between, up to and past `close`."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.fail(f"brackets are nested more than {DEEPEST} deep", self.now)
        items: list[T] = []
        while not self.accept(close):
            if items:
                self.expect(",", close)
            items.append(item())
        self.depth -= 1
        return items

    def integer(self, token: Token) -> int:
        """The integer that a token spells."""
        try:
            return int(token.text)
        except ValueError:  # Python's own limit, without which the time would grow with the square of the length
            raise self.fail(f"this integer has {len(token.text)} digits, which is too many", token) from None

    # Functions and operations

    def function(self, make_graph: "MakeGraph", make_range: "MakeRange") -> "Graph":
        """The whole function, checked against the result types that its head claims."""
        self.expect("func")
        graph = make_graph(self.expect_kind("func", "the name of the function, such as '@main'").text[1:])
        self.expect("(")
        self.list_of(lambda: self.binding(graph), ")")
        self.expect("->")
        claim_at = self.expect("(")
        claims = ", ".join(self.list_of(self.result_claim, ")"))
        if self.accept("where"):
            self.ranges(graph, make_range)
        self.expect("{")
        while self.now.text != "return":
            if self.now.kind not in ("value", "name"):
                raise self.fail(f"expected an operation or 'return', but got {self.now.shown}", self.now)
            self.operation(graph)
        self.take()
        graph.set_outputs(self.outputs(graph))
        if claims != (returned := ", ".join(map(print_claim, graph.outputs))):
            problem = f"the head says the results are ({claims}), but the return gives ({returned})"
            raise self.fail(problem, claim_at)
        return graph

    def binding(self, graph: "Graph") -> None:
        """`%x: bf16[s0, 256]`, an input."""
        name = self.new_name(graph)
        self.expect(":")
        graph.add_input(name, self.type(), self.location())

    def result_claim(self) -> str:
        """A type, a literal or a list of them in the head, as text."""
        if self.now.text == "[":
            self.take()
            return f"[{', '.join(self.list_of(self.result_claim, ']'))}]"
        if self.now.kind != "name" or self.now.text in WORDS:
            return print_argument(self.argument(None))
        if self.now.text not in DType.__members__:
            return str(self.type())
        dtype = self.dtype(self.take())
        return str(TensorType(dtype, tuple(self.sizes("[", "]"))) if self.now.text == "[" else dtype)

    def ranges(self, graph: "Graph", make_range: "MakeRange") -> None:
        """`s0 in 1..4096, s1 in 0..`"""
        while True:
            name = self.expect_kind("name", "the name of a symbol")
            if name.text in graph.symbols:
                raise self.fail(f"the range of {name.text} is given twice", name)
            self.expect("in")
            low = self.integer(self.expect_kind("int", "an integer"))
            self.expect("..")
            graph.symbols[name.text] = make_range(low, self.integer(self.take()) if self.now.kind == "int" else None)
            if not self.accept(","):
                return

    def outputs(self, graph: "Graph") -> list[Argument]:
        """The arguments of the return, up to and past the closing brace."""
        return self.list_of(lambda: self.argument(graph), "}")

    def operation(self, graph: "Graph") -> Op:
        """One operation, appended to the graph."""
        start = self.now
        names = self.new_names(graph) if start.kind == "value" else []
        op = self.expect_kind("name", "an operation")
        if op.text in IN_HEAD or not is_known(op.text):
            raise self.fail(IN_HEAD.get(op.text) or unknown_op(op.text), op)
        self.expect("(")
        args = self.list_of(lambda: self.argument(graph), ")")
        attrs: dict[str, Argument] = {}
        if self.accept("{"):
            self.list_of(lambda: self.attribute(graph, attrs), "}")
        types = self.types() if self.accept(":") else []
        if len(types) != len(names):
            raise self.fail(f"{len(names)} results are named, but {len(types)} types are given", start)
        return graph.append(op.text, *args, attrs=attrs, types=types, names=names, loc=self.location())

    def new_names(self, graph: "Graph") -> list[str]:
        """`%a, %b =`"""
        names: list[str] = []
        while not names or self.expect(",", "=").text == ",":
            token = self.now
            names.append(self.new_name(graph))
            if names[-1] in names[:-1]:
                raise self.fail(f"{token.text} is defined twice", token)
        return names

    def new_name(self, graph: "Graph") -> str:
        """The name in a `%name` that is being defined."""
        token = self.expect_kind("value", "the name of a value, such as '%x'")
        if graph.fresh(token.text[1:]) != token.text[1:]:
            raise self.fail(f"{token.text} is defined twice", token)
        return token.text[1:]

    def attribute(self, graph: "Graph", attrs: dict[str, Argument]) -> None:
        """`key = argument`, added to `attrs`."""
        key = self.expect_kind("name", "the name of an attribute")
        if key.text in attrs:
            raise self.fail(f"attribute '{key.text}' is given twice", key)
        self.expect("=")
        attrs[key.text] = self.argument(graph)

    # Arguments, types, locations

    def argument(self, graph: "Graph | None") -> Argument:
        """A value of `graph`, a literal, or a list; without a graph, no values."""
        token = self.take()
        if token.kind == "value" and graph is not None:
            return self.value(graph, token)
        if token.text == "[":
            return tuple(self.list_of(lambda: self.argument(graph), "]"))
        if token.kind == "int":
            return self.integer(token)
        if token.kind in LITERALS:
            return LITERALS[token.kind](token.text)
        if token.text in WORDS:
            return WORDS[token.text]
        if token.kind == "name":
            return self.dtype(token)
        wanted = "a literal" if graph is None else "a value or a literal"
        raise self.fail(f"expected {wanted}, but got {token.shown}", token)

    def value(self, graph: "Graph", token: Token) -> Value:
        """The value that `%name` refers to, which must stand above."""
        try:
            return graph[token.text]
        except QCompilerError as error:
            defined = rf"(?m)^[ \t]*(?:%[\w.$-]+\s*,\s*)*{re.escape(token.text)}\s*[,=]"
            if re.compile(defined).search(self.source.text, token.at):
                raise self.fail(f"{token.text} is used before it is defined", token) from None
            guess = f". {error.fix}" if error.fix else ""
            raise self.fail(f"{token.text} is not defined{guess}", token) from None

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
        return self.list_of(lambda: self.size(closing), closing)

    def size(self, closing: str) -> Size:
        """One size: its text, up to a comma or bracket of the outer list, goes to the parser of sizes."""
        first = last = self.now
        depth = 0
        while depth or self.now.text not in (",", closing):
            if self.now.kind not in ("int", "name") and self.now.text not in SIZE_MARKS:
                raise self.fail(f"expected a size or '{closing}', but got {self.now.shown}", self.now)
            last = self.take()
            depth += (last.text == "(") - (last.text == ")")
        text = self.source.text[first.at : last.at + len(last.text)] if first is not self.now else ""
        try:
            return parse_size(text)
        except ValueError as error:
            raise self.source.error(str(error), first.at, len(text)) from None

    def location(self) -> Location | None:
        """`loc("mlp.py":9 in "fc1" by "fp8-tile")`, if it is next."""
        if not self.accept("loc"):
            return None
        self.expect("(")
        file, line = "", 0
        if self.now.kind == "string":
            file = json.loads(self.take().text)
            self.expect(":")
            line = self.integer(self.expect_kind("int", "a line number"))
        module = json.loads(self.expect_kind("string", "a string").text) if self.accept("in") else ""
        made_by = json.loads(self.expect_kind("string", "a string").text) if self.accept("by") else ""
        self.expect(")")
        return Location(file, line, module, made_by)


LITERALS: dict[str, Callable[[str], Argument]] = {
    "string": json.loads,
    "float": float,
    "tag": lambda text: Tag(text[1:]),
}
