"""Attention of a chunk over the stored keys and values: equal to `state.attend` for every start and format."""

import pytest
import torch
from torch import Tensor

from codegen.operators.chunk_attention import LEAST_TOKENS, attend_to_chunk, stored, why_not_chunk
from qcompiler import numerics
from qcompiler.dialects import state
from qcompiler.ir import CacheType, DType, Format
from qcompiler.ir.formats import FP8_ROW, INT8_ROW
from qcompiler.runtime.caches import allocate

SLOTS = torch.tensor([2, 0])
TOKENS = 7


def filled(element: DType | Format, start: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """A cache of 3 slots of 24 positions with `start` + 7 positions in two of them, and queries of four heads."""
    torch.manual_seed(start)
    cache = allocate(CacheType(element, 3, 2, 24, 16, 16), torch.device("cpu")).tensors
    new = torch.randn(2, 2, start + TOKENS, 16, dtype=dtype)
    state.append(cache, new, new.flip(2), SLOTS, torch.zeros(2, dtype=torch.int64))
    return cache, torch.randn(2, 4, TOKENS, 16, dtype=dtype)


@pytest.mark.parametrize("start", [0, 9])
@pytest.mark.parametrize("element", [DType.f32, FP8_ROW, INT8_ROW], ids=str)
def test_a_chunk_attends_to_what_the_cache_stores(element: DType | Format, start: int) -> None:
    cache, query = filled(element, start, torch.float32)
    lengths = torch.full((2,), start)
    want = state.attend(cache, query, SLOTS, lengths, start=start, scale=0.25)
    got = attend_to_chunk(cache, query, SLOTS, start, 0.25)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # the order of additions
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("format", [FP8_ROW, INT8_ROW], ids=str)
def test_stored_values_are_rounded_once(format: Format) -> None:
    cache, _ = filled(format, 9, torch.bfloat16)
    for index, got in enumerate(stored(cache, SLOTS, 9 + TOKENS, torch.bfloat16)):
        exact = numerics.dequantize(cache[index], cache[2 + index][..., None], format=format)[SLOTS, :, : 9 + TOKENS]
        assert torch.equal(got, exact.to(torch.bfloat16))


def test_which_chunks_torch_runs() -> None:
    long = LEAST_TOKENS
    cache = [torch.empty(1, 2, 2 * long, 64, dtype=torch.bfloat16, device="meta")] * 2
    query = torch.empty(1, 4, long, 64, dtype=torch.bfloat16, device="meta")
    assert why_not_chunk(cache, query, long, None, beside=False) is None
    assert why_not_chunk(cache, query, 0, long, beside=False) is None, "the window hides nothing"
    for reason, queries, start, reach, beside in (
        ("it has 511 tokens", query[:, :, 1:], 0, None, False),
        ("it ends at position 1025", query, long + 1, None, False),
        ("its mask of 1023 positions hides some of 1024", query, long, 2 * long - 1, False),
        ("torch's kernels have no limit", query, 0, None, True),
        ("torch's kernels do not compute in torch.float32", query.float(), 0, None, False),
    ):
        assert str(why_not_chunk(cache, queries, start, reach, beside=beside)).startswith(reason)
    latent = [cache[0], torch.empty(1, 2, 2 * long, 32, dtype=torch.bfloat16, device="meta")]
    assert str(why_not_chunk(latent, query, 0, None, beside=False)).startswith("its heads of 64 and 32 elements")
