"""The KV cache operators on a CPU: equal to the state dialect, with correct fakes, opaque to torch.compile."""

import pytest
import torch
from torch import Tensor

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.operators.cache_operands import cache_tensors, check_rows
from qcompiler.dialects import state
from qcompiler.errors import CodegenError, InputError
from qcompiler.ir import CacheType, DType
from qcompiler.ir.formats import FP8_ROW, INT8_ROW
from qcompiler.runtime.caches import allocate

# torch.compile loads parts of torch that use deprecated parts of torch on newer Pythons.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

append, attend = torch.ops.qcompiler.append_to_cache, torch.ops.qcompiler.attend_to_cache
fused_attend = torch.ops.qcompiler.fused_attend
ELEMENTS = (DType.f32, DType.bf16, FP8_ROW, INT8_ROW)
SLOTS, LENGTHS = torch.tensor([2, 0]), torch.tensor([0, 0])


def cache(element: DType | object = DType.f32, value: int = 16) -> list[Tensor]:
    kind = CacheType(element, slots=3, heads=2, capacity=12, key=16, value=value)  # type: ignore[arg-type]
    return allocate(kind, "cpu").tensors


def new(tokens: int, heads: int, size: int = 16) -> Tensor:
    return torch.randn(2, tokens, heads, size).transpose(1, 2)


@pytest.mark.parametrize("element", ELEMENTS)
def test_the_operators_run_the_state_dialect(element: DType | object) -> None:
    mine, theirs = cache(element, 8), cache(element, 8)
    dtype = torch.bfloat16 if element is DType.bf16 else torch.float32
    lengths = LENGTHS.clone()
    for tokens in (3, 1, 4):
        key, value, query = new(tokens, 2).to(dtype), new(tokens, 2, 8).to(dtype), new(tokens, 6).to(dtype)
        append(mine, key, value, SLOTS, lengths)
        state.append(theirs, key, value, SLOTS, lengths)
        slopes = torch.linspace(0.1, 0.5, 6)
        out = attend(mine, query, SLOTS, lengths, torch.ones(6), None, slopes, 0.3, 3, 5.0, 4)
        want = state.attend(
            theirs, query, SLOTS, lengths, torch.ones(6), None, slopes, scale=0.3, window=3, softcap=5.0, chunk=4
        )
        assert torch.equal(out, want) and out.transpose(1, 2).is_contiguous()
        lengths += tokens
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(mine, theirs, strict=True))


def test_the_schemas_and_fakes_are_correct() -> None:
    tensors, key, value = cache(DType.f32, 8), new(3, 2), new(3, 2, 8)
    for test in ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"):
        torch.library.opcheck(append, (tensors, key, value, SLOTS, LENGTHS), test_utils=test)
        torch.library.opcheck(
            attend, (tensors, new(3, 4), SLOTS, LENGTHS, None, None, None, 0.3, None, None, None), test_utils=test
        )


@pytest.mark.parametrize("layout", ["row_major", "col_major"])
def test_attention_that_quantizes_equals_both_operators(layout: str) -> None:
    tensors, query = cache(INT8_ROW), new(3, 8)
    append(tensors, new(3, 2), new(3, 2), SLOTS, LENGTHS)
    quantization = ([1, 32], torch.int8, "deepseek")
    given = (tensors, query, SLOTS, LENGTHS, None, 0, torch.rand(8), 0.3, 2, None, 2, None)
    rows = attend(*given).transpose(1, 2).flatten(2)
    for got, want in zip(
        fused_attend(*given, *quantization, layout), torch.ops.qcompiler.quantize(rows, *quantization, layout),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(got, want) and got.stride() == want.stride()
    for test in ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"):
        torch.library.opcheck(fused_attend, (*given, *quantization, layout), test_utils=test)


def test_torch_compile_keeps_the_order_of_appends_and_reads() -> None:
    def step(tensors: list[Tensor], key: Tensor, value: Tensor, query: Tensor, lengths: Tensor) -> Tensor:
        append(tensors, key, value, SLOTS, lengths)
        first = attend(tensors, query, SLOTS, lengths, None, None, None, 0.3, None, None, None)
        append(tensors, key * 2, value * 2, SLOTS, lengths)
        result: Tensor = first + attend(tensors, query, SLOTS, lengths, None, None, None, 0.3, None, None, None)
        return result

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    operands = (new(2, 2), new(2, 2), new(2, 4), LENGTHS)
    one, other = cache(), cache()
    assert torch.equal(compiled(one, *operands), step(other, *operands))
    assert torch.equal(one[0], other[0]) and bool(one[0].any())


def test_errors_name_the_operand() -> None:
    with pytest.raises(InputError, match="does not fit into the cache"):
        append(cache(), new(3, 2), new(3, 2), SLOTS, torch.tensor([0, 10]))
    key, value = cache()
    with pytest.raises(CodegenError, match="do not form a cache"):
        cache_tensors([key, value.bfloat16()])
    with pytest.raises(CodegenError, match="do not form a cache"):
        cache_tensors(cache(FP8_ROW)[:2])
    with pytest.raises(CodegenError, match=r"strides .* contiguous"):
        cache_tensors([key, value.transpose(1, 2)])
    with pytest.raises(CodegenError, match=r"got float32\[2, 2, 3, 8\].*need floating point \[batch, 2, tokens, 16\]"):
        check_rows(new(3, 2, 8), 2, 16, SLOTS, LENGTHS)
    with pytest.raises(CodegenError, match=r"the lengths must be .* got int32\[2\]; need int64\[2\]"):
        check_rows(new(3, 2), 2, 16, SLOTS, LENGTHS.int())
