"""Applies a solved scale region: divides the producers of scaled values by s, multiplies the weights that read them.

    %y = aten.linear(%x, %w)
  ->
    %x.smooth = core.param() {name = "x.smooth"} : f32[256]
    %w_scaled_f32 = aten.mul.Tensor(%w, %x.smooth) : f32[512, 256]
    %w_scaled = aten._to_copy(%w_scaled_f32) {dtype = bf16} : bf16[512, 256]
    %y = aten.linear(%x, %w_scaled)

No parameter changes: each operation that absorbs a factor reads its own constant expression, so weights shared with
other operations stay the same.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from passes.analyses.channel_labels import UNSCALED, Labels, last_axis
from passes.analyses.channel_scale import LINEAR, PARAMETERS, Absorber, ScaleRegion
from passes.analyses.constants import new_parameter, times
from qcompiler.errors import PassError
from qcompiler.ir import Argument, Graph, Op, Rewriter, TensorType, Value
from qcompiler.ir.op import Path

MATRIX = (LINEAR, "weight")
"""The parameter whose rows a factor multiplies."""


def fold(graph: Graph, region: ScaleRegion, s: torch.Tensor, made_by: str, stem: str) -> None:
    """Divides the channels of `region.value` by `s`, and multiplies the weights that read them.

    Values keep their names and types, and outputs are equal except for rounding: bit-exact in f32 and bf16 if `s` holds
    powers of two and nothing leaves the range of its type.

    Args:
        graph: The graph that the region was solved in; other regions may have been folded since.
        region: What `passes.analyses.channel_scale.solve` found.
        s: FP32 [channels], positive, finite, equal within each class of the region; on the device of the weights.
        made_by: The pass that applies it, for locations.
        stem: Base name of the added weights: `stem` for s, `stem_inverse` for 1/s.

    Raises:
        PassError: `s` is not such a vector, or an operation of the region is no longer in the graph.
    """
    _check(graph, region, s, made_by)
    factors = _Factors(s.detach(), stem)
    edits: dict[Op, _Edit] = {}
    for absorber in region.absorbers:
        edits.setdefault(absorber.op, _Edit()).absorbers.append(absorber)
    for linear in region.linears:
        edits.setdefault(linear.op, _Edit()).columns = np.array(linear.labels)
    for op in [op for op in graph if op in edits]:
        _rewrite(op, edits[op], factors, Rewriter(graph, op, made_by))


def spread(vector: torch.Tensor, labels: Labels) -> torch.Tensor:
    """The entries of `vector` at the labels, in the labels' shape; 1 for UNSCALED."""
    at = torch.from_numpy(np.array(labels)).to(vector.device)
    return torch.where(at == UNSCALED, vector.new_ones(()), vector[at.clamp(min=0)])


def _check(graph: Graph, region: ScaleRegion, s: torch.Tensor, made_by: str) -> None:
    """Raises PassError unless `s` is a legal scale of the region and the region is still in the graph."""
    where, need = f"pass '{made_by}'", f"f32[{len(region.classes)}], positive and finite"
    if s.dtype is not torch.float32 or s.shape != (len(region.classes),):
        got = f"{s.dtype} of shape {list(s.shape)}"
        raise PassError(f"the scale of {region.value} has the wrong type or shape", got=got, need=need, where=where)
    if not (s.isfinite() & (s > 0) & (1 / s).isfinite()).all():
        bad = [float(factor) for factor in s if not 0 < factor < torch.inf or not (1 / factor).isfinite()]
        raise PassError(f"the scale of {region.value} has invalid entries", got=bad[0], need=need, where=where)
    first: dict[int, int] = {}
    lead = [first.setdefault(group, channel) for channel, group in enumerate(region.classes)]
    if differ := (s != s[lead]).nonzero().flatten().tolist():
        raise PassError(
            f"channels {lead[differ[0]]} and {differ[0]} of {region.value} must have the same scale",
            got=f"{float(s[lead[differ[0]]])} and {float(s[differ[0]])}",
            need="equal entries in each class",
            where=where,
        )
    if gone := [op for op in _ops(region) if op not in graph]:
        fix = "Solve the scale region again after changing the graph."
        raise PassError(f"{gone[0].name} of the scale region of {region.value} left the graph", where=where, fix=fix)


