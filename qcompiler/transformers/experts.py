"""`QuantizedExperts`: the experts of a mixture in transformers' stacked layout, as codes and scales.

    gate_up_proj [E, 2 I, H], down_proj [E, H, I]
    ->
    the same names with codes, and gate_up_proj_scale, down_proj_scale

Rows are sorted by expert and multiplied by `grouped_linear`, as in transformers' `grouped_mm` implementation, which the
compiler captures, too. The router chooses experts as before.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from codegen.direct import kernels
from qcompiler import numerics
from qcompiler.schemes.named import spec_of
from qcompiler.transformers.linear import QuantizeInput, frozen, keeping_dtypes

UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"
"""Names of the parameters: of the first matmul, with or without a gate, and of the second."""

FLAGS = {"is_transposed": False, "has_bias": False, "has_post_expert_norm": False, "_is_expert_parallel": False}
"""Attributes of transformers' experts, and the values that are supported."""


class QuantizedExperts(nn.Module):
    """Replaces a module of stacked experts; frozen, but differentiable in its input.

    Args:
        experts: The module, whose activation and gate are kept.
        scheme: The scheme, as text.
        device: Where codes and scales are.

    Attributes:
        scheme: The scheme, as text.
        stacked: Names of the parameters with codes; their scales have the suffix `_scale`.
    """

    num_experts: int
    act_fn: Any

    def __init__(self, experts: nn.Module, scheme: str, *, device: torch.device | None = None) -> None:
        super().__init__()
        vars(self).update({name: value for name, value in vars(experts).items() if name[0] != "_"})
        for name, child in experts.named_children():
            self.add_module(name, child)
        self._apply_gate: Any = getattr(type(experts), "_apply_gate", None)
        self.scheme, spec = scheme, spec_of(scheme)
        self.x_format, self.w_format = spec.x, spec.w
        self.stacked = [*stacked_weights(experts)]
        for name, weight in stacked_weights(experts).items():
            codes = torch.empty(weight.shape, dtype=numerics.torch_dtype(spec.w.element), device=device)
            scales = numerics.scale_shape(weight.shape, spec.w.block)
            self.register_parameter(name, frozen(codes))
            self.register_parameter(f"{name}_scale", frozen(torch.empty(scales, dtype=torch.float32, device=device)))
        self._quantize = QuantizeInput(spec.x)
        self._blocks = [*spec.x.block], [*spec.w.block]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns the weighted sum of the chosen experts, [T, H].

        Args:
            hidden_states: float[T, H].
            top_k_index: The experts of each token, i64[T, k].
            top_k_weights: Their weights, float[T, k].
        """
        count, chosen = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1))
        counted = experts.float() if experts.device.type == "cpu" else experts.int()  # what histc supports
        sizes = torch.histc(counted, bins=self.num_experts, min=0, max=self.num_experts - 1)
        offsets = torch.cumsum(sizes, dim=0, dtype=torch.int32)
        first, second = self.stacked
        inner = self.multiply(hidden_states[order // chosen], first, offsets)
        inner = self._apply_gate(self, inner) if first == UP[0] else self.act_fn(inner)
        outer = self.multiply(inner, second, offsets) * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        places = torch.empty_like(order)
        places[order] = torch.arange(order.numel(), device=order.device)
        return outer[places].view(count, chosen, -1).sum(dim=1).to(hidden_states.dtype)

    def multiply(self, x: Tensor, name: str, offsets: Tensor) -> Tensor:
        """Multiplies the rows of each expert, float[T, K], by its matrix in the parameter `name`."""
        if torch.is_autocast_enabled(device := x.device.type):
            with torch.autocast(device, enabled=False):  # as in `QuantizedLinear`
                return self.multiply(x.to(torch.get_autocast_dtype(device)), name, offsets)
        if torch.is_grad_enabled() and x.requires_grad:
            found: Tensor = DifferentiableGroups.apply(x, self, name, offsets)  # type: ignore[no-untyped-call]
            return found
        return self.grouped(x, name, offsets)

    def grouped(self, x: Tensor, name: str, offsets: Tensor) -> Tensor:
        """The quantized grouped matmul, without gradients."""
        codes, scale = self._quantize(x)
        weight = self.get_parameter(name), self.get_parameter(f"{name}_scale")
        x_block, w_block = self._blocks
        found: Tensor = kernels.grouped_linear(codes, scale, *weight, offsets, x_block, w_block, x.dtype)
        return found

    def stored(self) -> dict[str, nn.Parameter]:
        """Codes and scales by name."""
        return {name: self.get_parameter(name) for each in self.stacked for name in (each, f"{each}_scale")}

    def extra_repr(self) -> str:
        """The scheme."""
        return f"num_experts={self.num_experts}, scheme={self.scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves codes and scales to other devices, and never casts them."""
        super()._apply(keeping_dtypes(fn, self.stored().values()), recurse)  # type: ignore[no-untyped-call]
        return self


class DifferentiableGroups(torch.autograd.Function):
    """A quantized grouped matmul whose gradient ignores rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedExperts, name: str, offsets: Tensor) -> Tensor:
        """Multiplies, and keeps the layer, not its dequantized weights."""
        ctx.layer, ctx.name = layer, name
        ctx.save_for_backward(offsets)
        return layer.grouped(x, name, offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Returns the gradient of the rows: dy @ the dequantized matrix of their expert."""
        (dy,), (offsets,) = gradients, ctx.saved_tensors
        codes, scale = (ctx.layer.get_parameter(name) for name in (ctx.name, f"{ctx.name}_scale"))
        dx = dy.new_zeros(dy.shape[0], codes.shape[2])
        start = 0
        for expert, end in enumerate(offsets.tolist()):
            if end > start:
                w = numerics.dequantize(codes[expert], scale[expert], format=ctx.layer.w_format, out_dtype=dy.dtype)
                dx[start:end] = dy[start:end] @ w
            start = end
        return dx, None, None, None


def stacked_weights(experts: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module of stacked experts, in the order of its matmuls; empty for any other module."""
    own = dict(experts.named_parameters(recurse=False))
    first = next((name for name in UP if name in own), None)
    if first is None or {*own} != {first, DOWN} or any(weight.dim() != 3 for weight in own.values()):
        return {}
    return {first: own[first], DOWN: own[DOWN]}


def why_not_experts(experts: nn.Module, w_rows: int) -> str | None:
    """Why a module of stacked experts cannot be replaced; None if it can.

    Args:
        experts: The module.
        w_rows: Rows of a block of the weights.
    """
    weights = stacked_weights(experts)
    if not weights:
        return f"its module is {type(experts).__name__}, not nn.Linear"
    if strange := next((name for name, value in FLAGS.items() if getattr(experts, name, value) != value), None):
        return f"its experts have {strange.removeprefix('_')}, which is not supported in transformers"
    first, weight = next(iter(weights.items()))
    rows = weight.shape[1] // 2 if first == UP[0] else weight.shape[1]
    if rows % w_rows:
        return f"an expert has {rows} rows, not a multiple of {w_rows}, so it cannot be stored by itself"
    return None


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model that hold stacked experts, by name."""
    yield from ((name, module) for name, module in model.named_modules() if stacked_weights(module))
