"""The language of expressions: text and tree are one, its meaning is torch's own, and other text is refused."""

import ast
import math
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qcompiler.dialects.expression_nodes import Call, Expression, Name, Number
from qcompiler.dialects.fused_expression import FUNCTIONS, OPERATORS, FusedExpression, parse
from qcompiler.errors import ParseError

ADD_NORM = "h = bf16(x0 + x1); n = rsqrt(mean(h * h) + 1e-06); bf16(x2 * bf16(h * n))"


ELEMENTWISE = sorted(name for name, function in FUNCTIONS.items() if function.arity == 1)
DEFINED = ("h", "inside", "hé")


def trees(known: Sequence[str]) -> st.SearchStrategy[Expression]:
    names: st.SearchStrategy[Expression] = st.sampled_from(known).map(Name)
    numbers: st.SearchStrategy[Expression] = st.floats(-1e30, 1e30).map(Number)
    operators = st.sampled_from(sorted(OPERATORS))

    def calls(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
        either = st.one_of(inner, numbers)
        return st.one_of(
            st.builds(lambda f, x: Call(f, (x,)), st.sampled_from(ELEMENTWISE), inner),
            st.builds(lambda f, a, b: Call(f, (a, b)), operators, inner, either),
            st.builds(lambda f, a, b: Call(f, (a, b)), operators, either, inner),
            st.builds(lambda x, eps: Call("standardize", (x, eps)), inner, numbers),
        )

    return st.recursive(names, calls, max_leaves=10)


EXPRESSIONS = [trees(["x0", "x1", "x12", "y0", *DEFINED[:count]]) for count in range(len(DEFINED) + 1)]


@st.composite
def expressions(draw: st.DrawFn) -> FusedExpression:
    count = draw(st.integers(0, len(DEFINED)))
    definitions = [(name, draw(EXPRESSIONS[place])) for place, name in enumerate(DEFINED[:count])]
    return FusedExpression(tuple(definitions), draw(EXPRESSIONS[count]))


@given(expressions())
def test_what_is_printed_is_what_is_read(expression: FusedExpression) -> None:
    assert parse(str(expression)) == expression
    assert str(parse(str(expression))) == str(expression)


@given(expressions())
def test_the_text_means_in_python_what_the_tree_means(expression: FusedExpression) -> None:
    # Python's grammar defines precedence: its tree of the text, with all parentheses, parses as the same expression.
    bracketed = "; ".join(_bracketed(statement) for statement in ast.parse(str(expression)).body)
    assert parse(bracketed) == expression


def _bracketed(statement: ast.stmt) -> str:
    def text(node: ast.expr) -> str:
        if isinstance(node, ast.BinOp):
            return f"({text(node.left)} {ast.unparse(ast.BinOp(_A, node.op, _A))[2:-2]} {text(node.right)})"
        if isinstance(node, ast.Call):
            return f"{ast.unparse(node.func)}({', '.join(map(text, node.args))})"
        return ast.unparse(node)

    if isinstance(statement, ast.Assign):
        return f"{ast.unparse(statement.targets[0])} = {text(statement.value)}"
    assert isinstance(statement, ast.Expr)
    return text(statement.value)


_A = ast.Name("a")


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("x0-(x1-x2)", "x0 - (x1 - x2)"),
        ("(x0-x1)-x2", "x0 - x1 - x2"),
        ("x0/(x1*x2)", "x0 / (x1 * x2)"),
        ("x0*(x1+1)", "x0 * (x1 + 1.0)"),
        ("-2*x0", "-2.0 * x0"),
        ("x0 - -1e-6", "x0 - -1e-06"),
        ("h=x0\nh*h", "h = x0; h * h"),
    ],
)
def test_brackets_stand_where_they_are_needed(text: str, printed: str) -> None:
    assert str(parse(text)) == printed


def test_operands_are_sorted_by_their_numbers() -> None:
    assert parse("y1 + x10 * x2 + y0 - x0").operands == ("x0", "x2", "x10", "y0", "y1")


@pytest.mark.parametrize(
    ("text", "across"), [(ADD_NORM, True), ("standardize(x0, 1e-05)", True), ("bf16(silu(x0)) * x1", False)]
)
def test_an_expression_knows_whether_it_needs_whole_rows(text: str, across: bool) -> None:
    assert parse(text).across == across


