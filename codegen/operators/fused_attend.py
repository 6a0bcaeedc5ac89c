"""The operator `fused_attend`: `attend_to_cache`, whose rows are quantized for the output projection.

On a GPU the kernel that writes the result quantizes it, too. A chunk of a prompt, which torch's kernel attends, is
quantized by a second kernel. Codes and scales have the bits that the separate operators give.
"""

from typing import Any

import torch
from torch import Tensor

from codegen.launching.replay import empty, replayed
from codegen.operators.attend_to_cache import (
    ATTENTION_ARGUMENTS,
    Attention,
    attend_to_cache_fake,
    attend_to_cache_on_cpu,
    chunk_of,
    launch_attention,
)
from codegen.operators.operator import Operator, declare
from codegen.operators.quantize import check_layout, quantize_fake, quantize_on_cpu, quantize_on_gpu, scale_sizes
from codegen.templates.attend_to_cache import QuantizedRows
from qcompiler import numerics

QUANTIZATION = 4
"""The last arguments: block, dtype, profile, and layout of the scales."""


def fused_attend_on_gpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Attention as `attend_to_cache_on_gpu`, quantized: codes `[batch, tokens, heads * value size]` and scales.

    Raises:
        CodegenError: As `attend_to_cache_on_gpu` and `quantize_on_gpu`.
    """
    given, (block, *rest) = Attention(*arguments[:-QUANTIZATION]), arguments[-QUANTIZATION:]
    if (chunk := chunk_of(given)) is not None:
        return quantize_on_gpu(_rows(chunk), block, *rest)
    return replayed(_run, ("fused_attend", *given.numbers, *block, *rest), given.tensors, given, block, *rest)


def _run(given: Attention, block: list[int], dtype: torch.dtype, profile: str, layout: str) -> tuple[Tensor, Tensor]:
    check_layout(block, layout)
    numerics.profile(profile)
    batch, tokens, heads, value_size = given.shape
    shape, device = (batch, tokens, heads * value_size), given.query.device
    sizes, strides = scale_sizes(shape, block[1], layout)
    codes, scale = empty(shape, dtype, device), empty(sizes, torch.float32, device, strides)
    launch_attention(given, QuantizedRows(codes, scale, block[1], profile))
    return codes, scale


def _rows(out: Tensor) -> Tensor:
    """The heads of each token as one row."""
    return out.transpose(1, 2).flatten(2)


def _on_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    return quantize_on_cpu(
        _rows(attend_to_cache_on_cpu(*arguments[:-QUANTIZATION])), *arguments[-QUANTIZATION:]
    )  # fmt: skip


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return quantize_fake(_rows(attend_to_cache_fake(*arguments[:-QUANTIZATION])), *arguments[-QUANTIZATION:])


FUSED_ATTEND_SCHEMA = (
    f"fused_attend({ATTENTION_ARGUMENTS}, int[] block, ScalarType dtype, str profile, str scale_layout) "
    "-> (Tensor, Tensor)"
)
declare(Operator(FUSED_ATTEND_SCHEMA, _on_cpu, fused_attend_on_gpu, _fake, runs="state.fused_attend"))
