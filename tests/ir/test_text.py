"""The text form: printing and parsing are inverses, and malformed text is answered with its line, column and caret."""

import math
import textwrap

import pytest

import qcompiler.dialects  # noqa: F401
from qcompiler.errors import ParseError
from qcompiler.ir import (
    DType,
    Graph,
    Location,
    Range,
    ScalarType,
    Tag,
    TensorType,
    parse_literal,
    print_argument,
    symbol,
)
from qcompiler.testing import LITERALS, NAMES, TEXTS, random_graph

CHUNK = 250


@pytest.mark.parametrize("chunk", range(8))
def test_random_graphs_read_back_byte_by_byte(chunk: int) -> None:
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        text = random_graph(seed, size=seed % 17).text()
        assert Graph.parse(text).text() == text
        assert "\n" not in textwrap.dedent(text.split("\n")[0])
        assert len(text.splitlines()) == len(text.split("\n"))


@pytest.mark.parametrize("chunk", range(4))
def test_random_graphs_read_back_without_locations_and_when_they_can_be_run(chunk: int) -> None:
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        graph = random_graph(seed, size=seed % 17, runnable=seed % 2 == 1)
        text = graph.text(locations=False)
        assert "loc(" not in text.replace('"loc(', "")
        again = Graph.parse(text)
        assert again.text() == text
        assert again.symbols == graph.symbols


def test_a_parsed_graph_is_as_legal_as_the_printed_one() -> None:
    for seed in range(200):
        graph = Graph.parse(random_graph(seed).text())
        graph.verify()


def test_equal_seeds_give_equal_graphs() -> None:
    assert [random_graph(seed).text() for seed in range(20)] == [random_graph(seed).text() for seed in range(20)]


FULL = """\
func @all.of-it(%x: bf16[s0, 256] loc("m.py":1), %n: int(s0), %cache: f32[4]) -> (bf16[s0, 512], [f32[], [int(2*s0 + 1)]], None, bf16, 1.5, "a") where s0 in 1..4096, s1 in 0.. {
  %w = core.param() {name = "fc1.weight"} : bf16[512, 256] loc("m.py":9 in "fc1" by "fp8-tile")
  %linear = aten.linear(%x, %w, None) : bf16[s0, 512] loc(in "fc1")
  %a, %b.1, %c = aten.native_batch_norm([%x, [], [[1, -2], None]], true, inf, nan, -inf) {eps = 1e-05, mask = [%n, #strided], nan = 0.0} : f32[], none, int(2*s0 + 1)
  core.update(%cache, %cache) loc(by "x")
  return %linear, [%a, [%c]], None, bf16, 1.5, "a"
}"""  # noqa: E501


def test_everything_at_once() -> None:
    graph = Graph.parse(FULL)
    assert graph.text() == FULL
    assert graph.symbols == {"s0": Range(1, 4096), "s1": Range(0, None)}
    assert graph["%linear"].op.loc == Location("", 0, "fc1", "")
    assert graph["w"].op.loc == Location("m.py", 9, "fc1", "fp8-tile")
    assert graph["c"].type == ScalarType("int", symbol("s0") * 2 + 1)
    assert graph["a"].op.attrs["mask"] == (graph["n"], Tag("strided"))
    assert [value.name for value in graph.inputs] == ["x", "n", "cache"]


def test_spaces_lines_and_comments_do_not_count() -> None:
    text = """
        // a comment
        func @f ( %x:bf16[2 , s0]
          // another
        )->(bf16[2,s0]) where s0 in 2..3{ %y=aten.neg( %x )
           :bf16[ 2, s0 ] // "no string
        return %y }  // the end"""
    assert Graph.parse(text).text() == (
        "func @f(%x: bf16[2, s0]) -> (bf16[2, s0]) where s0 in 2..3 {\n"
        "  %y = aten.neg(%x) : bf16[2, s0]\n"
        "  return %y\n"
        "}"
    )


def test_a_comment_inside_a_size_is_a_comment() -> None:
    graph = Graph.parse("func @f(%x: f32[s0-1, s0 // half\n + 2]) -> () { return }")
    assert str(graph["x"].type) == "f32[s0 - 1, s0 + 2]"


def test_the_empty_function() -> None:
    text = "func @main() -> () {\n  return\n}"
    assert Graph("main").text() == text == Graph.parse(text).text()


@pytest.mark.parametrize("name", NAMES)
def test_strange_names(name: str) -> None:
    graph = Graph(name)
    value = graph.add_input(name, TensorType(DType.f32, (2,)))
    first, second = graph.append("aten.topk", value, 1, types=[value.type] * 2, names=[name, name]).results
    graph.set_outputs([second, first])
    graph.verify()
    assert Graph.parse(str(graph)).text() == str(graph)


