"""`kernel.pointwise` and `state.fused_append`: what they compute, and what the verifier rejects."""

import pytest
import torch

from qcompiler.dialects.pointwise import AxisPart, pointwise, read_shape
from qcompiler.errors import VerifyError
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.ir.op_table import OpError

GRAPH = """
func @m(%x: bf16[s0, 8], %y: f32[4], %n: i64[3], %m: b8[3]) -> (bf16[s0, 4]) where s0 in 1.. {{
  %r = kernel.pointwise({operands}) {{expressions = [{expressions}], shapes = [{shapes}]}} : bf16[s0, 4]
  return %r
}}
"""
MASK = torch.zeros(3, dtype=torch.bool)


def graph(expressions: str, shapes: str = '"x0.0, 4"', operands: str = "%x") -> Graph:
    return Graph.parse(GRAPH.format(expressions=expressions, shapes=shapes, operands=operands))


def test_indices_and_conditions() -> None:
    made = graph(
        '"bf16(where(i1 < 2, x0[i0, 2*i1 + 1], neg(x1[floordiv(i1, 2)])) + x0[0, mod(i1, 3)])"', operands="%x, %y"
    )
    made.verify()
    x, y = torch.randn(3, 8).bfloat16(), torch.randn(4)
    (got,) = interpret(made, [x, y, torch.zeros(3, dtype=torch.int64), MASK])
    for i0 in range(3):
        for i1 in range(4):
            first = x[i0, 2 * i1 + 1].float() if i1 < 2 else -y[i1 // 2]
            assert got[i0, i1] == (first + x[0, i1 % 3].float()).bfloat16()


def test_elements_of_integers_in_indices() -> None:
    made = graph('"bf16(x0[x1(mod(i0, 3)) + 1, i1] + number(x1(mod(i0, 3)) - 2*i1) * x2[i1])"', operands="%x, %n, %y")
    made.verify()
    x, y, n = torch.randn(3, 8).bfloat16(), torch.randn(4), torch.tensor([1, -1, 0])
    (got,) = interpret(made, [x, y, n, MASK])
    for i0 in range(3):
        want = x[n[i0] + 1, :4].float() + (n[i0] - 2 * torch.arange(4)) * y
        assert torch.equal(got[i0], want.bfloat16())
    (got,) = interpret(made, [x, y, torch.tensor([2, -2, 1]), MASK])  # rows 3 and -1 do not exist
    assert got.isnan().all(1).tolist() == [True, True, False]
    (number,) = pointwise(torch.tensor([2**24 + 1, 2**60 + 1]), expressions=["number(x0(i0) + 2)"], shapes=["x0.0"])
    assert number.tolist() == [2**24 + 4, 2**60]


def test_part_of_an_axis() -> None:
    made = Graph.parse("""
    func @m(%x: f32[2*s0, 4]) -> (f32[s0, 4]) where s0 in 1.. {
      %r = kernel.pointwise(%x) {expressions = ["x0[2*i0, i1] + x0[2*i0 + 1, i1]"], shapes = ["x0.0/2, 4"]} : f32[s0, 4]
      return %r
    }
    """)
    made.verify()
    x = torch.randn(6, 4)
    (got,) = interpret(made, [x])
    assert torch.equal(got, x[::2] + x[1::2])


def test_no_elements_and_no_axes() -> None:
    empty, one = torch.empty(0, 3), torch.tensor(2.5)
    assert pointwise(empty, expressions=["x0[i0, i1]"], shapes=["x0.0, 3"])[0].shape == (0, 3)
    (joined,) = pointwise(empty, torch.ones(2), expressions=["where(0 < 0, x0[i0, 0], x1[i0])"], shapes=["x1.0"])
    assert joined.tolist() == [1.0, 1.0]
    assert pointwise(one, expressions=["x0[] * 2.0"], shapes=[""])[0].item() == 5.0


@pytest.mark.parametrize(
    ("expressions", "shapes", "operands", "why"),
    [
        ('"bf16(x0[i0])"', '"x0.0, 4"', "%x", r"x0\[i0\] has 1 indices, but x0 has 2 axes"),
        ('"bf16(x0[i0, i2])"', '"x0.0, 4"', "%x", "has the index i2, but its result has 2 axes"),
        ('"bf16(where(i3 < 1, x0[i0, i1], 0.0))"', '"x0.0, 4"', "%x", "has the index i3"),
        ('"bf16(x0 + x0[i0, i1])"', '"x0.0, 4"', "%x", "its expression reads x0 without an index"),
        ('"bf16(x0[i0, i1])"', '"x0.0, 4"', "%x, %y", "its expressions and shapes name x0, but it has 2 operands"),
        ('"bf16(x0[i0, i1])"', '"x0.2, 4"', "%x", "its shape names axis 2 of x0, which does not exist"),
        ('"bf16(x0[i0, i1])"', '"x0, 4"', "%x", "'x0' in the shape 'x0, 4' is neither a number nor an axis"),
        ('"bf16(x0[i0, i1])"', '"x0.0, 4", "4"', "%x", "it has 1 expressions, but 2 shapes"),
        ('"bf16(x0[i0])"', '"x0.0, 4"', "%m", "must be a tensor in bf16, f16, f32, FP8, i32, or i64"),
        ('"bf16(x0[i0])"', '"x0.0, 4"', "%n", r"its elements are i64, so an expression reads them as an index such as"),
        ('"bf16(number(x0(i0, i1)))"', '"x0.0, 4"', "%x", r"its elements are bf16, .* reads them as x0\[…\]"),
        ('"bf16(number(x0(i0, i1)))"', '"x0.0, 4"', "%n", r"x0\(i0, i1\) has 2 indices, but x0 has 1 axes"),
        ('"bf16(x0[x1(x1(i0)), i1])"', '"x0.0, 4"', "%x, %n", "inside of 'x1.* can only be added and multiplied"),
        ('"bf16(x0[mod(x1(i0), 3), i1])"', '"x0.0, 4"', "%x, %n", "inside of 'mod.* can only be added and multiplied"),
        ('"bf16(x0[i0, "', '"x0.0, 4"', "%x", "expected"),
        ('"x0[i0, i1]"', '"x0.0, 4"', "%x", r"f32\[s0, 4\]"),
    ],
)
def test_the_verifier(expressions: str, shapes: str, operands: str, why: str) -> None:
    with pytest.raises(VerifyError, match=why):
        graph(expressions, shapes, operands).verify()


def test_a_shape() -> None:
    assert read_shape("x0.1, 12,x3.0/8") == (AxisPart(0, 1), 12, AxisPart(3, 0, 8)) and read_shape("") == ()
    for wrong in ("-1", "x0", "y0.1", "x0.-1", "²", "x01.1", "x0.1/0", "x0.1/", "8/2", "x0.²"):
        with pytest.raises(OpError, match="neither a number nor an axis"):
            read_shape(wrong)


@pytest.mark.parametrize(
    ("expressions", "shapes", "why"),
    [
        ('"x0[i0, i1, i2, i3]"', '"x0.0, 1, x0.2, 8"', "one for the values, but has 1"),
        ('"x0[i0, i1, i2, i3]", "x0[i0, i1, i2, i3]"', '"x0.0, 1, x0.2, 8", "x0.0, 2, x0.2, 8"', "the value must be"),
        (
            '"x0[i0, i1, i2, i3]", "f16(x0[i0, 0, 0, 0])"',
            '"x0.0, 1, x0.2, 8", "x0.0, 1, x0.2, 8"',
            "elements of type f16",
        ),
    ],
)
def test_what_cannot_be_appended(expressions: str, shapes: str, why: str) -> None:
    made = Graph.parse(f"""
    func @m(%x: f32[s0, 1, s1, 8], %slots: i64[s0], %lengths: i64[s0]) -> () where s0 in 1.., s1 in 1.. {{
      %c = state.cache() {{name = "c"}} : cache<f32, slots = 4, heads = 1, capacity = 8, key = 8, value = 8>
      state.fused_append(%c, %slots, %lengths, %x) {{expressions = [{expressions}], shapes = [{shapes}]}}
      return
    }}
    """)
    with pytest.raises(VerifyError, match=why):
        made.verify()
