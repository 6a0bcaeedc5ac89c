"""Generated pointwise kernels in Triton's interpreter on a CPU: bit-equal to the torch definition of the operation.

The interpreter is chosen when Triton is imported, so all cases run in a separate process. It rounds to bfloat16
incorrectly, so expressions round to float16 here.
"""

import pytest
from triton_interpreter import needs_interpreter, prepare_interpreter, run_interpreted

ROTARY = (
    "f16(f16(x0[i0, i2, 8*i1 + i3] * x1[i2, i3])"
    " + f16(where(i3 < 4, f16(neg(x0[i0, i2, 8*i1 + i3 + 4])), x0[i0, i2, 8*i1 + i3 - 4]) * x2[i2, i3]))"
)
KEYS = ROTARY.replace("8*i1 + i3", "8*i1 + i3 + 24")
TURNED = "where(mod(i1, 2) < 1, neg(x0[i0, 2*floordiv(i1, 2) + 1]), x0[i0, 2*floordiv(i1, 2)])"
INTERLEAVED = f"x0[i0, i1] * x1[i1] + {TURNED} * x1[i1]"


def _case(
    expressions: tuple[str, ...], shapes: tuple[str, ...], *operands: "Tensor", tiles: tuple[int, ...] = (256, 2048),
    wide: bool = False, error: float = 0.0,
) -> None:  # fmt: skip
    want = pointwise(*operands, expressions=expressions, shapes=shapes)
    for elements in tiles:
        memory = [torch.full((each.numel() + 64,), 7.0, dtype=each.dtype) for each in want]
        out = [one[: each.numel()].view(each.shape) for one, each in zip(memory, want, strict=True)]
        given = PointwiseOperands(expressions, shapes, operands, out)
        (call,) = POINTWISE.family(HOPPER).calls(PointwiseConfig(elements, 1), given)
        launch(call._replace(constants=call.constants | {"WIDE": wide}))
        for got, each, one in zip(out, want, memory, strict=True):
            bits = torch.int16 if each.dtype == torch.float16 else torch.int32
            if error:
                assert torch.allclose(got.float(), each.float(), error, error), (expressions, shapes, elements)
            else:
                assert torch.equal(got.view(bits), each.view(bits)), (expressions, shapes, elements)
            assert bool((one[each.numel() :] == 7.0).all()), (expressions, "wrote beyond the result")


def _append(
    dtype: "torch.dtype", batch: int, tokens: int, lengths: list[int], *, capacity: int = 9, value: int = 8,
    ring: int | None = None,
) -> None:  # fmt: skip
    """Rotated keys and plain values in one kernel; the tensors of the cache equal those after `state.append`."""
    slots, starts = torch.randperm(batch + 1)[:batch], torch.tensor(lengths)
    qkv, values = torch.randn(batch, tokens, 40).half(), torch.randn(batch, tokens, 2, value).half().transpose(1, 2)
    cos, sin = torch.randn(tokens, 8).half(), torch.randn(tokens, 8).half()
    held, limit = ring or capacity, None if ring is None else capacity
    kept = [torch.zeros(batch + 1, 2, held, size, dtype=dtype) for size in (8, value)]
    kept += [torch.zeros(batch + 1, 2, held) for _ in range(2 if dtype == torch.int8 else 0)]
    wanted = [each.clone() for each in kept]
    expressions = (KEYS, "f16(x3[i0, i1, i2, i3])", ROTARY)
    shapes = ("x0.0, 2, x0.1, 8", f"x3.0, 2, x3.2, {value}", "x0.0, 3, x0.1, 8")
    operands = (qkv, cos, sin, values)
    key, new, query = pointwise(*operands, expressions=expressions, shapes=shapes)
    for row, length in enumerate(lengths):  # tokens beyond the capacity are not written
        fits = max(min(tokens, capacity - length), 0)
        if fits:
            one = slice(row, row + 1)
            state.append(wanted, key[one, :, :fits], new[one, :, :fits], slots[one], starts[one], capacity=limit)
    out = torch.zeros_like(query)
    padded = (kept[0], kept[1], *(kept[2:] or (None, None)))
    given = PointwiseOperands(expressions, shapes, operands, [out], Appended(padded, slots, starts, limit))
    POINTWISE.family(HOPPER).launch(PointwiseConfig(64, 1), given)
    assert torch.equal(out.view(torch.int16), query.view(torch.int16))
    for got, want in zip(kept, wanted, strict=True):
        assert torch.equal(got, want), (dtype, batch, tokens, lengths, got.shape)