@pytest.mark.parametrize("literal", [*LITERALS, *TEXTS, (1, (2.0, ("x", None)), DType.bf16)], ids=repr)
def test_literals_read_back(literal: object) -> None:
    text = print_argument(literal)  # type: ignore[arg-type]  # a literal, as the list says
    again = parse_literal(text)
    assert print_argument(again) == text
    assert type(again) is type(literal)
    assert again == literal or (again != again and literal != literal)  # nan


def test_more_spellings_of_numbers() -> None:
    assert parse_literal("[1E5, +1.5, 2., +inf, -0.0]") == (1e5, 1.5, 2.0, math.inf, 0.0)
    assert parse_literal('"\\u00e9\\n"') == "é\n"


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 1, "expected a literal, but got the end of the text"),
        ("%x", 1, "expected a literal, but got '%x'"),
        ("1 2", 3, "expected the end of the text, but got '2'"),
        ("[1", 3, "expected ',' or ']', but got the end of the text"),
        ("fp8", 1, "unknown dtype 'fp8'. Known: b8, bf16, "),
        ('"a', 1, "this string is not closed on its line"),
        ("end", 1, "unknown dtype 'end'"),
        ("[" * 9999, 66, "brackets are nested more than 64 deep"),
        ("1" * 9999, 1, "this integer has too many digits (9999)"),
    ],
)
def test_malformed_literals(text: str, column: int, message: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse_literal(text)
    assert str(caught.value).startswith(f"<option>:1:{column}: {message}")


HEAD = "func @f(%x: bf16[s0, 4], %long: f32[8]) -> (bf16[s0, 4]) {\n"
TAIL = "  return %x\n}"


def one(line: str) -> str:
    return f"{HEAD}  {line}\n{TAIL}"


# The text, and the line, column and width of the caret, and what the message says.
MALFORMED: list[tuple[str, int, int, int, str]] = [
    # Heads
    ("", 1, 1, 1, "expected 'func', but got the end of the text"),
    ("fun @f() -> () { return }", 1, 1, 3, "expected 'func', but got 'fun'"),
    ("@f @g() -> () { return }", 1, 1, 2, "expected 'func', but got '@f'"),
    ("func func() -> () { return }", 1, 6, 4, "expected the name of the function, such as '@main', but got 'func'"),
    ("func @f( -> () { return }", 1, 10, 2, "expected the name of a value, such as '%x', but got '->'"),
    ("func @f(%x) -> () { return }", 1, 11, 1, "expected ':', but got ')'"),
    ("func @f(%x: bf16[2],, %y: i8[]) -> () { return }", 1, 21, 1, "expected the name of a value"),
    ("func @f(%x: bf16[2] %y: i8[]) -> () { return }", 1, 21, 2, "expected ',' or ')', but got '%y'"),
    ("func @f(%x: bf16[2], %x: i8[]) -> () { return }", 1, 22, 2, "%x is defined twice"),
    ("func @f() () { return }", 1, 11, 1, "expected '->', but got '('"),
    ("func @f() -> { return }", 1, 14, 1, "expected '(', but got '{'"),
    ("func @f() -> () return }", 1, 17, 6, "expected '{', but got 'return'"),
    ("func @f() -> () where 3 in 1..2 { return }", 1, 23, 1, "expected the name of a symbol, but got '3'"),
    ("func @f() -> () where s0 of 1..2 { return }", 1, 26, 2, "expected 'in', but got 'of'"),
    ("func @f() -> () where s0 in int { return }", 1, 29, 3, "expected an integer, but got 'int'"),
    ("func @f() -> () where s0 in 1 { return }", 1, 31, 1, "expected '..', but got '{'"),
    ("func @f() -> () where s0 in 1..2, s0 in 3.. { return }", 1, 35, 2, "the range of s0 is given twice"),
    # Ends
    ("func @f() -> () { return", 1, 25, 1, "expected a value or a literal, but got the end of the text"),
    ("func @f() -> () {\n", 2, 1, 1, "expected an operation or 'return', but got the end of the text"),
    ("func @f() -> () { return } end", 1, 28, 3, "expected the end of the text, but got 'end'"),
    ("func @f() -> () { return }\n\n}", 3, 1, 1, "expected the end of the text, but got '}'"),
    (
        "func @f(%x: i8[2]) -> (i8[3]) { return %x }",
        1,
        23,
        1,
        "declares the results (i8[3]), but the return has (i8[2])",
    ),
    ("func @f() -> (1, 2) { return 1 }", 1, 14, 1, "declares the results (1, 2), but the return has (1)"),
    ("func @f(%x: i8[]) -> ([1]) { return [%x] }", 1, 22, 1, "declares the results ([1]), but the return has ([i8[]])"),
    ("func @f() -> () { return %q }", 1, 26, 2, "%q is not defined"),
    # Operations
    (one("%y = aten.linaer(%x) : bf16[2]"), 2, 8, 11, "unknown operation 'aten.linaer'. Did you mean 'aten.linear'?"),
    (
        one("%y = quant.quantise(%x) : i8[]"),
        2,
        8,
        14,
        "unknown operation 'quant.quantise'. Did you mean 'quant.quantize'?",
    ),
    (one("%y = core.praam() : i8[]"), 2, 8, 10, "unknown operation 'core.praam'. Did you mean 'core.param'?"),
    (one("%y = zzz(%x) : bf16[2]"), 2, 8, 3, "unknown operation 'zzz'. "),
    (one("%y = core.input() : bf16[2]"), 2, 8, 10, "an input belongs in the function header, not in the body"),
    (one("core.return(%x)"), 2, 3, 11, "the return is spelled 'return' and must be last"),
    (one("%y = %x"), 2, 8, 2, "expected an operation, but got '%x'"),
    (one("%y = %z, %u = aten.neg(%x) : i8[]"), 2, 8, 2, "expected an operation, but got '%z'"),
    (one("%y, = aten.neg(%x) : i8[]"), 2, 7, 1, "expected the name of a value, such as '%x', but got '='"),
    (one("%y %z = aten.neg(%x) : i8[]"), 2, 6, 2, "expected ',' or '=', but got '%z'"),
    (one("%y, %y = aten.topk(%x, 1) : i8[], i8[]"), 2, 7, 2, "%y is defined twice"),
    (one("%long = aten.neg(%x) : i8[]"), 2, 3, 5, "%long is defined twice"),
    (one("%y = aten.neg %x : i8[]"), 2, 17, 2, "expected '(', but got '%x'"),
    (one("%y = aten.neg(%x : i8[]"), 2, 20, 1, "expected ',' or ')', but got ':'"),
    (one("%y = aten.neg(%x)"), 2, 3, 2, "1 results are named, but 0 types are given"),
    (one("%y = aten.neg(%x) : i8[], i8[]"), 2, 3, 2, "1 results are named, but 2 types are given"),
    (one("core.update(%x, %x) : i8[]"), 2, 3, 11, "0 results are named, but 1 types are given"),
    (one('"return"'), 2, 3, 8, "expected an operation or 'return', but got '\"return\"'"),
    # Values
    (one("%y = aten.neg(%lon) : i8[]"), 2, 17, 4, "%lon is not defined. Did you mean '%long'?"),
    (one("%y = aten.add.Tensor(%lon, %lon) : i8[]"), 2, 24, 4, "%lon is not defined. Did you mean '%long'?"),
    (one("%y = aten.neg(%qqqqq) : i8[]"), 2, 17, 6, "%qqqqq is not defined\n"),
    (one("%y = aten.neg(%y) : i8[]"), 2, 17, 2, "%y is not defined"),
    (one("%y = aten.cat([%x, %z]) : i8[]\n  %z = aten.neg(%x) : i8[]"), 2, 22, 2, "%z is used before it is defined"),
    (
        one("%y = aten.neg(%z) : i8[]\n  %u, %z = aten.topk(%x) : i8[], i8[]"),
        2,
        17,
        2,
        "%z is used before it is defined",
    ),
    # Arguments
    (one("%y = aten.cat([%x, %x) : i8[]"), 2, 24, 1, "expected ',' or ']', but got ')'"),
    (one("%y = aten.cat([%x,]) : i8[]"), 2, 21, 1, "expected a value or a literal, but got ']'"),
    (one("%y = aten.neg(%x, bf61) : i8[]"), 2, 21, 4, "unknown dtype 'bf61'. Did you mean 'bf16'?"),
    (one("%y = aten.neg(%x) {a = 1, a = 2} : i8[]"), 2, 29, 1, "attribute 'a' is given twice"),
    (one("%y = aten.neg(%x) {a: 1} : i8[]"), 2, 23, 1, "expected '=', but got ':'"),
    (one("%y = aten.neg(%x) {3 = 1} : i8[]"), 2, 22, 1, "expected the name of an attribute, but got '3'"),
    (one("%y = aten.neg(%x) {a = } : i8[]"), 2, 26, 1, "expected a value or a literal, but got '}'"),
    (one('%y = aten.neg("a) : i8[]'), 2, 17, 1, "this string is not closed on its line"),
    (one('%y = aten.neg("\\q") : i8[]'), 2, 17, 1, "has an escape that is not valid JSON"),
    (one("%y = aten.neg(?) : i8[]"), 2, 17, 1, "unexpected character '?'"),
    (one("% = aten.neg(%x) : i8[]"), 2, 3, 1, "unexpected character '%'"),
    # Types
    (one("%y = aten.neg(%x) : fp8[2]"), 2, 23, 3, "unknown dtype 'fp8'. Known: b8, bf16, "),
    (one("%y = aten.neg(%x) : f8e4m3[2]"), 2, 23, 6, "unknown dtype 'f8e4m3'. Did you mean 'f8e4m3fn'?"),
    (one("%y = aten.neg(%x) : bf16"), 3, 3, 6, "expected '[', but got 'return'"),
    (one("%y = aten.neg(%x) : 3"), 2, 23, 1, "expected a type, but got '3'"),
    (one("%y = aten.neg(%x) : bf16[2 3]"), 2, 30, 1, "expected ',' or ']', but got '3'"),
    (one("%y = aten.neg(%x) : bf16[4, s0 +]"), 2, 35, 1, "expected a number or a symbol, but got ']'"),
    (one("%y = aten.neg(%x) : bf16[4,, s0]"), 2, 30, 1, "expected a number or a symbol, but got ','"),
    (one("%y = aten.neg(%x) : bf16[4,]"), 2, 30, 1, "expected a number or a symbol, but got ']'"),
    (one("%y = aten.neg(%x) : bf16[2.5]"), 2, 28, 3, "expected a number or a symbol, but got '2.5'"),
    (one("%y = aten.neg(%x) : bf16[(s0]"), 2, 31, 1, "expected ')', but got ']'"),
    (one("%y = aten.neg(%x) : bf16[floordiv(s0, 0)]"), 2, 28, 8, "s0 is divided by zero"),
    (one("%y = aten.neg(%x) : bf16[s0.x]"), 2, 28, 4, "expected a number or a symbol, but got 's0.x'"),
    (one("%y = aten.neg(%x) : int()"), 2, 23, 3, "int takes one size, not 0"),
    (one("%y = aten.neg(%x) : int(1, 2)"), 2, 23, 3, "int takes one size, not 2"),
    # Locations
    (one("%y = aten.neg(%x) : i8[] loc 3"), 2, 32, 1, "expected '(', but got '3'"),
    (one('%y = aten.neg(%x) : i8[] loc("a")'), 2, 35, 1, "expected ':', but got ')'"),
    (one('%y = aten.neg(%x) : i8[] loc("a":x)'), 2, 36, 1, "expected a line number, but got 'x'"),
    (one("%y = aten.neg(%x) : i8[] loc(in string)"), 2, 35, 6, "expected a string, but got 'string'"),
    (one("%y = aten.neg(%x) : i8[] loc(3)"), 2, 32, 1, "expected ')', but got '3'"),
    # Rows
    ("func @f() -> () {\r\n  ?\r\n}", 2, 3, 1, "unexpected character '?'"),
    ("// é\nfunc @f(%é: é[]) -> () {", 2, 13, 1, "unexpected character 'é'"),
]


@pytest.mark.parametrize(("text", "line", "column", "width", "message"), MALFORMED)
def test_malformed_text_is_shown_with_its_place(text: str, line: int, column: int, width: int, message: str) -> None:
    with pytest.raises(ParseError) as caught:
        Graph.parse(text, "mlp.qir")
    answer = str(caught.value)
    head, row, caret = answer.split("\n")
    assert head.startswith(f"mlp.qir:{line}:{column}: ")
    assert message in head + "\n"
    assert row == text.split("\n")[line - 1].rstrip("\r")
    assert caret == " " * (column - 1) + "^" * width


def test_the_caret_stands_right_below_tabs() -> None:
    with pytest.raises(ParseError) as caught:
        Graph.parse("func @f() -> () {\n\t\t?\n}")
    assert str(caught.value).split("\n")[1:] == ["\t\t?", "\t\t^"]


def test_any_cut_or_swapped_text_raises_a_parse_error_and_nothing_else() -> None:
    for seed in range(6):
        text = random_graph(seed, size=5).text()
        for at in range(seed, len(text), 9):
            for broken in (text[:at], text[:at] + text[at + 3 :], text[:at] + "]" + text[at:]):
                try:
                    Graph.parse(broken)
                except ParseError as error:
                    assert str(error).startswith("<text>:")  # noqa: PT017  # legal by chance, or this error


def test_an_operation_prints_as_its_line() -> None:
    text = """func @m(%x: f32[4]) -> (f32[4]) {
      %y = aten.add.Tensor(%x, 2.0) {alpha = 2} : f32[4] loc("m.py":1)
      return %y
    }"""
    graph = Graph.parse(text)
    assert str(graph["y"].op) == '%y = aten.add.Tensor(%x, 2.0) {alpha = 2} : f32[4] loc("m.py":1)'
    assert str(graph["y"].op) in str(graph)
