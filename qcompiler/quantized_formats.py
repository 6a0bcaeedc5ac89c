"""The format of a quantized matmul, spelled as the scheme that gives it.

    quant.linear {x_block = [1, 128], w_block = [128, 128]} of f8e4m3fn    ->    fp8_tile
    quant.linear {x_block = [-1, -1], w_block = [1, -1]} of i8             ->    int8_tensor{w=channel}

A format that no scheme has is spelled out: `f8e4m3fn [1, 32] x [1, -1]`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qcompiler.dialects.quant import block_of, is_static
from qcompiler.ir import DType, Op, Role, Value
from qcompiler.numerics import DEFAULT_PROFILE
from qcompiler.pipelines import W_BLOCKS
from qcompiler.schemes import SCHEMES, Scheme


@dataclass(frozen=True)
class Format:
    """How a matmul's operands are quantized.

    Attributes:
        dtype: Of the codes of both operands.
        x_block: Rows and columns of the activation that share a scale; -1 is the whole axis.
        w_block: The same for the weight, `[N, K]`.
        static: Whether the activation's scale is fixed.
        profile: The numerics profile by which the activation is quantized in each call.
    """

    dtype: DType
    x_block: tuple[int, int]
    w_block: tuple[int, int]
    static: bool = False
    profile: str = DEFAULT_PROFILE

    def __str__(self) -> str:
        spelled = [text for scheme in SCHEMES.values() for text in _spelled(scheme, self)]
        if spelled:
            return min(spelled, key=lambda text: text.count("="))
        return f"{self.dtype} {list(self.x_block)} x {list(self.w_block)}" + " static" * self.static


def format_of(op: Op) -> str:
    """The format of a matmul of quantized operands, fused or not; empty for anything else."""
    if op.role is Role.MATMUL:
        x, w = (value.op for _, value in list(op.operands())[:2])
        if (x.role, w.role) != (Role.DEQUANTIZE, Role.DEQUANTIZE):
            return ""
        return _format(x["data"], w["data"], block_of(x, "block"), block_of(w, "block"))
    if op.role is not Role.QUANTIZED_MATMUL:
        return ""
    return _format(op["x"], op["w"], block_of(op, "x_block"), block_of(op, "w_block"))


def _format(x: Value, w: Value, x_block: tuple[int, int], w_block: tuple[int, int]) -> str:
    profile = str(x.op.attrs.get("profile", DEFAULT_PROFILE))
    if x.tensor.dtype is not w.tensor.dtype:
        return f"{x.tensor.dtype} {list(x_block)} x {w.tensor.dtype} {list(w_block)}"
    return str(Format(x.tensor.dtype, x_block, w_block, is_static(x.op), profile))


def _spelled(scheme: Scheme, wanted: Format) -> Iterator[str]:
    """A scheme with the options that give a format, if they can; smoothing is no part of a format."""
    recipe = scheme.recipe
    if recipe is None or recipe.smooth != "never":
        return
    weights = next((w for w, block in W_BLOCKS.items() if block == wanted.w_block), recipe.w)
    options: dict[str, Any] = {"dtype": wanted.dtype, "w": weights, "numerics": wanted.profile}
    if recipe.x == "tile":
        options["k_block"] = wanted.x_block[1]
    changes = {name: value for name, value in options.items() if getattr(recipe, name) != value}
    if not changes.keys() <= {*scheme.options}:
        return
    _, step = replace(recipe, **changes).passes()
    found = Format(step.dtype, step.x_block, step.w_block, step.static, step.profile)
    if found == wanted:
        inside = ", ".join(f"{name}={value}" for name, value in changes.items())
        yield f"{scheme.name}{{{inside}}}" if inside else scheme.name
