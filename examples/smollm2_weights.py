"""What smoothing does to weights that have one scale: it moves the largest channel of an activation into one column.

weight_rows(model, texts)     the linears whose smoothed weight INT8 with one scale rounds worst
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from study_measures import Row
from torch import Tensor, nn

from qcompiler import numerics
from qcompiler.diagnostics.error_report import sqnr
from qcompiler.ir import Format
from qcompiler.ir.formats import INT8_ROW, INT8_TENSOR

WORST = 6
"""Rows of the table."""
READ_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of a Llama block that read one activation, so that one factor smooths all of them."""


def weight_rows(model: nn.Module, texts: Sequence[Tensor]) -> list[Row]:
    """Signal-to-noise ratios of weights in INT8, plain and smoothed with alpha 0.5, worst first.

    `spread` is the largest magnitude of an input channel over the median of all channels.
    """
    largest = largest_inputs(model, texts)
    rows = []
    for name, x in largest.items():
        w = weight(model, name)
        smoothed = w * factors(model, name, x)
        rows.append(
            {"layer": name.removeprefix("model."), "spread": float(x.max() / x.median()),
             "tensor_db": rounded(w, INT8_TENSOR), "smoothed_tensor_db": rounded(smoothed, INT8_TENSOR),
             "channel_db": rounded(w, INT8_ROW), "smoothed_channel_db": rounded(smoothed, INT8_ROW)}
        )  # fmt: skip
    return sorted(rows, key=lambda row: float(row["smoothed_tensor_db"]))[:WORST]


@torch.no_grad()
def largest_inputs(model: nn.Module, texts: Sequence[Tensor]) -> Mapping[str, Tensor]:
    """The largest magnitude of each input channel, f32[K], of the linears of all blocks."""
    found: dict[str, Tensor] = {}

    def observe(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].float().abs().flatten(0, -2).amax(0)
            found[name] = torch.maximum(found.get(name, seen), seen)

        return hook

    linears = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and ".layers." in name}
    hooks = [each.register_forward_pre_hook(observe(name)) for name, each in linears.items()]
    for ids in texts:
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def factors(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """s = sqrt(max|x| / max|W|) for each input channel, over all weights that read the activation."""
    parent, _, kind = name.rpartition(".")
    together = next((names for names in READ_TOGETHER if kind in names), (kind,))
    w = torch.cat([weight(model, f"{parent}.{each}") for each in together]).abs().amax(0)
    return (x / w).sqrt().clamp(1e-4, 1e4)


def weight(model: nn.Module, name: str) -> Tensor:
    """A weight in FP32."""
    found: Tensor = model.get_submodule(name).weight.detach().float()  # type: ignore[operator]  # a linear
    return found


def rounded(w: Tensor, format: Format) -> float:
    """The ratio of a weight to the error of quantizing it, in dB."""
    return sqnr(w, numerics.dequantize(*numerics.quantize(w, format), format=format))
