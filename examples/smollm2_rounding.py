"""Which part of smoothquant_o1 costs SmolLM2-135M-Instruct its perplexity: smoothing, or one scale for each weight.

    rounding_rows(model, texts, calibration)     the perplexity with each part alone, by rounding operands in torch

Each linear multiplies in bf16 what INT8 would hold: x / s with one scale per token, and W · s with one scale, or with
one per output channel.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import smollm2
import torch
from smollm2_weights import factors, largest_inputs, weight
from study_measures import Row
from torch import Tensor, nn
from transformers import PreTrainedModel

from qcompiler import numerics
from qcompiler.ir import Format
from qcompiler.ir.formats import INT8_ROW, INT8_TENSOR

SPIKES = ("model.layers.11.mlp.down_proj", "model.layers.28.mlp.down_proj")
"""The layers whose weight smoothing makes most uneven."""


def rounding_rows(model: PreTrainedModel, texts: Sequence[Tensor], calibration: Sequence[Tensor]) -> list[Row]:
    """One row for each combination; the weights of the model are restored."""
    inputs = largest_inputs(model, calibration)
    names, none = tuple(inputs), ()
    scales = {name: factors(model, name, x) for name, x in inputs.items()}
    neutral = {name: torch.ones_like(x) for name, x in inputs.items()}
    combinations: dict[str, tuple[Mapping[str, Tensor], Sequence[str]]] = {
        "not smoothed, one scale per weight": (neutral, none),
        "not smoothed, one per output channel": (neutral, names),
        "smoothed, one scale per weight": (scales, none),
        "smoothed, one per output channel in two layers": (scales, SPIKES),
        "smoothed, one per output channel": (scales, names),
    }
    exact = smollm2.perplexity(model, [*texts])
    rows: list[Row] = [{"rounding": "none", "perplexity": exact, "increase": 0.0}]
    for label, (smoothing, by_channel) in combinations.items():
        found = rounded_perplexity(model, texts, smoothing, by_channel)
        rows.append({"rounding": label, "perplexity": found, "increase": math.log(found / exact)})
        print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def rounded_perplexity(
    model: PreTrainedModel, texts: Sequence[Tensor], scales: Mapping[str, Tensor], by_channel: Sequence[str]
) -> float:
    """The perplexity if the operands of all linears that `scales` names are rounded."""
    linears = {name: model.get_submodule(name) for name in scales}
    kept = {name: linear.weight.data for name, linear in linears.items()}
    hooks = []
    for name, linear in linears.items():
        format = INT8_ROW if name in by_channel else INT8_TENSOR
        linear.weight.data = rounded(weight(model, name) * scales[name], format).to(kept[name].dtype)
        hooks.append(linear.register_forward_pre_hook(partial(round_input, scales[name])))
    found = smollm2.perplexity(model, [*texts])
    for hook in hooks:
        hook.remove()
    for name, linear in linears.items():
        linear.weight.data = kept[name]
    return found


def round_input(scale: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """A hook: the input of a linear, smoothed and rounded with one scale per token."""
    return rounded(inputs[0].float() / scale, INT8_ROW).to(inputs[0].dtype)


def rounded(tensor: Tensor, format: Format) -> Tensor:
    """What a format holds of a tensor, in FP32."""
    return numerics.dequantize(*numerics.quantize(tensor, format), format=format)
