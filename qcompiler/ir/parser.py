"""Text -> graph: a recursive descent parser for this grammar:

    func     := 'func' '@'name '(' [input {',' input}] ')' '->' '(' [claim {',' claim}] ')' [where] '{' {op} return '}'
    input    := %name ':' type [loc]
    claim    := type | value | '[' [claim {',' claim}] ']'
    where    := 'where' symbol 'in' low '..' [high] {',' …}
    op       := [%name {',' %name} '='] dialect.op '(' [value {',' value}] ')' [attrs] [':' type {',' type}] [loc]
    attrs    := '{' key '=' value {',' key '=' value} '}'
    return   := 'return' [value {',' value}]
    loc      := 'loc' '(' [string ':' line] ['in' string] ['by' string] ')'

Comments begin with `//`. Error messages are `file:line:column: what is wrong`, then the line and a caret.
"""

import json
import re

from qcompiler.errors import QCompilerError
from qcompiler.ir.literals import LiteralReader
from qcompiler.ir.op import Argument, Location, Value, print_argument
from qcompiler.ir.op_table import is_known, unknown_op
from qcompiler.ir.printer import print_claim
from qcompiler.ir.ranges import Range
from qcompiler.ir.structure import Structure
from qcompiler.ir.types import DType
from qcompiler.text import WORDS, Source, Token

IN_HEAD = {
    "core.input": "an input belongs in the function header, not in the body",
    "core.return": "the return is spelled 'return' and must be last",
}


def parse_graph(text: str, filename: str, graph: Structure) -> None:
    """Reads the function in `text` into an empty graph; raises ParseError if it is malformed."""
    reader = GraphReader(Source(text, filename, comments=True), graph)
    reader.function()
    reader.expect_end()


class GraphReader(LiteralReader):
    """Reads one function into an empty graph."""

    wanted = "a value or a literal"

    def __init__(self, source: Source, graph: Structure) -> None:
        super().__init__(source)
        self.graph = graph

    def function(self) -> None:
        """The whole function; checks the result types in the header against the return."""
        graph = self.graph
        self.expect("func")
        graph.name = self.expect_kind("func", "the name of the function, such as '@main'").text[1:]
        self.expect("(")
        self.list_of(self.binding, ")")
        self.expect("->")
        claim_at = self.expect("(")
        claims = ", ".join(self.list_of(self.result_claim, ")"))
        if self.accept("where"):
            self.ranges()
        self.expect("{")
        while self.now.text != "return":
            if self.now.kind not in ("value", "name"):
                raise self.fail(f"expected an operation or 'return', but got {self.now}", self.now)
            self.operation()
        self.take()
        graph.set_outputs(self.list_of(self.value, "}"))
        if claims != (returned := ", ".join(map(print_claim, graph.outputs))):
            problem = f"the header declares the results ({claims}), but the return has ({returned})"
            raise self.fail(problem, claim_at)

    def binding(self) -> None:
        """`%x: bf16[s0, 256]`, an input."""
        name = self.new_name()
        self.expect(":")
        self.graph.add_input(name, self.type(), self.location())

    def result_claim(self) -> str:
        """A type, a literal, or a list of them in the function header, as text."""
        if self.now.text == "[":
            self.take()
            return f"[{', '.join(self.list_of(self.result_claim, ']'))}]"
        if self.now.kind != "name" or self.now.text in WORDS:
            return print_argument(self.value())
        if self.now.text not in DType.__members__:
            return str(self.type())
        dtype = self.dtype(self.take())
        return str(self.tensor(dtype) if self.now.text == "[" else dtype)

    def ranges(self) -> None:
        """`s0 in 1..4096, s1 in 0..`"""
        while True:
            name = self.expect_kind("name", "the name of a symbol")
            if name.text in self.graph.symbols:
                raise self.fail(f"the range of {name.text} is given twice", name)
            self.expect("in")
            low = self.integer(self.expect_kind("int", "an integer"))
            self.expect("..")
            self.graph.symbols[name.text] = Range(low, self.integer(self.take()) if self.now.kind == "int" else None)
            if not self.accept(","):
                return

    def operation(self) -> None:
        """Reads one operation and appends it to the graph."""
        start = self.now
        names = self.new_names() if start.kind == "value" else []
        op = self.expect_kind("name", "an operation")
        if op.text in IN_HEAD or not is_known(op.text):
            raise self.fail(IN_HEAD.get(op.text) or unknown_op(op.text), op)
        self.expect("(")
        args = self.list_of(self.value, ")")
        attrs: dict[str, Argument] = {}
        if self.accept("{"):
            self.list_of(lambda: self.attribute(attrs), "}")
        types = self.types() if self.accept(":") else []
        if len(types) != len(names):
            raise self.fail(f"{len(names)} results are named, but {len(types)} types are given", start)
        self.graph.append(op.text, *args, attrs=attrs, types=types, names=names, loc=self.location())

    def new_names(self) -> list[str]:
        """`%a, %b =`"""
        names: list[str] = []
        while not names or self.expect(",", "=").text == ",":
            token = self.now
            names.append(self.new_name())
            if names[-1] in names[:-1]:
                raise self.fail(f"{token.text} is defined twice", token)
        return names

    def new_name(self) -> str:
        """The name in the definition of `%name`."""
        token = self.expect_kind("value", "the name of a value, such as '%x'")
        if self.graph.fresh(token.text[1:]) != token.text[1:]:
            raise self.fail(f"{token.text} is defined twice", token)
        return token.text[1:]

    def attribute(self, attrs: dict[str, Argument]) -> None:
        """`key = argument`, added to `attrs`."""
        key = self.expect_kind("name", "the name of an attribute")
        if key.text in attrs:
            raise self.fail(f"attribute '{key.text}' is given twice", key)
        self.expect("=")
        attrs[key.text] = self.value()

    def reference(self, token: Token) -> Value:
        """The value that `%name` refers to; it must be defined above."""
        try:
            return self.graph[token.text]
        except QCompilerError as error:
            defined = rf"(?m)^[ \t]*(?:%[\w.$-]+\s*,\s*)*{re.escape(token.text)}\s*[,=]"
            if re.compile(defined).search(self.source.text, token.at):
                raise self.fail(f"{token.text} is used before it is defined", token) from None
            guess = f". {error.fix}" if error.fix else ""
            raise self.fail(f"{token.text} is not defined{guess}", token) from None

    def location(self) -> Location | None:
        """`loc("mlp.py":9 in "fc1" by "fp8-tile")`, if present."""
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