def _run_all() -> None:
    torch.manual_seed(0)
    for batch, tokens in ((1, 1), (2, 5), (3, 37)):
        qkv = torch.randn(batch, tokens, 48).half()
        cos, sin = torch.randn(tokens, 8).half(), torch.randn(tokens, 8).half()
        shapes = ("x0.0, 3, x0.1, 8", "x0.0, 1, x0.1, 8")
        for wide in (False, True):
            _case((ROTARY, KEYS), shapes, qkv[..., :40], cos, sin, wide=wide)
        _case((ROTARY, KEYS), shapes, qkv[..., 3:43], cos, sin)  # not aligned
        _case((ROTARY, KEYS), shapes, qkv.flip(-1).transpose(1, 2).contiguous().transpose(1, 2), cos, sin)  # strided
    x = torch.randn(5, 8)
    _case((INTERLEAVED,), ("x0.0, 8",), x, torch.randn(8))
    _case(("where(i1 < 3, x0[i0, i1], x1[i0, i1 - 3])",), ("x0.0, 8",), x[:, :3], x[:, 3:])
    _case(("where(i0 < 2, x0[i1], where(i0 < 4, x1[i0 - 2, 0], 1.5))",), ("6, 8",), x[0], x[:2, :1])
    _case(("x0[0, i0] - x0[1, i1]", "t = x0[i0, 0] * 3.0; t / t + x0[3, 3]"), ("8, 8", "x0.0, 1"), x)
    _case(("relu(x0[floordiv(i0, 8), mod(i0, 8)]) + x0[0, 0]",), ("40",), x)
    _case(("x0[i1, i0]",), ("8, x0.0",), x)  # any number of columns
    _case(("x0[i0] + x0[i1]",), ("x0.0, x0.0",), torch.randn(300))
    _case(("x0[i0] * x1[i1]",), ("3, 1500",), torch.randn(3), torch.randn(1500))
    _case(("x0[] + 1.0",), ("",), torch.randn(()))
    _case(("x0[i0, i1, i2, i3, i4, i5] * 2.0",), ("2, 3, 2, 3, x0.4, 4",), torch.randn(2, 3, 2, 3, 2, 4))
    for columns in (8, 12):
        y, gain = torch.randn(5, 3, columns), torch.randn(columns)
        norm = f"rsqrt(t0 + 1e-06); where(i2 < 3, neg(x0[i0, i1, i2 + {columns - 3}] * t1), x0[i0, i1, i2 - 3] * t1)"
        text = f"t0 = mean(x0[i0, i1, i2] * x0[i0, i1, i2]); t1 = {norm} * x1[i2]"
        _case((text,), (f"x0.0, 3, {columns}",), y[:, :, :columns], gain, error=1e-6)
        text = "t0 = standardize(x0[i1, i0, i2] + 1.0, 1e-05); t0 * x1[i2]"
        _case((text,), (f"3, x0.0, {columns}",), y, gain, error=1e-5)
    for dtype in (torch.float16, torch.int8):
        _append(dtype, 1, 1, [0])
        _append(dtype, 3, 4, [2, 0, 5], value=6)
        _append(dtype, 2, 3, [8, 7])
        _append(dtype, 3, 4, [2, 0, 5], ring=6)
    rows, starts = torch.tensor([[4, 0], [2, 2], [1, 5]]), torch.tensor([7, -3, 2**24 + 1])  # row 5 does not exist
    counted = ("x0[x1(i0, i1), i2] * 2.0", "number(x2(i0) + i1) * x3[i2]", "number(3*x2(0) - 2*i0)")
    _case(counted, ("x1.0, x1.1, 8", "x1.0, x1.1, 8", "700"), x, rows, starts, torch.randn(8))
    back, share = torch.tensor([3, 0, 5, 1, 4, 2]), torch.randn(3, 2)
    weighted = "0.0 + x0[x1(2*i0), i1] * x2[i0, 0] + x0[x1(2*i0 + 1), i1] * x2[i0, 1]"  # the experts of a token
    _case((weighted, f"f16({weighted})"), ("x1.0/2, 40", "x1.0/2, 40"), torch.randn(6, 40).half(), back, share)
    narrow = rows.int().t().contiguous().t()
    _case(("x0[i0, x1(i0, 1) - 2*x1(1, 0), 1]",), ("x1.0",), torch.randn(5, 6, 2), narrow)
    guarded = "where(x1(i0) < 2, 0.5, where(i1 < 4, x0[x1(i0), i1], x0[x2(i0 - 1) + i1 - 4, 0]))"
    _case((guarded,), ("3, 8",), x, torch.tensor([1, 3, 4]), torch.tensor([0, 1]))
    print("all cases ran")


@needs_interpreter
@pytest.mark.timeout(240)
def test_the_kernel_under_the_interpreter() -> None:
    run_interpreted(__file__)


if __name__ == "__main__":
    import torch
    from torch import Tensor

    from codegen.launching.launch import launch
    from codegen.targets.hopper import HOPPER
    from codegen.templates.pointwise import POINTWISE, Appended, PointwiseConfig, PointwiseOperands
    from qcompiler.dialects import state
    from qcompiler.dialects.pointwise import pointwise

    prepare_interpreter()
    _run_all()
