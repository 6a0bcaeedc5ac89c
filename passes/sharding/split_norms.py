"""Takes norms apart that normalize along an axis that `shard` can cut, as over the queries of all heads together.

    %q = aten.linear(%x, %wq) : f32[s0, 512]
    %n = aten.rms_norm(%q, [512], %g, 1e-06)              … %n is divided into heads, and a linear sums over them
  ->
    %p = aten.mul.Tensor(%q, %q)
    %s = aten.sum.dim_IntList(%p, [-1], true)             one number for each token, which ranks can add
    %m = aten.div.Tensor(%s, 512.0)
    %e = aten.add.Tensor(%m, 1e-06)
    %r = aten.rsqrt(%e)
    %k = aten.mul.Tensor(%q, %r)
    %n = aten.mul.Tensor(%k, %g)

In FP32, rounded once. A mean that the model spells out becomes a sum and a quotient. Only where a region of
`passes.analyses.sharding_regions` could not be cut otherwise, and sums in one matmul only: a region of several matmuls
is a residual stream, whose norms read it whole. Runs before `shard`, which makes the sums partial.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from passes.analyses.sharding_cuts import Refused
from passes.analyses.sharding_regions import grow, matmul_sums, regions
from passes.sharding.region_options import RegionOptions
from qcompiler.ir import DType, Graph, Missed, Op, Rewriter, Value
from qcompiler.numerics.dtypes import torch_dtype
from qcompiler.pass_manager.pipeline import Effect


@dataclass(frozen=True)
class SplitNorms(RegionOptions):
    """rms_norm(q, [512], g)  ->  q * rsqrt(sum(q * q) / 512 + eps) * g, where a region cuts the axis."""

    name: ClassVar[str] = "split-norms"
    effect: ClassVar[Effect] = Effect.REORDERS
    absent: ClassVar[str] = "no norm is along an axis that could be cut"

    def run(self, graph: Graph) -> bool:
        """Takes the norms apart."""
        found, _ = self.norms(graph)
        for op in found:
            rewriter = Rewriter(graph, op, self.name)
            rewriter.replace(op, SPLIT[op.name](op, _Steps(rewriter)))
        return bool(found)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Why a norm is not taken apart although a region reaches it."""
        return {value.name: why.why for value, why in self.norms(graph)[1].items()}

    def norms(self, graph: Graph) -> tuple[list[Op], dict[Value, Missed]]:
        """The norms in regions that can be cut only without them, and why others are kept."""
        found: list[Op] = []
        missed: dict[Value, Missed] = {}
        owners = (
            {op for region in regions(graph, self.cutting)[0] for op in region.factors} if self.ranks > 1 else set()
        )
        starts = ((op, factor) for op, factor in matmul_sums(graph) if self.ranks > 1 and op not in owners)
        for op, factor in starts:
            try:
                region = grow(graph, op, factor, replace(self.cutting, split=True))
            except Refused as refused:
                value = refused.missed.value
                missed |= {value: refused.missed} if value is not None and value.op.name in SPLIT else {}
                continue
            if (why := region.why_not()) is not None:
                missed |= dict.fromkeys((norm.result for norm in region.norms), why)
            elif region.norms and owners.isdisjoint(region.factors):
                owners.update(region.factors)
                found += region.norms
        return found, missed


class _Steps:
    """Inserts arithmetic before a norm."""

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter

    def call(self, name: str, x: Value, *args: Any, **attrs: Any) -> Value:
        """An elementwise operation whose result has the shape of its first operand."""
        return self.rewriter.insert(name, x, *args, attrs=attrs, types=[x.tensor]).result

    def cast(self, x: Value, dtype: DType) -> Value:
        if x.tensor.dtype is dtype:
            return x
        kind = replace(x.tensor, dtype=dtype)
        return self.rewriter.insert("aten._to_copy", x, attrs={"dtype": dtype}, types=[kind]).result

    def mean(self, x: Value, axes: tuple[int, ...], keep: bool = True) -> Value:
        """A sum over axes of fixed sizes, then a quotient."""
        shape = x.tensor.shape
        gone = {axis % len(shape) for axis in axes}
        count = 1
        for axis in gone:
            count *= int(str(shape[axis]))
        left = tuple(1 if axis in gone else size for axis, size in enumerate(shape) if keep or axis not in gone)
        kinds = [replace(x.tensor, shape=left)]
        total = self.rewriter.insert("aten.sum.dim_IntList", x, axes, keep, types=kinds).result
        return self.call("aten.div.Tensor", total, float(count))


def _wide(dtype: DType) -> DType:
    return dtype if dtype.bits >= 32 else DType.f32


def _mean(op: Op, steps: _Steps) -> Value:
    kind, listed = op.result.tensor, op.argument("dim")
    every = range(len(op["self"].tensor.shape))
    axes = tuple(axis for axis in (listed if isinstance(listed, tuple) else every) if isinstance(axis, int))
    wide = steps.cast(op["self"], _wide(kind.dtype))
    return steps.cast(steps.mean(wide, axes, bool(op.argument("keepdim"))), kind.dtype)


def _rms_norm(op: Op, steps: _Steps) -> Value:
    x, axes = steps.cast(op["input"], _wide(op["input"].tensor.dtype)), _normalized(op)
    power = steps.mean(steps.call("aten.mul.Tensor", x, x), axes)
    return _scaled(op, steps, x, power)


def _layer_norm(op: Op, steps: _Steps) -> Value:
    x, axes = steps.cast(op["input"], _wide(op["input"].tensor.dtype)), _normalized(op)
    centered = steps.call("aten.sub.Tensor", x, steps.mean(x, axes))
    variance = steps.mean(steps.call("aten.mul.Tensor", centered, centered), axes)
    return _scaled(op, steps, centered, variance)


def _normalized(op: Op) -> tuple[int, ...]:
    shape = op.argument("normalized_shape")
    return tuple(range(-len(shape), 0)) if isinstance(shape, tuple) else (-1,)


def _scaled(op: Op, steps: _Steps, x: Value, power: Value) -> Value:
    """x * rsqrt(power + eps) * weight + bias, rounded to the type of the norm."""
    kind, eps = op.result.tensor, op.argument("eps")
    eps = torch.finfo(torch_dtype(kind.dtype)).eps if eps is None else eps
    y = steps.call("aten.mul.Tensor", x, steps.call("aten.rsqrt", steps.call("aten.add.Tensor", power, eps)))
    for name, does in (("weight", "aten.mul.Tensor"), ("bias", "aten.add.Tensor")):
        if op.get(name) is not None:
            y = steps.call(does, y, steps.cast(op[name], x.tensor.dtype))
    return steps.cast(y, kind.dtype)


SPLIT: Mapping[str, Callable[[Op, _Steps], Value]] = {
    "aten.mean.dim": _mean,
    "aten.rms_norm": _rms_norm,
    "aten.layer_norm": _layer_norm,
}
"""How each operation of `sharding_rules.NORMS` is taken apart."""
