"""Gathering rows of codes on a Hopper GPU: bit-equal to the definition, in any number of rows."""

import pytest
import torch

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.operators.quantize import SCALE_LAYOUTS, scale_like

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
@pytest.mark.parametrize(
    ("tokens", "rows", "k", "block_k"),
    [
        (1, 1, 128, 128),
        (64, 512, 2048, 128),
        (4096, 8192, 4096, 128),
        (77, 301, 336, 128),
        (5, 9, 100, 32),
        (6, 9, 64, -1),
    ],
)
def test_rows_of_codes(tokens: int, rows: int, k: int, block_k: int, layout: str) -> None:
    data = torch.randn(tokens, k, device="cuda").to(torch.float8_e4m3fn)
    scale = scale_like(data, block_k, "col_major").copy_(torch.rand(tokens, 1 if block_k == -1 else -(-k // block_k)))
    index = torch.randint(-tokens, tokens, (rows,), device="cuda")
    for kind in (torch.int64, torch.int32):
        for _ in range(3):  # the third call is replayed
            q, s = torch.ops.qcompiler.gather_codes(data, scale, index.to(kind), [1, block_k], layout)
            assert torch.equal(q.view(torch.int8), data.view(torch.int8)[index])
            assert torch.equal(s, scale[index]) and s.stride() == scale_like(q, block_k, layout).stride()
    q, s = torch.ops.qcompiler.gather_codes(data, scale, index + 2 * tokens, [1, block_k], layout)
    assert bool(s.isnan().all()) and not q.view(torch.int8).any(), "these rows do not exist"
