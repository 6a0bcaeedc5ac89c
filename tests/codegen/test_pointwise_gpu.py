"""Generated pointwise kernels on a Hopper GPU: bit-equal to the torch definition on a CPU."""

import pytest
import torch
from pointwise_examples import KEYS, ROTARY, SHAPES, summed, terms_of
from torch import Tensor

import codegen.torch_ops  # noqa: F401  (registers the operators)
from qcompiler.dialects.pointwise import pointwise

pytestmark = pytest.mark.gpu


def check(expressions: tuple[str, ...], shapes: tuple[str, ...], *operands: Tensor) -> None:
    wanted = pointwise(*operands, expressions=expressions, shapes=shapes)
    for _ in range(3):  # the third call is replayed
        made = torch.ops.qcompiler.pointwise(on_gpu(operands), list(expressions), list(shapes))
        for got, want in zip(made, wanted, strict=True):
            assert got.shape == want.shape and got.is_contiguous()
            bits = torch.int16 if want.itemsize == 2 else torch.int32
            assert torch.equal(got.cpu().view(bits), want.view(bits)), (expressions, got.shape)


def on_gpu(operands: tuple[Tensor, ...]) -> list[Tensor]:
    """Copies with the same strides."""
    made = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in operands]
    for x, y in zip(operands, made, strict=True):
        y.copy_(x)
    return made


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (16, 1), (2, 77), (1, 4096)])
def test_rotary_embedding(batch: int, tokens: int) -> None:
    qkv = torch.randn(batch, tokens, 520).bfloat16()
    cos, sin = torch.randn(batch, tokens, 64).bfloat16(), torch.randn(batch, tokens, 64).bfloat16()
    check((ROTARY, KEYS), SHAPES, qkv[..., :384], cos, sin)
    check((ROTARY, KEYS), SHAPES, qkv[..., 3:387], cos, sin)  # not aligned
    check((ROTARY, KEYS), SHAPES, qkv[..., :384].transpose(0, 1).contiguous().transpose(0, 1), cos, sin)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (16, 1), (2, 77), (1, 4096)])
def test_elements_of_integers_in_indices(batch: int, tokens: int, kind: torch.dtype) -> None:
    """Rows of an embedding, angles of positions, and one token of each row."""
    words, ids = torch.randn(300, 1096).bfloat16(), torch.randint(300, (batch, tokens)).to(kind)
    lengths, last = torch.randint(9000, (batch,)).to(kind), torch.randint(tokens, (batch,)).to(kind)
    expressions = ("bf16(x0[x1(i0, i1), i2])", "number(i1 + x3(i0)) * x2[i2]", "bf16(x4[i0, x5(i0), i1] * 3.0)")
    shapes = ("x1.0, x1.1, 1096", "x1.0, x1.1, 64", "x4.0, 40")
    check(expressions, shapes, words, ids, torch.rand(64), lengths, torch.randn(batch, tokens, 40).bfloat16(), last)
    outside = torch.ops.qcompiler.pointwise([words.cuda(), (ids + 300).cuda()], [expressions[0]], [shapes[0]])[0]
    assert bool(outside.isnan().all())


