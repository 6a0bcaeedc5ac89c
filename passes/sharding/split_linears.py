"""Splits linears that compute several projections at once, so that each of them can be cut: `qkv_proj`, `gate_up_proj`.

    %y = aten.linear(%x, %w) : f32[s0, 1024]
    %g, %u = aten.chunk(%y, 2, -1) : f32[s0, 512], f32[s0, 512]
  ->
    %w_part0 = core.param() {name = "w_part0"} : f32[512, 256]            rows 0 to 511 of w
    %w_part1 = core.param() {name = "w_part1"} : f32[512, 256]            rows 512 to 1023
    %y = aten.linear(%x, %w_part0) : f32[s0, 512]
    %u = aten.linear(%x, %w_part1) : f32[s0, 512]

A rank then holds its columns of each projection; equal parts of the columns together would be other heads, or the
columns of `gate` only. Only where `shard` can cut one of the projections. Linears of one input are merged again by
`merge-linears`, in the program of one rank. A part of a weight in a file is read alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from passes.analyses.constants import free_name
from passes.analyses.fused_linears import FusedLinear, Piece, Range, fused_linears
from passes.analyses.sharding_regions import regions, unit_of
from passes.analyses.sharding_rules import factor_at, row_of
from passes.sharding.on_mesh import keep_statistics
from passes.sharding.partition import cut_later, set_argument
from passes.sharding.region_options import RegionOptions
from passes.sharding.shard import is_placed
from passes.sharding.split_norms import SplitNorms
from qcompiler.ir import Derivation, Graph, Op, Rewriter, TensorType, Value, legal_name
from qcompiler.ir.dataflow import parameters_of, part_of
from qcompiler.ir.graph import PARAM
from qcompiler.ir.op import Path, map_tree
from qcompiler.pass_manager.pipeline import Effect


@dataclass(frozen=True)
class SplitLinears(RegionOptions):
    """split(linear(x, w), [512, 512])  ->  linear(x, w[:512]), linear(x, w[512:]), where a region cuts one of them."""

    name: ClassVar[str] = "split-linears"
    effect: ClassVar[Effect] = Effect.REORDERS
    absent: ClassVar[str] = "no linear computes several projections that could be cut"

    def run(self, graph: Graph) -> bool:
        """Splits the linears."""
        found, _ = self.plan(graph)
        for fused in found:
            Splitting(graph, fused, self.name).run()
        return bool(found)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Why a linear is not split although operations read ranges of its columns."""
        return {op.result.name: why for op, why in self.plan(graph)[1].items()}

    def plan(self, graph: Graph) -> tuple[list[FusedLinear], dict[Op, str]]:
        """The linears of which a part can be cut, but only if they are split, and why others are kept."""
        if self.ranks == 1 or is_placed(graph):
            return [], {}
        found, missed = fused_linears(graph, lambda op: unit_of(graph, op, self.cutting)[0])
        reasons = {op: str(why) for op, why in missed.items()}
        if not found:
            return [], reasons
        owned = {op for region in regions(graph, self.cutting)[0] for op in region.factors}
        reasons = {op: why for op, why in reasons.items() if op not in owned}
        return self.useful(graph, [fused for fused in found if fused.op not in owned], reasons)

    def useful(
        self, graph: Graph, found: list[FusedLinear], reasons: dict[Op, str]
    ) -> tuple[list[FusedLinear], dict[Op, str]]:
        """Splits all linears in a copy of the graph; returns the ones with a part to cut there, and other reasons."""
        trial = graph.clone()
        twins = dict(zip(graph, trial, strict=True))
        there = {fused.op: fused for fused in fused_linears(trial, lambda op: 1)[0]}
        parts = {fused.op: Splitting(trial, there[twins[fused.op]], self.name).run() for fused in found}
        SplitNorms(**{option.name: getattr(self, option.name) for option in fields(self)}).run(trial)
        cut, missed = regions(trial, self.cutting)
        owned = {op for region in cut for op in region.factors}
        wanted = [fused for fused in found if not owned.isdisjoint(parts[fused.op])]
        for fused in found:
            if fused not in wanted:
                why = [missed[part] for part in parts[fused.op] if part in missed]
                reasons[fused.op] = f"none of its parts can be cut: {why[0]}" if why else "none of its parts can be cut"
        return wanted, reasons


