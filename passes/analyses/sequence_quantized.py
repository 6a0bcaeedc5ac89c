"""Quantized operations, seen along the sequence: a scale for each row or tile is position-wise, a wider one is not."""

from passes.analyses.sequence_experts import grouped, reordered
from passes.analyses.sequence_labels import Axis, Label, Mixes, Order, axis_of, broadcast, has_tokens
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
    level = scales if site.op.format().level == "zero_point" else ()
    rest = [site.made(level, label) for _ in site.op.results[2:]]
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
    zero = site.label(f"{prefix}zero_point") if site.op.get(f"{prefix}zero_point") is not None else Label(())
    if scale.free and zero.free:
        return codes
    if site.op.format(f"{prefix}format").block[0] != 1:
        raise Mixes(f"the scales of '{data}' of {site.op.name} depend on the tokens, but span rows")
    lead = broadcast(*(Label(each.axes[:-1]) for each in (codes, scale, zero)))
    return site.made([*lead, codes.axes[-1]], codes, scale, zero)


def _dequantize(site: Site) -> Answer:
    label = _stored(site, "data", "")
    return site.made(label.axes, label)


def _sum_of_terms(site: Site, prefix: str) -> Label:
    """The label of a sum along the first axis, whose terms must belong to the same token."""
    label = _stored(site, "terms", prefix)
    site.within(label.axes[0], "adds")
    return site.made(label.axes[1:], label)


def _fused_sum_quantize(site: Site) -> Answer:
    others = [site.label(arg) for arg in site.op.rest if isinstance(arg, Value)]
    return _quantized(site, _joined(site, [_sum_of_terms(site, "term_"), *others]))


def linear(site: Site) -> Label:
    """The label of the result of a quantized matmul."""
    label = _matmul(site)
    return site.made([*label.axes[:-1], axis_of(site.shape()[-1])], label)


def _matmul(site: Site) -> Label:
    """The label of the activation of a quantized matmul, after its weight has been checked."""
    for name in ("w", "w_scale", "w_tensor_scale", "w_zero_point", "bias"):
        site.free(name)
    label = _stored(site, "x", "x_")
    site.within(label.axes[-1], "sums over")
    return label


def _grouped_linear(site: Site) -> Answer:
    site.free("w")
    site.free("w_scale")
    return grouped(site, _stored(site, "x", "x_"), site.op["offsets"], site.op["w"].tensor.shape[0])


def _gather_codes(site: Site) -> Answer:
    label, rows = _stored(site, "data", ""), site.op["rows"]
    order = site.fact(rows)
    if isinstance(order, Order):
        made = reordered(site, label, 0, order)
    else:
        site.within(label.axes[0], "picks among")
        made = site.made([*site.label(rows).axes, label.axes[1]], label, site.label(rows))
    return made, site.made([made.axes[0], axis_of(site.shape(1)[-1])], made)


def _joined(site: Site, labels: list[Label]) -> Label:
    """The label of a fused expression, which combines elements of one row."""
    made = site.made(broadcast(*labels), *labels)
    site.within(made.axes[-1], "combines")
    return made


def fused_quantize(site: Site) -> Answer:
    """A fused expression, which combines elements of one row, and its codes and scales."""
    return _quantized(site, _joined(site, site.tensors))


def _quantized(site: Site, label: Label) -> Answer:
    """The labels of codes and scales, and of residual outputs."""
    scales = _blocks(site, label, site.op.format())
    residuals = [label] * (len(site.op.results) - 2)
    return label, site.made(scales, label), *residuals


def _fused_linear(site: Site) -> Answer:
    matmul = _matmul(site)
    others = [site.label(arg) for arg in site.op.rest if isinstance(arg, Value)]
    label = _joined(site, [site.made([*matmul.axes[:-1], axis_of(site.shape()[-1])], matmul), *others])
    if len(site.op.results) == 1:
        return label
    return label, site.made(_blocks(site, label, site.op.format()), label)


QUANTIZED: Table = {
    "quant.quantize": Row("A scale belongs to one row, so to one token.", _quantize),
    "quant.quantize_static": Row("The scale does not depend on tokens.", _quantize_static),
    "quant.dequantize": Row("Codes and scale of a row belong to its token.", _dequantize),
    "quant.linear": Row("Row t of the result depends on row t of the codes.", linear),
    "quant.grouped_linear": Row("Each row is multiplied by the matrix of its own key.", _grouped_linear),
    "kernel.fused_quantize": Row("A fused expression combines elements of one row.", fused_quantize),
    "quant.sum_terms": Row("A sum of elements of one row.", lambda site: _sum_of_terms(site, "")),
    "kernel.fused_sum_quantize": Row("A sum and a fused expression of elements of one row.", _fused_sum_quantize),
    "kernel.gather_codes": Row("As the gather of the rows that were quantized.", _gather_codes),
    "kernel.fused_linear": Row("A fused expression combines elements of one row.", _fused_linear),
}
"""Quantized operation -> why and how it is position-wise; an operation that implements another one has its row."""