@pytest.mark.parametrize(("experts", "columns", "tokens"), [(2, 4096, 513), (8, 2048, 64), (4, 40, 3)])
def test_the_sum_over_the_experts_of_a_token(experts: int, columns: int, tokens: int) -> None:
    """Also torch's own operations on the GPU give these bits, because the order of additions is theirs."""
    rows, share = torch.randn(tokens * experts, columns).bfloat16(), torch.rand(tokens, experts)
    place = torch.randperm(tokens * experts)
    text = summed(experts)
    check((text,), (f"x1.0, {columns}",), rows, share, place)
    check((text,), (f"x2.0/{experts}, {columns}",), rows, share, place)
    y, x = (rows.cuda()[place.cuda()].view(tokens, experts, columns), share.cuda().unsqueeze(-1))
    want = (y * x).sum(1).bfloat16()
    (got,) = torch.ops.qcompiler.pointwise([rows.cuda(), share.cuda(), place.cuda()], [text], [f"x1.0, {columns}"])
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("terms", "tokens", "columns"), [(2, 1, 256), (3, 77, 512), (8, 513, 1024)])
def test_sums_of_quantized_terms(terms: int, tokens: int, columns: int, dtype: torch.dtype) -> None:
    codes = torch.randn(terms, tokens, columns).to(dtype)
    scales, x = torch.rand(terms, tokens, columns // 128), torch.randn(tokens, columns).bfloat16()
    text = terms_of(terms).partition(";")[0].removeprefix("t0 = ")
    check((text,), (f"x0.0, {columns}",), x, codes, scales)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens", "capacity"), [(1, 1, None), (16, 1, None), (3, 77, None), (3, 77, 85)])
def test_append(dtype: torch.dtype, batch: int, tokens: int, capacity: int | None) -> None:
    """One kernel writes the same bytes as the two that it replaces; tokens beyond the capacity are not written.

    With a capacity, the cache is a ring of 80 positions.
    """
    qkv, value = torch.randn(batch, tokens, 384).bfloat16().cuda(), torch.randn(batch, tokens, 2, 48).bfloat16().cuda()
    cos, sin = (torch.randn(batch, tokens, 64).bfloat16().cuda() for _ in range(2))
    slots = torch.randperm(batch + 1, device="cuda")[:batch].contiguous()
    lengths = torch.arange(batch, device="cuda") * 5
    cache = [torch.zeros(batch + 1, 2, 80, size, device="cuda").to(dtype) for size in (64, 48)]
    if dtype.itemsize == 1:
        cache += [torch.zeros(batch + 1, 2, 80, device="cuda") for _ in range(2)]
    wanted = [each.clone() for each in cache]
    operands = [qkv, cos, sin, value.transpose(1, 2)]
    query, key = torch.ops.qcompiler.pointwise(operands[:3], [ROTARY, KEYS], list(SHAPES))
    torch.ops.qcompiler.append_to_cache(wanted, key, operands[3], slots, lengths, capacity)
    for _ in range(3):  # the third call is replayed
        (got,) = torch.ops.qcompiler.fused_append(
            cache, slots, lengths, operands, [KEYS, "bf16(x3[i0, i1, i2, i3])", ROTARY],
            [SHAPES[1], "x3.0, 2, x3.2, 48", SHAPES[0]], capacity,
        )  # fmt: skip
    assert torch.equal(got.view(torch.int16), query.view(torch.int16))
    for one, want in zip(cache, wanted, strict=True):
        assert torch.equal(one.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("columns", [64, 768, 4096])
def test_norms(columns: int) -> None:
    x, gain = torch.randn(37, columns).bfloat16(), torch.randn(columns).bfloat16()
    text = "t0 = mean(x0[i0, i1] * x0[i0, i1]); bf16(x1[i1] * bf16(x0[i0, i1] * rsqrt(t0 + 1e-06)))"
    (want,) = pointwise(x, gain, expressions=[text], shapes=[f"x0.0, {columns}"])
    (got,) = torch.ops.qcompiler.pointwise([x.cuda(), gain.cuda()], [text], [f"x0.0, {columns}"])
    assert torch.allclose(
        got.cpu().float(), want.float(), rtol=2**-6, atol=1e-3
    )  # sums in another order, two roundings


def test_cosines_and_sines_are_those_of_torch() -> None:
    x = (torch.randn(100, 64) * 1000).cuda()
    cos, sin = torch.ops.qcompiler.pointwise([x], ["cos(x0[i0, i1])", "sin(x0[i0, i1])"], ["x0.0, 64", "x0.0, 64"])
    assert torch.allclose(cos, x.cos(), rtol=0, atol=2e-7) and torch.allclose(sin, x.sin(), rtol=0, atol=2e-7)


def test_indices_and_dtypes() -> None:
    x, y = torch.randn(37, 64), torch.randn(64, 33).half()
    check(("where(i1 < 64, x0[i0, i1], f16(relu(x1[i1 - 64, mod(i0, 33)])))",), ("x0.0, 128",), x, y)
    check(("x0[i1, i0] / 3.0",), ("64, x0.0",), x)
    check(("bf16(x0[floordiv(i0, 64), mod(i0, 64)] - x1[0, 0])",), ("2368",), x, y)
    check(("x0[] + 1.0",), ("",), torch.randn(()))


def test_offsets_beyond_32_bits() -> None:
    x = torch.empty(2**21 + 3, 2**10, dtype=torch.bfloat16, device="cuda").normal_()
    (got,) = torch.ops.qcompiler.pointwise([x], ["bf16(neg(x0[i0, i1]))"], ["x0.0, 1024"])
    assert torch.equal(got, -x)
