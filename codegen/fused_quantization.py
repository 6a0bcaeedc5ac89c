"""Quantization on a GPU of rows that a body computes from those of other tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codegen.quantization import quantize_on_gpu
from qcompiler.body import parse


def fused_quantize_on_gpu(
    operands: Sequence[Tensor], body: str, keep: Sequence[str], block: Sequence[int], dtype: torch.dtype, profile: str,
    scale_layout: str,
) -> list[Tensor]:  # fmt: skip
    """The meaning of `kernel.fused_quantize` on a CUDA device, with the scales in the given layout."""
    result, *kept = parse(body).run({f"x{place}": x for place, x in enumerate(operands)}, keep)
    return [*quantize_on_gpu(result, block, dtype, profile, scale_layout, None), *kept]
