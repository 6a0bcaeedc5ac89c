"""Weights that a model holds in 8 bits, as codes and scales; a captured graph shows them as `quant.dequantize`.

    linear.weight: F8_E4M3, linear.weight_scale_inv: F32
  ->
    %w = quant.dequantize(%linear.weight, %linear.weight_scale_inv) {format = #fp8_block, out_dtype = bf16}
    %y = aten.linear(%x, %w)

A checkpoint may also contain a static scale for the activation, which the operation carries as `x_scale`.

If smoothing left factors that no weight absorbs, the codes quantize the weight divided by the factors, and the
forward method of the module multiplies its input by them:

    %p = aten.mul.Tensor(%x, %linear.input_prescale)
    %y = aten.linear(%p, %w)

`hold` makes a module's attribute return the dequantized weight, while codes and scales remain its parameters, under
their own names: all code that reads the attribute works, eagerly and traced, and nothing stays dequantized. `readable`
does this for other modules, such as those into which transformers loads FP8 checkpoints, during a capture.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler import numerics
from qcompiler.errors import CaptureError
from qcompiler.ir import Format
from qcompiler.numerics import ALL
from qcompiler.numerics.dtypes import ir_dtype

STORED_WEIGHT = "qcompiler.stored_weight"
"""The torch operator that represents such a weight in a trace."""

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
USABLE = "finite numbers that are not negative"  # requirement on scales, for messages
SCALE = "_scale_inv"
"""Suffix that transformers' modules add to a weight's name for its scale."""
X_SCALE = "activation_scale"
"""Name of an activation's static scale in transformers' FP8Linear."""

_NOTES = "_qcompiler_notes"


@dataclass(frozen=True)
class Stored:
    """How one attribute of a module is stored.

    Attributes:
        scale: The name of its scale in the same module.
        format: The format of codes and scale; the module may hold the scale in another dtype.
        dtype: The compute dtype of the module.
        x_scale: The static scale of the module's input, an FP32 number; None if the checkpoint has none.
        whole: Whether the checkpoint has one scale per matrix of a stack, here repeated for each of its blocks.
        prescale: The name of the factors of the input channels in the same module, an `nn.Linear`, if there are any.
    """

    scale: str
    format: Format
    dtype: torch.dtype
    x_scale: float | None = None
    whole: bool = False
    prescale: str | None = None


@torch.library.custom_op("qcompiler::stored_weight", mutates_args=())
def stored_weight(
    codes: Tensor, scale: Tensor, block: list[int], dtype: torch.dtype, x_scale: float | None = None
) -> Tensor:
    """Dequantizes codes and scales: `numerics.dequantize`. `x_scale` is only recorded in the trace."""
    return numerics.dequantize(codes, scale, format=numerics.format_of(block, codes.dtype), out_dtype=dtype)


@stored_weight.register_fake
def _(codes: Tensor, scale: Tensor, block: list[int], dtype: torch.dtype, x_scale: float | None = None) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


def hold(module: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Makes attributes of a module return their dequantized codes and scales."""
    kind = type(module)
    properties: dict[str, Any] = {name: property(_reader(name, how)) for name, how in stored.items()}
    for name, how in stored.items():
        if how.prescale is not None:
            properties["forward"] = _prescaled(name, how)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    module.__class__ = type(
        kind.__name__, (kind,), {**names, "stored_weights": {**held(module), **stored}, **properties}
    )


def held(module: nn.Module) -> Mapping[str, Stored]:
    """Returns the arguments of `hold` for a module; empty for any other module."""
    found: Mapping[str, Stored] = getattr(type(module), "stored_weights", {})
    return found


@contextmanager
def readable(model: nn.Module) -> Iterator[None]:
    """Temporarily makes the FP8 weights of a model readable as numbers.

    Raises:
        CaptureError: An FP8 weight has no scale, or its scale is ambiguous, not finite, or negative.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for name, module in model.named_modules():
            if found := stored_in(module, name, model):
                changed.append((module, type(module)))
                hold(module, found)
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind


def stored_in(module: nn.Module, name: str, model: nn.Module) -> dict[str, Stored]:
    """Returns the FP8 weights of a third-party module, and how to read them."""
    if held(module):
        return {}
    weights = [key for key, tensor in module._parameters.items() if tensor is not None and tensor.dtype in FP8]
    # Third-party code may interpret its weights differently; a linear only multiplies with them.
    read = [key for key in weights if hasattr(module, key + SCALE) or isinstance(module, nn.Linear)]
    return {key: _described(module, key, f"{name}.{key}" if name else key, model) for key in read}


def _described(module: nn.Module, key: str, name: str, model: nn.Module) -> Stored:
    scale = getattr(module, key + SCALE, None)
    if not isinstance(scale, Tensor):
        raise CaptureError(
            f"the FP8 weight {name!r} has no scale, so its values are unknown",
            need=f"a scale beside it, called '{key}{SCALE}'",
            fix="Read the checkpoint with qcompiler.checkpoints.load_model(folder).",
        )
    if not scale.is_meta and (why := unusable(scale)) is not None:
        raise CaptureError(f"the scale of {name!r} is not a valid scale", got=why, need=USABLE, where=f"{name}{SCALE}")
    format = Format(ir_dtype(module.get_parameter(key).dtype), _block(module, scale, name))
    return Stored(key + SCALE, format, _dtype(model), _x_scale(module, key, name))


def _block(module: nn.Module, scale: Tensor, name: str) -> tuple[int, int]:
    """Returns the block of a scale, as declared by the module; a single number applies to the whole weight."""
    said = getattr(module, "block_size", None)
    if said is not None:
        return int(said[0]), int(said[1])
    if scale.numel() == 1:
        return ALL, ALL
    raise CaptureError(
        f"the module of weight {name!r} does not say which elements share a scale",
        got=f"scales {list(scale.shape)}",
        need=f"'block_size' in its {type(module).__name__}",
    )


def _x_scale(module: nn.Module, key: str, name: str) -> float | None:
    """Returns the static activation scale of a weight of transformers' FP8Linear."""
    scale = getattr(module, X_SCALE, None) if key == "weight" else None
    if not isinstance(scale, Tensor) or scale.is_meta:
        return None
    return one_number(scale, f"the activation scale beside {name!r}")


