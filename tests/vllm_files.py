"""Tensors of quantized linears as files have them, for tests of vLLM's layers; needs no vLLM."""

from typing import Any

import torch
from exact_sums import integers
from torch import Tensor

from qcompiler import numerics
from qcompiler.schemes.named import spec_of
from qcompiler.schemes.pipelines import QuantizationSpec

HEADS, KV_HEADS, HEAD, DEPTH = 6, 2, 32, 160  # widths 192, 64 and 64
PARTS = ("q_proj", "k_proj", "v_proj")


def as_spec(scheme: str | QuantizationSpec) -> QuantizationSpec:
    """The quantization spec of a scheme, also of one without a name."""
    return spec_of(scheme) if isinstance(scheme, str) else scheme


def files(scheme: str | QuantizationSpec, widths: tuple[int, ...], depth: int = DEPTH) -> list[dict[str, Tensor]]:
    """The tensors of some linears."""
    spec, found = as_spec(scheme), []
    for at, width in enumerate(widths):
        codes, scale = numerics.quantize(integers(width, depth, at) * 4.0**at, spec.w)[:2]
        static = {"input_scale": torch.tensor([(1 + at // 2) / 64])} if spec.static else {}
        found.append({"weight": codes, "weight_scale": scale, **static, "bias": torch.randn(width).bfloat16()})
    return found


def load(layer: Any, tensors: dict[str, Tensor], *shard: Any) -> None:
    for name, tensor in tensors.items():
        getattr(layer, name).weight_loader(getattr(layer, name), tensor, *shard)


def reference(scheme: str | QuantizationSpec, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The linear in plain operations of `numerics`."""
    spec, prescale = as_spec(scheme), tensors.get("input_prescale")
    if spec.static:
        x_s = tensors["input_scale"].reshape(1, 1)
        x_q = numerics.quantize_static(x, x_s, spec.x, prescale)
    else:
        x_q, x_s = numerics.quantize(x, spec.x, prescale)[:2]
    return numerics.scaled_linear(
        x_q, x_s, tensors["weight"], tensors["weight_scale"], tensors.get("bias"), x_format=spec.x, w_format=spec.w
    )
