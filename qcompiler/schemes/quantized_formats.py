"""Names the formats of a quantized matmul by the scheme that produces them.

    quant.linear {x_format = #fp8_tile, w_format = #fp8_block}       ->    fp8_tile
    quant.linear {x_format = #int8_tensor, w_format = #int8_row}     ->    int8_tensor{w=channel}

Formats without a scheme are printed in full: `#format<f8e4m3fn, block = [1, 32]> x #fp8_row`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qcompiler.dialects.quant import is_static
from qcompiler.ir import Format, Op, Role
from qcompiler.schemes.named import SCHEMES, W_BLOCKS, Scheme, changed


@dataclass(frozen=True)
class Formats:
    """The formats of the operands of a matmul.

    Attributes:
        x: The format of the activation.
        w: The format of the weight, `[N, K]`.
        static: Whether the activation scale is static.
    """

    x: Format
    w: Format
    static: bool = False

    @property
    def scheme(self) -> str | None:
        """The scheme that has these formats, with as few options as possible; None if there is none."""
        spelled = [text for scheme in SCHEMES.values() for text in _spelled(scheme, self)]
        return min(spelled, key=lambda text: text.count("="), default=None)

    def __str__(self) -> str:
        return self.scheme or f"{self.x} x {self.w}" + " static" * self.static


def format_of(op: Op) -> str:
    """The formats of a quantized matmul, fused or not; empty for other operations."""
    if op.role is Role.QUANTIZED_MATMUL:
        return str(_formats(op["x"].op, op.format("x_format"), op.format("w_format")))
    if op.role is Role.MATMUL:
        x, w = (value.op for _, value in list(op.operands())[:2])
        if x.role is w.role is Role.DEQUANTIZE:
            return str(_formats(x["data"].op, x.format(), w.format()))
    return ""


def _formats(producer: Op, x: Format, w: Format) -> Formats:
    """Uses the profile of the activation for the weight, whose profile may differ."""
    return Formats(replace(x, scale_layout="row_major"), replace(w, profile=x.profile), is_static(producer))


def _spelled(scheme: Scheme, wanted: Formats) -> Iterator[str]:
    """The scheme with options that produce the formats, if possible; formats do not include smoothing."""
    spec = scheme.spec
    if spec is None or spec.smooth != "never":
        return
    options: dict[str, Any] = {}
    if wanted.x.element is not spec.x.element:
        options["dtype"] = wanted.x.element
    if wanted.w.block != spec.w.block:
        options["w"] = next((name for name, block in W_BLOCKS.items() if block == wanted.w.block), None)
    if wanted.x.profile != spec.x.profile:
        options["numerics"] = wanted.x.profile
    if wanted.x.block != spec.x.block and wanted.x.block[0] == 1:
        options["k_block"] = wanted.x.block[1]
    if not options.keys() <= {*scheme.options}:
        return
    found = changed(spec, **options)
    if Formats(found.x, found.w, found.static) == wanted:
        inside = ", ".join(f"{name}={value}" for name, value in options.items())
        yield f"{scheme.name}{{{inside}}}" if inside else scheme.name
