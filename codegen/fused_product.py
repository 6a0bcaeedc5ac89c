"""The scaled product on a GPU with a body on its result, which may be quantized again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codegen.product import scaled_linear_on_gpu
from codegen.quantization import quantize_on_gpu
from qcompiler.body import parse


def fused_linear_on_gpu(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None, others: Sequence[Tensor],
    body: str, parts: int, x_block: Sequence[int], w_block: Sequence[int], block: Sequence[int] | None = None,
    dtype: torch.dtype | None = None, profile: str | None = None, scale_layout: str | None = None,
) -> list[Tensor]:  # fmt: skip
    """The meaning of `kernel.fused_linear` on a CUDA device."""
    sums = scaled_linear_on_gpu(x_q, x_s, w_q, w_s, bias, x_block, w_block, torch.float32)
    named = {f"x{place}": x for place, x in enumerate(others)}
    (result,) = parse(body).run(named | {f"y{place}": y for place, y in enumerate(sums.chunk(parts, -1))})
    if block is None or dtype is None or profile is None or scale_layout is None:
        return [result]
    return list(quantize_on_gpu(result, block, dtype, profile, scale_layout, None))
