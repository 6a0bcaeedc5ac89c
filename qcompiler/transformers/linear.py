"""`QuantizedLinear`: an `nn.Linear` that holds codes and scales, and multiplies with the kernels.

y = x @ weight.T + bias    ->    y = scaled_linear(quantize(x), (weight, weight_scale)) + bias
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from codegen.direct import kernels
from codegen.launching.launch import FLOATS
from qcompiler import numerics
from qcompiler.errors import InputError
from qcompiler.ir import ALL, Format
from qcompiler.schemes.named import spec_of


class QuantizedLinear(nn.Linear):
    """A linear layer with a quantized weight, bit-equal to the same layer of `qcompiler.compile` before fusion.

    It is a frozen layer: gradients flow to its input and bias, through the dequantized weight.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether it adds a bias.
        scheme: The scheme, as text.
        prescaled: Whether the input is multiplied by a factor per channel before it is quantized.
        device: Where the tensors are.
        dtype: The dtype of the bias.

    Attributes:
        weight: Codes, FP8 or INT8 [N, K].
        weight_scale: FP32, in the shape of `numerics.scale_shape`.
        input_scale: The static scale of the input, FP32 [1]; None if each call computes the scale.
        input_prescale: The factors of the input's channels, FP32 [K]; None without.
        bias: [N], or None.
        compute_dtype: The dtype of the model, which adapters of peft take for their weights.
    """

    weight_scale: nn.Parameter
    input_scale: nn.Parameter | None
    input_prescale: nn.Parameter | None
    bias: nn.Parameter | None  # type: ignore[assignment]  # torch declares it as always present

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: str,
        *,
        prescaled: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        spec = spec_of(scheme)
        self.x_format, self.w_format = spec.x, spec.w
        shape = (out_features, in_features)
        scales = numerics.scale_shape(shape, spec.w.block)
        codes = torch.empty(shape, dtype=numerics.torch_dtype(spec.w.element), device=device)
        self.weight = frozen(codes)
        self.weight_scale = frozen(torch.empty(scales, dtype=torch.float32, device=device))
        self.input_scale = frozen(torch.empty(1, dtype=torch.float32, device=device)) if spec.static else None
        factors = torch.empty(in_features, dtype=torch.float32, device=device) if prescaled else None
        self.input_prescale = None if factors is None else frozen(factors)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.compute_dtype = torch.get_default_dtype() if dtype is None else dtype
        self._quantize = QuantizeInput(spec.x)
        self._blocks = [*spec.x.block], [*spec.w.block]

    def forward(self, input: Tensor) -> Tensor:
        """Returns [..., N] in the dtype of the input, float[..., K], or of an enclosing autocast."""
        if torch.is_autocast_enabled(device := input.device.type):
            with torch.autocast(device, enabled=False):  # the operators on a CPU multiply in FP32
                return self.forward(input.to(torch.get_autocast_dtype(device)))
        if input.dtype not in FLOATS:
            got = str(input.dtype).removeprefix("torch.")
            fix = "If the model casts inputs to the dtype of this weight, keep the layer in float: ignore=[pattern]."
            raise InputError("the input of a quantized layer has a wrong dtype", got=got, need="a float dtype", fix=fix)
        if torch.is_grad_enabled() and (input.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            found: Tensor = Differentiable.apply(input, self.bias, self)  # type: ignore[no-untyped-call]
            return found
        return self.multiply(input, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The quantized matmul, without gradients."""
        codes, scale = self._quantize(x, self.input_scale, self.input_prescale)
        x_block, w_block = self._blocks
        found: Tensor = kernels.scaled_linear(
            codes, scale, self.weight, self.weight_scale, bias, x_block, w_block, x.dtype
        )
        return found

    def stored(self) -> dict[str, nn.Parameter]:
        """Codes and scales by name."""
        found: dict[str, Any] = {
            "weight": self.weight,
            "weight_scale": self.weight_scale,
            "input_scale": self.input_scale,
            "input_prescale": self.input_prescale,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes, scales and factors of the input's channels stand for, [N, K]."""
        if self.input_prescale is None:
            return numerics.dequantize(self.weight, self.weight_scale, format=self.w_format, out_dtype=dtype)
        wide = numerics.dequantize(self.weight, self.weight_scale, format=self.w_format, out_dtype=torch.float32)
        return (wide * self.input_prescale).to(dtype)

    def extra_repr(self) -> str:
        """The sizes and the scheme."""
        return f"{super().extra_repr()}, scheme={self.scheme}{', prescaled' * (self.input_prescale is not None)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves codes and scales to other devices, and never casts them."""
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.weight.device)).dtype
        super()._apply(  # type: ignore[no-untyped-call]
            keeping_dtypes(fn, self.stored().values()), recurse
        )
        return self


class QuantizeInput:
    """Quantizes an activation in a format, with the layout of the scales that the GEMM kernels read."""

    def __init__(self, format: Format) -> None:
        layout = "col_major" if format.block[0] == 1 and format.block[1] != ALL else "row_major"
        self._block, self._profile, self._layout = [*format.block], format.profile, layout
        self._dtype = numerics.torch_dtype(format.element)

    def __call__(
        self, x: Tensor, static: Tensor | None = None, prescale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns codes and scales of `x`, times `prescale` if given; the given scale, if there is a static one."""
        if static is None:
            codes, scale = kernels.quantize(x, self._block, self._dtype, self._profile, self._layout, prescale)
            return codes, scale
        scale = static.view(numerics.scale_shape([1] * x.dim(), self._block))
        return kernels.quantize_static(x, scale, self._block, self._dtype, self._profile, prescale), scale


class Differentiable(torch.autograd.Function):
    """A quantized linear whose gradient ignores rounding: dx = dy @ dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        """Multiplies, and keeps the layer, not its dequantized weight."""
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.multiply(x, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Returns the gradients of the input and of the bias."""
        (dy,) = gradients
        dx = dy @ ctx.layer.dequantized(dy.dtype) if ctx.needs_input_grad[0] else None
        db = dy.flatten(0, -2).sum(0).to(ctx.layer.bias.dtype) if ctx.needs_input_grad[1] else None
        return dx, db, None


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter without gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def keeping_dtypes(fn: Callable[[Tensor], Tensor], tensors: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """The function of an `nn.Module._apply`, without casts of some tensors."""
    kept = {*map(id, tensors)}

    def apply(tensor: Tensor) -> Tensor:
        changed = fn(tensor)
        same = id(tensor) not in kept or changed.dtype is tensor.dtype
        return changed if same else tensor.to(changed.device)

    return apply
