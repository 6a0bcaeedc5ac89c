"""SmoothQuant: scales the channels of activations down and the columns of weights up, before anything is quantized.

    %n = aten.rms_norm(%h, [256], %gain, 1e-6)          %g = gain · (1 / s)
    %y = aten.linear(%n, %w)                     ->     %n = aten.rms_norm(%h, [256], %g, 1e-6)
                                                        %w_s = w · s
                                                        %y = aten.linear(%n, %w_s)

A group is an activation with all of its users, found from the dataflow (`analyses.channel_scale`). If the producer of
the activation can absorb 1/s, the pass folds it in and compensates every user, quantized or not. If not, the quantized
users read the activation multiplied by 1/s, which fuse-prescale then fuses into their quantization. A remark on each
linear says which was done and why, and whether smoothing makes a weight that has one scale too uneven.

Source of the method: Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models, ICML 2023.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from passes.analyses.candidates import NOT_CANDIDATES, is_stored_quantized
from passes.analyses.channel_labels import last_axis
from passes.analyses.channel_scale import ScaleRegion, solve
from passes.analyses.constants import new_parameter, times
from passes.quantizing.calibrate import calibration_of, statistics_of
from passes.quantizing.scheme_options import SchemeOptions
from passes.smoothing.scale_fold import fold, spread
from passes.smoothing.smooth_scales import (
    Alpha,
    SmoothedLinear,
    by_formula,
    by_learning,
    by_search,
    largest,
    lost_to_smoothing,
    output_error,
    to_powers_of_two,
)
from qcompiler.calibration import Statistics
from qcompiler.errors import PassError
from qcompiler.interpreter import evaluate
from qcompiler.ir import ALL, DType, Graph, Missed, Op, Rewriter, Value
from qcompiler.pass_manager.pipeline import Effect

MOST_LOST = 10.0
"""The dB that the rounding of a weight with one scale may lose to smoothing without a remark."""


@dataclass(frozen=True)
class Group:
    """An activation and its users.

    Attributes:
        value: The activation to smooth.
        region: The values that must be scaled together if 1/s can be folded in; else the reason why it cannot.
        quantized: The linears that the scheme quantizes, with the channel of each of their inputs.
        others: The linears that are only compensated.
    """

    value: Value
    region: ScaleRegion | Missed
    quantized: Mapping[Op, Tensor]
    others: Mapping[Op, Tensor]


@dataclass(frozen=True)
class SmoothQuant(SchemeOptions):
    """linear(norm(h, g), w)  ->  linear(norm(h, g / s), w · s).

    Attributes:
        alpha: How much of an activation's outliers moves to the weights, from 0 to 1; "search" chooses the best of a
            few for each group, "learn" continues from that by gradient descent on log s.
        pow2: Whether s is rounded to powers of two; folding is then bit-exact, barring overflow and underflow.
        min_gain: Skips a group unless smoothing reduces its error by this fraction, measured on rows not used to choose
            s; None always smooths.
        prescale: Whether to multiply before the quantization if 1/s cannot be folded in.
    """

    name: ClassVar[str] = "smoothquant"
    effect: ClassVar[Effect] = Effect.REORDERS

    alpha: Alpha = 0.5
    pow2: bool = False
    min_gain: float | None = None
    prescale: bool = True

    def __post_init__(self) -> None:
        """Raises PassError for an alpha outside 0 to 1. With powers of two, the pass declares itself exact."""
        super().__post_init__()
        if isinstance(self.alpha, float) and not 0 <= self.alpha <= 1:
            raise PassError("option 'alpha' of pass 'smoothquant' is out of range", got=self.alpha, need="0 to 1")
        if self.pow2:
            object.__setattr__(self, "effect", Effect.EXACT)

    def why_not_stored(self, w: Value) -> Missed | None:
        """A weight stored as codes and scales cannot absorb a factor."""
        if is_stored_quantized(w):
            return Missed("its weight is stored quantized, and smoothing would quantize it again", w)
        return None

    def run(self, graph: Graph) -> bool:
        """Processes groups from top to bottom."""
        self.check_layers(graph)
        done: set[Op] = set()
        changed = False
        for op in graph.ops("aten.linear"):
            if op in done or self.why_not(op, graph):
                continue
            group = self.group_of(op, graph)
            done.update(group.quantized)
            changed |= self.smooth(group, graph)
        return changed

    def explain(self, graph: Graph) -> dict[str, str]:
        """Why linears are not candidates; the candidates get remarks."""
        reasons = {op.result.name: self.why_not(op, graph) for op in graph.ops("aten.linear")}
        return {name: str(why) for name, why in reasons.items() if why and str(why) not in NOT_CANDIDATES}

    def group_of(self, op: Op, graph: Graph) -> Group:
        """All values that are scaled with the input of `op`."""
        value = op["input"]
        region = solve(graph, value)
        if isinstance(region, ScaleRegion):
            linears = {linear.op: torch.tensor(linear.labels) for linear in region.linears}
            quantized = {op: labels for op, labels in linears.items() if self.why_not(op, graph) is None}
            others = {op: labels for op, labels in linears.items() if op not in quantized}
            return Group(value, region, quantized, others)
        channels = torch.arange(int(value.tensor.shape[-1]))  # type: ignore[arg-type]  # a candidate's is fixed
        same = [user for user in graph.users(value) if user.name == "aten.linear" and user["input"] is value]
        return Group(value, region, {op: channels for op in same if self.why_not(op, graph) is None}, {})

    def smooth(self, group: Group, graph: Graph) -> bool:
        """Chooses and applies the scale of a group; returns whether it did."""
        folded = isinstance(group.region, ScaleRegion)
        if not folded and not self.prescale:
            return self.remark(graph, group, f"not smoothed: {group.region}; prescale is off")
        if all(statistics_of(graph, op["input"]).unseen for op in group.quantized):
            return self.remark(graph, group, "not smoothed: calibration saw no token, so its scale is neutral")
        scale, why = self.choose(group, graph)
        if scale is None:
            return self.remark(graph, group, f"not smoothed: {why}")
        lost = self.lost(group, scale, graph)
        stem = f"{group.value.name}.smooth"
        if isinstance(group.region, ScaleRegion):
            self.fold_in(group.region, scale, stem, graph)
            self.remark(graph, group, f"smoothed, {why}: 1/s is folded into {_absorbers(group.region)}", lost)
        else:
            self.put_in_front(group, scale, stem, graph)
            self.remark(graph, group, f"smoothed, {why}: 1/s is multiplied separately, since {group.region}", lost)
        return True

    # The scale

    def choose(self, group: Group, graph: Graph) -> tuple[Tensor | None, str]:
        """The scale of a group, FP32 `[channels]`, and how it was found; or None, and the reason."""
        weights = {op: _weight(op, graph) for op in (*group.quantized, *group.others)}
        device = next(iter(weights.values())).device
        size = int(group.value.tensor.shape[-1])  # type: ignore[arg-type]  # a candidate's is fixed
        tied = group.region.classes if isinstance(group.region, ScaleRegion) else range(size)
        classes = torch.tensor(list(tied), device=device)
        labels = {op: found.to(device) for op, found in (*group.quantized.items(), *group.others.items())}
        seen = {op: statistics_of(graph, op["input"]) for op in group.quantized}
        x_max = largest([seen[op].absmax for op in seen], [labels[op] for op in seen], classes)
        w_max = largest([weights[op].abs().amax(0) for op in weights], [labels[op] for op in weights], classes)
        linears = [
            SmoothedLinear(weights[op], labels[op], _rows(found, device), found.absmax.to(device))
            for op, found in seen.items()
        ]
        scale, how = self.fit(x_max, w_max, classes, linears)
        if self.min_gain is not None:
            scale_or_none, verdict = self.judged(scale, linears)
            return scale_or_none, f"{how}, {verdict}" if scale_or_none is not None else verdict
        return scale, how

    def fit(self, x_max: Tensor, w_max: Tensor, classes: Tensor, linears: list[SmoothedLinear]) -> tuple[Tensor, str]:
        """The scale that the options ask for, and a note on how it was found."""
        if isinstance(self.alpha, float):
            scale = by_formula(x_max, w_max, self.alpha)
            return to_powers_of_two(scale) if self.pow2 else scale, f"alpha {self.alpha:g}"
        half = [linear.part(0) for linear in linears]
        scale = by_search(x_max, w_max, half, self, self.pow2)
        if self.alpha == "search":
            return scale, "alpha by search"
        learned = by_learning(scale, classes, half, self)
        rounded = to_powers_of_two(learned) if self.pow2 else learned
        return min((scale, rounded), key=lambda each: output_error(each, half, self)), "s learned"

    def judged(self, scale: Tensor, linears: list[SmoothedLinear]) -> tuple[Tensor | None, str]:
        """The scale, if it reduces the error enough on rows it was not fitted to, and a text with both errors."""
        unseen = [linear.part(1) for linear in linears]
        plain, smoothed = (output_error(each, unseen, self) ** 0.5 for each in (torch.ones_like(scale), scale))
        words = f"error {plain:.3g} -> {smoothed:.3g}"
        enough = smoothed < plain * (1 - (self.min_gain or 0))
        return (scale, words) if enough else (None, f"it would not reduce the error enough ({words})")

    # The graph

    def fold_in(self, region: ScaleRegion, scale: Tensor, stem: str, graph: Graph) -> None:
        """Scales the region and its calibration statistics."""
        fold(graph, region, scale, self.name, stem)
        known = calibration_of(graph)
        after = {}
        for value, labels in region.scaled.items():
            if value.name in known.statistics and labels.size == labels.shape[-1] == value.tensor.shape[-1]:
                factor = spread(1 / scale.cpu(), last_axis(labels, labels.shape[-1]))
                after[value.name] = known.statistics[value.name].scaled(factor)
        graph.calibration = known.updated(after)

    def put_in_front(self, group: Group, scale: Tensor, stem: str, graph: Graph) -> None:
        """Multiplies the inputs of the quantized users, and their weights."""
        first = next(iter(group.quantized))
        rewriter = Rewriter(graph, first, self.name)
        x = group.value
        down = new_parameter(rewriter, f"{stem}_inverse", 1 / scale)
        smooth = times(rewriter, x, [down], f"{x.name}_smooth")
        up = new_parameter(rewriter, stem, scale)
        for op in group.quantized:
            weight = op["weight"]
            scaled = times(Rewriter(graph, op, self.name), weight, [up], f"{weight.name}_scaled")
            graph.replace_in(op, op["input"], smooth)
            graph.replace_in(op, weight, scaled)
        known = calibration_of(graph)
        graph.calibration = known.updated({smooth.name: known.statistics[x.name].scaled(1 / scale.cpu())})

    def lost(self, group: Group, scale: Tensor, graph: Graph) -> dict[Op, str]:
        """What to say of weights with one integer scale in which smoothing leaves few codes for most columns."""
        found = {}
        if self.w_format.block == (ALL, ALL) and self.w_format.element is DType.i8:
            for op, labels in group.quantized.items():
                loss = lost_to_smoothing(_weight(op, graph), spread(scale, labels.numpy()))
                if loss > MOST_LOST:
                    found[op] = f"; its weight has one scale and loses {loss:.0f} dB: use w=channel, or alpha=search"
        return found

    def remark(self, graph: Graph, group: Group, text: str, more: Mapping[Op, str] | None = None) -> bool:
        """Adds the outcome to each quantized linear of the group; returns False, for callers that did nothing else."""
        for op in group.quantized:
            graph.remark(op.result, text + (more or {}).get(op, ""))
        return False


def _weight(op: Op, graph: Graph) -> Tensor:
    """The current weight of a linear in FP32."""
    weight = op["weight"]
    found: Tensor = evaluate(weight.op, graph)[weight.index]
    return found.detach().to(torch.float32)


def _rows(seen: Statistics, device: torch.device) -> Tensor | None:
    return None if seen.sample is None else seen.sample.rows.to(device)


def _absorbers(region: ScaleRegion) -> str:
    names = dict.fromkeys(absorber.op.result.name if absorber.op.results else "" for absorber in region.absorbers)
    return ", ".join(f"%{name}" for name in names)