def one_number(scale: Tensor, what: str) -> float:
    """Returns the only number in a scale, widened to FP32; CaptureError if there are several, or it is not positive."""
    numbers = scale.detach().to(torch.float32).flatten().tolist()
    if len(numbers) != 1 or not (math.isfinite(numbers[0]) and numbers[0] > 0):
        got = numbers[0] if len(numbers) == 1 else f"{list(scale.shape)} numbers"
        raise CaptureError(f"{what} is not a valid scale", got=got, need="one positive finite number")
    return float(numbers[0])


def knows_x_scales(model: nn.Module) -> bool:
    """Whether a model has static activation scales for weights that it holds in 8 bits."""
    stored = (
        how
        for name, module in model.named_modules()
        for how in (held(module) or stored_in(module, name, model)).values()
    )
    return any(how.x_scale is not None for how in stored)


def knows_prescales(model: nn.Module) -> bool:
    """Whether a module of a model multiplies its input by the factors of smoothing."""
    return any(how.prescale is not None for module in model.modules() for how in held(module).values())


def add_notes(model: nn.Module, notes: Iterable[str]) -> None:
    """Attaches notes on a model's checkpoint to the model, for the report."""
    model.__dict__[_NOTES] = (*notes_of(model), *notes)


def notes_of(model: nn.Module) -> tuple[str, ...]:
    """Returns the notes of `add_notes`."""
    found: tuple[str, ...] = model.__dict__.get(_NOTES, ())
    return found


def _dtype(model: nn.Module) -> torch.dtype:
    """Returns the compute dtype of a model: from its configuration, or of its first other weight."""
    said = getattr(getattr(model, "config", None), "dtype", None)
    if isinstance(said, torch.dtype):
        return said
    usual = (torch.bfloat16, torch.float16, torch.float32)
    names = (name for name, _ in model.named_parameters() if SCALE not in name)
    return next((dtype for name in names if (dtype := model.get_parameter(name).dtype) in usual), torch.bfloat16)


def _reader(name: str, how: Stored) -> Any:
    def read(module: nn.Module) -> Tensor:
        codes = module._parameters[name]
        if codes is None or codes.itemsize > 1:  # converted since `hold`: use it as it is
            return codes  # type: ignore[return-value]
        numbers = _dequantized(module, codes, how)
        return numbers if how.prescale is None else (numbers * _factors(module, how)).to(how.dtype)

    return read


def _prescaled(name: str, how: Stored) -> Any:
    """The forward method of an `nn.Linear` whose input is multiplied in FP32."""

    def forward(module: Any, input: Tensor) -> Tensor:
        codes = module._parameters[name]
        if codes.itemsize > 1:  # as above
            return nn.functional.linear(input, codes, module.bias)
        scaled = (input * _factors(module, how)).to(input.dtype)
        return nn.functional.linear(scaled, _dequantized(module, codes, how), module.bias)

    return forward


def _dequantized(module: nn.Module, codes: Tensor, how: Stored) -> Tensor:
    wide = widened(getattr(module, how.scale), numerics.scale_shape(codes.shape, how.format.block))
    numbers: Tensor = torch.ops.qcompiler.stored_weight(codes, wide, list(how.format.block), how.dtype, how.x_scale)
    return numbers


def _factors(module: nn.Module, how: Stored) -> Tensor:
    factors: Tensor = getattr(module, str(how.prescale))
    return factors.to(torch.float32)


def widened(scale: Tensor, shape: list[int]) -> Tensor:
    """Converts a scale of a checkpoint to FP32, in the shape that blocks require; exact.

    Args:
        scale: FP32, FP16, BF16, or one byte with the exponent of a power of two, in a float or an integer dtype.
        shape: A shape with as many elements.
    """
    scale = scale.view(torch.float8_e8m0fnu) if scale.dtype is torch.uint8 else scale
    scale = scale if scale.dtype is torch.float32 else scale.to(torch.float32)
    return scale if list(scale.shape) == shape else scale.reshape(shape)


def unusable(scale: Tensor) -> str | None:
    """Describes why a checkpoint's scale is unusable: its first NaN, infinite or negative element, with its index.

    None if there is none; zero is usable.
    """
    numbers = widened(scale.detach(), list(scale.shape))
    if not numbers.numel():
        return None
    low, high = numbers.aminmax()  # NaN if any element is NaN
    if low >= 0 and high < float("inf"):
        return None
    wrong = ~(numbers.isfinite() & (numbers >= 0))
    at = wrong.nonzero()[0].tolist()
    return f"{numbers[tuple(at)].item():g} at {at}" if at else f"{numbers.item():g}"
