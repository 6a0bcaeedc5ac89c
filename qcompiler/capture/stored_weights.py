"""Weights that a model holds in 8 bits, as codes and scales: in a captured graph they are `quant.dequantize` of both.

    linear.weight: F8_E4M3, linear.weight_scale_inv: F32
  ->
    %w = quant.dequantize(%linear.weight, %linear.weight_scale_inv) {format = #fp8_block, out_dtype = bf16}
    %y = aten.linear(%x, %w)

Beside them a checkpoint may have a static scale for the activation, which the operation carries as `x_scale`.

`hold` makes a module's attribute mean the numbers, while codes and scales stay its parameters, under their own names:
any code that reads the attribute runs, eagerly and traced, and nothing is dequantized for good. `readable` does that to
modules of others, such as those into which transformers loads FP8 checkpoints, for the duration of a capture.
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
from qcompiler.numerics import ALL

STORED_WEIGHT = "qcompiler.stored_weight"
"""The operator of torch that a trace has for one."""

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
USABLE = "finite numbers that are not negative"  # what scales must be, for messages
SCALE = "_scale_inv"
"""What transformers' modules put behind the name of a weight for that of its scale."""
X_SCALE = "activation_scale"
"""The static scale of an activation in transformers' FP8Linear."""

_NOTES = "_qcompiler_notes"


@dataclass(frozen=True)
class Stored:
    """How one attribute of a module is held.

    Attributes:
        scale: The name of its scale in the same module.
        block: Rows and columns that share a scale; -1 is the whole of an axis.
        dtype: What the module computes in.
        x_scale: The static scale of the module's input, an FP32 number; None if the checkpoint has none.
        whole: Whether the checkpoint has one scale for a matrix of a stack, here the scale of each of its blocks.
    """

    scale: str
    block: tuple[int, int]
    dtype: torch.dtype
    x_scale: float | None = None
    whole: bool = False


@torch.library.custom_op("qcompiler::stored_weight", mutates_args=())
def stored_weight(
    codes: Tensor, scale: Tensor, block: list[int], dtype: torch.dtype, x_scale: float | None = None
) -> Tensor:
    """The numbers that codes and scales stand for: `numerics.dequantize`. `x_scale` is only recorded in the trace."""
    return numerics.dequantize(codes, scale, format=numerics.format_of(block, codes.dtype), out_dtype=dtype)


@stored_weight.register_fake
def _(codes: Tensor, scale: Tensor, block: list[int], dtype: torch.dtype, x_scale: float | None = None) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