class Splitting:
    """Splits one linear into one for each range of its columns."""

    def __init__(self, graph: Graph, fused: FusedLinear, made_by: str) -> None:
        self.graph, self.fused, self.made_by = graph, fused, made_by
        self.before = Rewriter(graph, fused.op, made_by)

    def run(self) -> list[Op]:
        """The linears in its place; the first one takes over its name."""
        graph, op, ranges = self.graph, self.fused.op, self.fused.ranges
        suffixes = {columns: f"_part{at}" for at, columns in enumerate(ranges)}
        parts = {columns: self.part(columns, suffix) for columns, suffix in suffixes.items()}
        names: dict[Value, str] = {}
        for piece in self.fused.pieces:
            old, new = piece.value, self.moved(piece, parts[piece.columns], suffixes[piece.columns])
            keep_statistics(graph, old, new)
            graph.replace(old, new)
            names.setdefault(new, old.name)
        names[first := parts[ranges[0]]] = op.result.name
        weights = [param for _, value in op.operands() if graph.is_constant(value) for param in parameters_of(value)]
        for piece in self.fused.pieces:
            self.before.erase_unread(piece.value.op)
        for param in weights:
            if param not in graph and param.attrs["name"] in graph.weights:
                del graph.weights[str(param.attrs["name"])]
        for value, name in names.items():
            graph.rename(value, name)
        graph.remark(first, f"{len(ranges)} ranges of its columns are separate linears")
        return [part.op for part in parts.values()]

    def part(self, columns: Range, suffix: str) -> Value:
        """The linear of a range of columns."""
        op, size = self.fused.op, columns[1] - columns[0]
        given = {op.path(name): value for name in ("weight", "bias") if (value := op.get(name)) is not None}
        args = {path: self.cut(value, 0, columns, suffix) for path, value in given.items()}
        return again(self.before, op, args, resized(op.result, -1, size), suffix)

    def cut(self, value: Value, axis: int, wanted: Range, suffix: str) -> Value:
        """A range of a constant along an axis, computed from parts of weights."""
        op = value.op
        if op.name == PARAM:
            return part_of_weight(self.before, op, axis, wanted, suffix)
        factor, operands, args = factor_at(op, value.index, axis), dict(op.operands()), dict[Path, Value]()
        places = factor.places if factor is not None else ()
        own = next(place for place in places if place.slot == value.index)
        for place in places:
            if isinstance(place.slot, tuple):
                begin, end = (border // own.inner * place.inner for border in wanted)
                args[place.slot] = self.cut(operands[place.slot], place.axis, (begin, end), suffix)
        return again(self.before, op, args, resized(value, axis, wanted[1] - wanted[0]), suffix, axis)

    def moved(self, piece: Piece, value: Value, suffix: str) -> Value:
        """What a piece holds, computed from the linear of its columns."""
        here = Rewriter(self.graph, piece.value.op, self.made_by)
        old = self.fused.op.result
        for step in piece.steps:
            slot = next(path for path, operand in step.op.operands() if operand is old)
            old, axis = step.op.result, step.lie.axis
            value = again(here, step.op, {slot: value}, resized(old, axis, step.lie.size(piece.columns)), suffix, axis)
        if piece.gone is None:
            return value
        return here.insert("aten.select.int", value, piece.gone, 0, types=[piece.value.type]).result


def part_of_weight(rewriter: Rewriter, op: Op, axis: int, wanted: Range, suffix: str) -> Value:
    """A weight that is a range of another one along an axis; read when it is needed."""
    graph, name = rewriter.graph, str(op.attrs["name"])
    begin, end = wanted
    free = free_name(graph, f"{name}{suffix}")
    kind = resized(op.result, axis, end - begin)
    sliced = rewriter.insert("aten.slice.Tensor", op.result, axis, begin, end, types=[kind])
    graph.derivations[free] = Derivation(part_of(sliced), 0)
    graph.erase(sliced)
    if name in graph.weights:
        cut_later(graph.weights, name, axis, begin, end - begin, free)
    made = rewriter.insert(PARAM, attrs={**op.attrs, "name": free}, types=[kind], names=[legal_name(free)])
    return made.result


def again(
    rewriter: Rewriter, op: Op, args: Mapping[Path, Value], kind: TensorType, suffix: str, axis: int | None = None
) -> Value:
    """Repeats an operation with other operands, and another size of its result along an axis."""
    twins = {value: args[path] for path, value in op.operands() if path in args}

    def swap(leaf: Any) -> Any:
        return twins.get(leaf, leaf) if isinstance(leaf, Value) else leaf

    listed, attrs = (
        [map_tree(swap, arg) for arg in op.args],
        {key: map_tree(swap, arg) for key, arg in op.attrs.items()},
    )
    new = rewriter.insert(op.name, *listed, attrs=attrs, types=[kind], names=[f"{op.result.name}{suffix}"])
    row = row_of(op)
    if axis is not None and row is not None and row.sizes is not None:
        (key,) = new.path(row.sizes)
        sizes = new.argument(row.sizes)
        if isinstance(sizes, tuple) and sizes[axis] != -1:
            set_argument(rewriter.graph, new, key, (*sizes[:axis], kind.shape[axis], *sizes[axis + 1 :]))
    return new.result


def resized(value: Value, axis: int, size: int) -> TensorType:
    """The type of a value with another size along an axis."""
    shape = list(value.tensor.shape)
    shape[axis] = size
    return TensorType(value.tensor.dtype, tuple(shape))