def _ops(region: ScaleRegion) -> list[Op]:
    return [*(absorber.op for absorber in region.absorbers), *(linear.op for linear in region.linears)]


@dataclass
class _Edit:
    """The changes at one operation: factors that it absorbs, and the labels of its weight's columns."""

    absorbers: list[Absorber] = field(default_factory=list)
    columns: Labels | None = None


class _Factors:
    """The factor vectors; each is one parameter, created before its first user."""

    def __init__(self, s: torch.Tensor, stem: str) -> None:
        self.s, self.stem = s, stem
        self.made: dict[tuple[object, ...], Value] = {}

    def divide(self, labels: Labels, rewriter: Rewriter) -> Value:
        """1 / s, indexed by labels."""
        return self.param(1 / self.s, f"{self.stem}_inverse", labels, rewriter)

    def multiply(self, labels: Labels, rewriter: Rewriter) -> Value:
        """The scale itself, indexed by labels."""
        return self.param(self.s, self.stem, labels, rewriter)

    def param(self, vector: torch.Tensor, name: str, labels: Labels, rewriter: Rewriter) -> Value:
        """A parameter that holds a vector indexed by labels; reused for equal numbers."""
        tensor = spread(vector, labels)
        key = (name, *tensor.shape, tensor.cpu().numpy().tobytes())
        if key not in self.made:
            self.made[key] = new_parameter(rewriter, name, tensor)
        return self.made[key]


def _rewrite(op: Op, edit: _Edit, factors: _Factors, rewriter: Rewriter) -> None:
    """Multiplies the operands of one operation: constants and parameters by 1/s, the weight by s."""
    wanted: dict[Path, list[Value]] = {}
    for absorber in edit.absorbers:
        if absorber.kind == "constant":
            wanted[absorber.path] = [factors.divide(absorber.labels, rewriter)]
            continue
        rows = factors.divide(last_axis(absorber.labels, op.results[0].tensor.shape[-1]), rewriter)
        for name in PARAMETERS[op.name]:
            if op.argument(name) is not None:
                wanted[op.path(name)] = [_column(rewriter, rows) if (op.name, name) == MATRIX else rows]
    if edit.columns is not None:
        wanted.setdefault(op.path("weight"), []).append(factors.multiply(edit.columns, rewriter))
    args, attrs = op.args, dict(op.attrs)
    for path, by in wanted.items():
        old = _at(op, path)
        new = times(rewriter, old, by, f"{old.name}_scaled")
        if isinstance(path[0], int):
            args = tuple(_put(arg, path[1:], new) if at == path[0] else arg for at, arg in enumerate(args))
        else:
            attrs[path[0]] = _put(attrs.get(path[0]), path[1:], new)
    rewriter.graph.set_args(op, args, attrs)


def _at(op: Op, path: Path) -> Value:
    """The value at a path."""
    return next(value for at, value in op.operands() if at == path)


def _put(arg: Argument, path: Path, new: Value) -> Argument:
    """An argument with the leaf at `path` replaced."""
    if not path or not isinstance(arg, tuple):
        return new
    return tuple(_put(item, path[1:], new) if at == path[0] else item for at, item in enumerate(arg))


def _column(rewriter: Rewriter, vector: Value) -> Value:
    """A vector as a matrix of one column, to scale the rows of a matrix."""
    kind = TensorType(vector.tensor.dtype, (*vector.tensor.shape, 1))
    return rewriter.insert("aten.unsqueeze", vector, 1, types=[kind], names=[f"{vector.name}_column"]).result