@pytest.mark.parametrize(
    ("text", "name", "dtype"),
    [
        (ADD_NORM, None, torch.bfloat16),
        (ADD_NORM, "h", torch.bfloat16),
        (ADD_NORM, "n", torch.float32),
        ("h = f16(x0); g = h; g", None, torch.float16),
        ("h = f16(x0); g = h; g", "g", torch.float16),
        ("h = f16(x0); h * x1", None, torch.float32),
        ("x0", None, torch.float32),
    ],
)
def test_the_element_type_is_that_of_the_last_rounding(text: str, name: str | None, dtype: torch.dtype) -> None:
    assert parse(text).dtype(name) == dtype


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)


MEANINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cos(x0)": lambda x, _: x.cos(),
    "exp(x0)": lambda x, _: x.exp(),
    "gelu(x0)": lambda x, _: functional.gelu(x),
    "gelu_tanh(x0)": lambda x, _: functional.gelu(x, approximate="tanh"),
    "neg(x0)": lambda x, _: -x,
    "relu(x0)": lambda x, _: functional.relu(x),
    "at_most(at_least(x0, -0.5), 0.25)": lambda x, _: x.clamp(-0.5, 0.25),
    "rsqrt(x0)": lambda x, _: x.rsqrt(),
    "sigmoid(x0)": lambda x, _: x.sigmoid(),
    "sin(x0)": lambda x, _: x.sin(),
    "silu(x0)": lambda x, _: functional.silu(x),
    "sqrt(x0)": lambda x, _: x.sqrt(),
    "tanh(x0)": lambda x, _: x.tanh(),
    "mean(x0) + 0 * x0": lambda x, _: x.mean(-1, keepdim=True) + 0 * x,
    "standardize(x0, 1e-05)": lambda x, _: functional.layer_norm(x, x.shape[-1:], eps=1e-5),
    "x0 * rsqrt(mean(x0 * x0) + 1e-05)": lambda x, _: _norm(x),
    "x0 + x1": torch.add,
    "x0 - x1": torch.sub,
    "x0 * x1": torch.mul,
    "x0 / x1": torch.div,
    "x0 / 3": lambda x, _: x / torch.tensor(3.0),
    "3 / x0": lambda x, _: torch.tensor(3.0) / x,
}


@pytest.mark.parametrize("text", MEANINGS)
def test_a_function_means_what_torch_means(text: str) -> None:
    x, y = torch.randn(7, 33, generator=torch.Generator().manual_seed(3)), torch.linspace(-3, 4, 33)
    expression = parse(text)
    result, *kept = expression.run({"x0": x, "x1": y})
    assert not kept
    assert torch.equal(result.nan_to_num(7.0), MEANINGS[text](x, y).nan_to_num(7.0))


def test_every_function_is_tested() -> None:
    missing = [name for name in FUNCTIONS if not any(f"{name}(" in text for text in MEANINGS)]
    assert missing == ["bf16", "f16", "f32"]  # the next tests


def test_f32_says_that_a_rounded_number_is_stored_in_fp32() -> None:
    x = torch.randn(100)
    (result,) = parse("f32(bf16(x0))").run({"x0": x})
    assert result.dtype is torch.float32 and torch.equal(result, x.bfloat16().float())


