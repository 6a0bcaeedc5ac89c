"""Quantized operations, seen along the sequence: a scale for each row or tile is position-wise, a wider one is not."""

from collections.abc import Callable

from passes.analyses.sequence_experts import grouped
from passes.analyses.sequence_labels import Axis, Label, Mixes, axis_of, broadcast, has_tokens
from passes.analyses.sequence_site import Answer, Row, Site, Table
from qcompiler.ir import ALL, Format, Value


def _blocks(site: Site, label: Label, format: Format) -> list[Axis]:
    """The axes of the scales of a value; raises Mixes if a scale is computed from several tokens."""
    *lead, last = label.axes
    if format.tensor_scale:
        _shared(site, label.axes, f"the tensor scale of {format} is")
    rows = format.block[0]
    if rows == ALL:
        _shared(site, lead, f"each scale of {format} is")
    elif rows != 1 and lead:
        _shared(site, lead[-1:], f"a scale of {format}, for blocks of {rows} rows, is")
    if format.block[1] != 1:
        site.within(last, "quantizes with one scale for")
    along = label.axes[-1] if format.block[1] == 1 else axis_of(site.shape(1)[-1])
    if rows == 1:
        return [*lead, along]
    return [axis_of(size) for size in site.shape(1)[:-1]] + [along]


def _shared(site: Site, axes: list[Axis] | tuple[Axis, ...], scale: str) -> None:
    if any(map(has_tokens, axes)):
        raise Mixes(
            f"{site.op.name} is not causal: {scale} computed from all tokens, so later tokens change earlier results;"
            " use a scheme with a scale for each row or tile, or with static scales"
        )


def _quantize(site: Site) -> Answer:
    label = site.label("x")
    site.free("prescale")
    scales = _blocks(site, label, site.op.format())
    rest = [site.made((), label) for _ in site.op.results[2:]]
    return site.made(label.axes, label), site.made(scales, label), *rest


def _quantize_static(site: Site) -> Answer:
    label = site.label("x")
    site.free("prescale")
    site.free("scale")
    return site.made(label.axes, label)


def _stored(site: Site, data: str, prefix: str) -> Label:
    """The label of codes and their scales, which must belong to the same tokens."""
    codes, scale = site.label(data), site.label(f"{prefix}scale")
    site.free(f"{prefix}tensor_scale")
    if scale.free:
        return codes
    if site.op.format(f"{prefix}format").block[0] != 1:
        raise Mixes(f"the scales of '{data}' of {site.op.name} depend on the tokens, but span rows")
    lead = broadcast(Label(codes.axes[:-1]), Label(scale.axes[:-1]))
    return site.made([*lead, codes.axes[-1]], codes, scale)


def _dequantize(site: Site) -> Answer:
    label = _stored(site, "data", "")
    return site.made(label.axes, label)


def _linear(site: Site) -> Answer:
    label = _product(site)
    return site.made([*label.axes[:-1], axis_of(site.shape()[-1])], label)


def _product(site: Site) -> Label:
    """The label of the activation of a quantized matmul, after its weight has been checked."""
    for name in ("w", "w_scale", "w_tensor_scale", "bias"):
        site.free(name)
    label = _stored(site, "x", "x_")
    site.within(label.axes[-1], "sums over")
    return label


def _grouped_linear(site: Site) -> Answer:
    site.free("w")
    site.free("w_scale")
    return grouped(site, _stored(site, "x", "x_"), site.op["offsets"], site.op["w"].tensor.shape[0])


def _joined(site: Site, labels: list[Label]) -> Label:
    """The label of a fused expression, which combines elements of one row."""
    made = site.made(broadcast(*labels), *labels)
    site.within(made.axes[-1], "combines")
    return made


def _fused_quantize(site: Site) -> Answer:
    label = _joined(site, site.tensors)
    scales = _blocks(site, label, site.op.format())
    kept = [label] * (len(site.op.results) - 2)
    return label, site.made(scales, label), *kept


def _fused_linear(site: Site) -> Answer:
    product = _product(site)
    others = [site.label(arg) for arg in site.op.rest if isinstance(arg, Value)]
    label = _joined(site, [site.made([*product.axes[:-1], axis_of(site.shape()[-1])], product), *others])
    if len(site.op.results) == 1:
        return label
    return label, site.made(_blocks(site, label, site.op.format()), label)


def _both(proof: str, apply: Callable[[Site], Answer], *names: str) -> Table:
    return {name: Row(proof, apply) for name in names}


QUANTIZED: Table = {
    **_both("A scale belongs to one row, so to one token.", _quantize, "quant.quantize", "kernel.quantize"),
    **_both(
        "The scale does not depend on tokens.", _quantize_static, "quant.quantize_static", "kernel.quantize_static"
    ),
    **_both("Codes and scale of a row belong to its token.", _dequantize, "quant.dequantize"),
    **_both("Row t of the result depends on row t of the codes.", _linear, "quant.linear", "kernel.scaled_linear"),
    **_both(
        "Each row is multiplied by the matrix of its own key.", _grouped_linear,
        "quant.grouped_linear", "kernel.grouped_linear",
    ),
    **_both("A fused expression combines elements of one row.", _fused_quantize, "kernel.fused_quantize"),
    **_both("A fused expression combines elements of one row.", _fused_linear, "kernel.fused_linear"),
}  # fmt: skip
"""Quantized operation -> why and how it is position-wise."""