def hold(module: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Makes attributes of a module mean what their codes and scales stand for."""
    kind = type(module)
    properties: dict[str, Any] = {name: property(_reader(name, how)) for name, how in stored.items()}
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    module.__class__ = type(
        kind.__name__, (kind,), {**names, "stored_weights": {**held(module), **stored}, **properties}
    )


def held(module: nn.Module) -> Mapping[str, Stored]:
    """What `hold` was told of a module; nothing for any other."""
    found: Mapping[str, Stored] = getattr(type(module), "stored_weights", {})
    return found


@contextmanager
def readable(model: nn.Module) -> Iterator[None]:
    """While it lasts, the FP8 weights of a model can be read as numbers.

    Raises:
        CaptureError: An FP8 weight has no scale, or one that does not say what it is for, is not finite, or negative.
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
    """The FP8 weights of somebody else's module, and how they are to be read."""
    if held(module):
        return {}
    weights = [key for key, tensor in module._parameters.items() if tensor is not None and tensor.dtype in FP8]
    # Code of somebody's own may know what its weights mean; a linear only multiplies with them.
    read = [key for key in weights if hasattr(module, key + SCALE) or isinstance(module, nn.Linear)]
    return {key: _described(module, key, f"{name}.{key}" if name else key, model) for key in read}


def _described(module: nn.Module, key: str, name: str, model: nn.Module) -> Stored:
    scale = getattr(module, key + SCALE, None)
    if not isinstance(scale, Tensor):
        raise CaptureError(
            f"the weight {name!r} is FP8 and has no scale, so that nobody knows its numbers",
            need=f"a scale beside it, called '{key}{SCALE}'",
            fix="Read the checkpoint with qcompiler.checkpoints.load_model(folder).",
        )
    if not scale.is_meta and (why := unusable(scale)) is not None:
        raise CaptureError(f"the scale of {name!r} is not a scale", got=why, need=USABLE, where=f"{name}{SCALE}")
    return Stored(key + SCALE, _block(module, scale, name), _dtype(model), _x_scale(module, key, name))


def _block(module: nn.Module, scale: Tensor, name: str) -> tuple[int, int]:
    """What a scale is for, as the module says; one number can only be for the whole."""
    said = getattr(module, "block_size", None)
    if said is not None:
        return int(said[0]), int(said[1])
    if scale.numel() == 1:
        return ALL, ALL
    raise CaptureError(
        f"the weight {name!r} does not say which of its elements share a scale",
        got=f"scales {list(scale.shape)}", need=f"'block_size' in its {type(module).__name__}",
    )  # fmt: skip


def _x_scale(module: nn.Module, key: str, name: str) -> float | None:
    """The static scale of the activation beside a weight of transformers' FP8Linear."""
    scale = getattr(module, X_SCALE, None) if key == "weight" else None
    if not isinstance(scale, Tensor) or scale.is_meta:
        return None
    return one_number(scale, f"the activation scale beside {name!r}")


def one_number(scale: Tensor, what: str) -> float:
    """The only number in a scale, widened to FP32; CaptureError if there are several, or it is not positive."""
    numbers = scale.detach().to(torch.float32).flatten().tolist()
    if len(numbers) != 1 or not (math.isfinite(numbers[0]) and numbers[0] > 0):
        got = numbers[0] if len(numbers) == 1 else f"{list(scale.shape)} numbers"
        raise CaptureError(f"{what} is not a scale", got=got, need="one positive finite number")
    return float(numbers[0])


def knows_x_scales(model: nn.Module) -> bool:
    """Whether a model has static activation scales beside weights that it holds in 8 bits."""
    stored = (
        how
        for name, module in model.named_modules()
        for how in (held(module) or stored_in(module, name, model)).values()
    )
    return any(how.x_scale is not None for how in stored)


def add_notes(model: nn.Module, notes: Iterable[str]) -> None:
    """Attaches sentences about a model's checkpoint to the model, for the report."""
    model.__dict__[_NOTES] = (*notes_of(model), *notes)


def notes_of(model: nn.Module) -> tuple[str, ...]:
    """What `add_notes` left."""
    found: tuple[str, ...] = model.__dict__.get(_NOTES, ())
    return found


def _dtype(model: nn.Module) -> torch.dtype:
    """What a model computes in: as its configuration says, or as its first other weight is."""
    said = getattr(getattr(model, "config", None), "dtype", None)
    if isinstance(said, torch.dtype):
        return said
    usual = (torch.bfloat16, torch.float16, torch.float32)
    names = (name for name, _ in model.named_parameters() if SCALE not in name)
    return next((dtype for name in names if (dtype := model.get_parameter(name).dtype) in usual), torch.bfloat16)


def _reader(name: str, how: Stored) -> Any:
    def read(module: nn.Module) -> Tensor:
        codes, scale = module._parameters[name], getattr(module, how.scale)
        if codes is None or codes.itemsize > 1:  # cast by somebody: then it is what it looks like
            return codes  # type: ignore[return-value]
        shape = numerics.scale_shape(codes.shape, how.block)
        wide, block = widened(scale, shape), list(how.block)
        numbers: Tensor = torch.ops.qcompiler.stored_weight(codes, wide, block, how.dtype, how.x_scale)
        return numbers

    return read


def widened(scale: Tensor, shape: list[int]) -> Tensor:
    """A scale as checkpoints have it, in FP32 and in the shape that blocks ask for; exact.

    Args:
        scale: FP32, FP16, BF16, or one byte that is the exponent of a power of two, as such or as a plain byte.
        shape: With as many elements.
    """
    scale = scale.view(torch.float8_e8m0fnu) if scale.dtype is torch.uint8 else scale
    scale = scale if scale.dtype is torch.float32 else scale.to(torch.float32)
    return scale if list(scale.shape) == shape else scale.reshape(shape)


def unusable(scale: Tensor) -> str | None:
    """Why a scale as checkpoints have it cannot be one: its first NaN, infinite or negative element, with its index.

    None if all elements are right; zero is.
    """
    numbers = widened(scale.detach(), list(scale.shape))
    if not numbers.numel():
        return None
    low, high = numbers.aminmax()  # NaN if there is one
    if low >= 0 and high < float("inf"):
        return None
    wrong = ~(numbers.isfinite() & (numbers >= 0))
    at = wrong.nonzero()[0].tolist()
    return f"{numbers[tuple(at)].item():g} at {at}" if at else f"{numbers.item():g}"