def test_numbers_are_divided_as_ieee_says() -> None:
    x = torch.arange(1, 4097, dtype=torch.float32)
    (result,) = parse("3.0 / x0").run({"x0": x})
    assert torch.equal(result.double(), (3.0 / x.double()).float().double())
    assert not torch.equal(result, 3.0 / x), "torch itself rounds twice, which is why this test is here"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_expression_repeats_what_torch_rounds(dtype: torch.dtype) -> None:
    x, residual, gain = torch.randn(5, 64).to(dtype), torch.randn(5, 64).to(dtype), torch.randn(64).to(dtype)
    text = ADD_NORM if dtype == torch.bfloat16 else ADD_NORM.replace("bf16", "f16")
    result, h = parse(text).run({"x0": x, "x1": residual, "x2": gain}, ["h"])
    want = x + residual
    assert h.dtype == result.dtype == dtype and torch.equal(h, want)
    scale = torch.rsqrt(want.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(result, gain * (want.float() * scale).to(dtype))


def test_results_have_the_shape_of_the_operands() -> None:
    x, gain = torch.randn(3, 8, 4).transpose(1, 2), torch.randn(8)
    result, mean, wide = parse("m = mean(x0); g = bf16(2 * x1); m * 1.0").run({"x0": x, "x1": gain}, ["m", "g"])
    for tensor in (result, mean, wide):
        assert tensor.shape == (3, 4, 8) and tensor.is_contiguous()
    assert torch.equal(mean, x.mean(-1, keepdim=True).expand(3, 4, 8))
    assert torch.equal(wide[2, 3], (2 * gain).bfloat16())


WRONG = {
    "": "<expression>:1:1: the expression has no result",
    "h = x0": "<expression>:1:7: the expression has no result",
    "x0 +": "<expression>:1:5: expected a name, a number or a call, but got the end of the text",
    "x0 + " * 900 + "x0": "an expression has more than 256 operations",
    "x0 + " * 20000 + "x0": "an expression has more than 256 operations",
    "(" * 20000 + "x0": "brackets are nested more than 64 deep",
    "-" * 20000 + "1": "expected a name, a number or a call, but got '-'",
    "h² = x0; x0": "'h²' is not a valid definition name",
    "x0 x1": "<expression>:1:4: expected ';' or the end of the text, but got 'x1'",
    "h = x0; h = x1; h": "'h' is already defined",
    "x1 = x0; x1": "'x1' is already defined",
    "exp = x0; exp": "'exp' is already defined",
    "h, g = x0; h": "<expression>:1:1: 'h' is not defined before it is used",
    "x0; x1": "<expression>:1:5: the result must be the last expression",
    "h * x0": "'h' is not defined before it is used",
    "g = h; h = x0; g": "'h' is not defined before it is used",
    "x01": "'x01' is not defined",
    "x0 ** 2": r"<expression>:1:5: expected a name, a number or a call, but got '\*'",
    "x0 if x1 else x2": "expected ';' or the end of the text, but got 'if'",
    "True * x0": "'True' is not defined",
    "-True * x0": "expected a name, a number or a call, but got '-'",
    "mean(x=x0)": "'x' is not defined before it is used",
    "mean(*x0)": r"expected a name, a number or a call, but got '\*'",
    "tan(x0)": "unknown function 'tan'",
    "x0[i0, s0]": "'s0' is not an index of the result such as i0",
    "x0[mod(i0, -2)]": "is neither floordiv nor mod by a positive integer",
    "x0[max(i0, 1)]": "is neither floordiv nor mod by a positive integer",
    "where(i0 > 1, x0[i0], x1[i0])": "expected '<', but got '>'",
    "where(i0 < 1, x0[i0])": "expected ',', but got '\\)'",
    "where = x0; where": "'where' is already defined",
    "gelu(x0, x1)": "gelu takes 1 arguments, but got 2",
    "standardize(x0)": "standardize takes 2 arguments, but got 1",
    "standardize(x0, x1)": "the eps of standardize is 'x1', not a number",
    "at_most(x0, x1)": "the limit of at_most is 'x1', not a number",
    "3": "the result is a number",
    "c = 3; x0 * c": "'c' is defined as a number; write the number where it is used",
    "x0 + exp(1.0)": r"'exp\(1.0\)' is constant; write its value",
    "x0 * (2 + 3)": r"'2.0 \+ 3.0' is constant",
    "x0 * 1e39": "beyond the range of FP32",
    "x0 - 1" + "0" * 400: "beyond the range of FP32",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(ParseError, match=WRONG[text]):
        parse(text)


def test_an_unknown_function_is_told_the_nearest() -> None:
    with pytest.raises(ParseError, match=r"Did you mean 'gelu_tanh'\?"):
        parse("gelu_tan(x0)")


def test_nothing_but_arithmetic_can_be_said() -> None:
    for text in ("__import__('os')", "x0.data", "[x0]", "x0[y]", "lambda: x0", "'x0'", "x0 @ x1", "(h := x0)"):
        with pytest.raises(ParseError):
            parse(text)


def test_python_does_not_comment_on_an_expression() -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(ParseError):
            parse("1or x0")
    assert not warned


def test_the_largest_number_is_that_of_fp32() -> None:
    largest = torch.finfo(torch.float32).max
    (result,) = parse(f"x0 * {largest!r}").run({"x0": torch.ones(1)})
    assert math.isfinite(result.item())
