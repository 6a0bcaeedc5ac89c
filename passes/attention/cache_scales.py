"""Computes the static scales of a quantized key-value cache from calibration data.

    %o = attention.causal(%q, %k, %v) {scale = 0.125}
  ->
    %o = attention.causal(%q, %k, %v) {scale = 0.125, key_scale = 0.0625, value_scale = 0.015625}

A scale is the largest magnitude of all keys, or values, of an attention over the largest code; `kv-cache` uses it if
its format is static. Attentions that have scales keep them; the result of the attention is the same. Values within the
keys have the scale of the keys.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from passes.attention.kv_cache import CAUSAL, FORMATS, SCALES, is_within
from passes.quantizing.calibrate import calibration_of, statistics_of
from qcompiler import numerics
from qcompiler.errors import PassError
from qcompiler.ir import Effects, Graph, Op, Value
from qcompiler.pass_manager.pipeline import Effect, Pass

KNOWN = re.compile(r"\S+( (?=\S*[1-9])[0-9.]+(e-?[0-9]+)?){2}")


@dataclass(frozen=True)
class CacheScales(Pass):
    """`attention.causal`  ->  `attention.causal` with `key_scale` and `value_scale`.

    Attributes:
        format: The format of the cache.
        known: Scales of a checkpoint: the path of an attention module, the scales of its keys and values,
            separated by spaces.
    """

    name: ClassVar[str] = "cache-scales"
    effect: ClassVar[Effect] = Effect.EXACT

    format: Literal["fp8_static", "int8_static"] = "fp8_static"
    known: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises PassError for a malformed entry of `known`."""
        super().__post_init__()
        for entry in self.known:
            if KNOWN.fullmatch(entry) is None:
                problem = "option 'known' of pass 'cache-scales' is malformed"
                raise PassError(problem, got=repr(entry), need="a module's path and two positive numbers")

    def run(self, graph: Graph) -> bool:
        """Observes keys and values, and sets the scales; raises PassError without calibration data or statistics."""
        known = {module: (float(key), float(value)) for module, key, value in map(str.split, self.known)}
        changed = False
        for op in graph.ops(CAUSAL):
            if op.loc.module in known and not is_within(op):  # the checkpoint's scales are for each head
                set_scales(graph, op, *known[op.loc.module])
                changed = True
        ops = [op for op in graph.ops(CAUSAL) if not {*SCALES} <= op.attrs.keys()]
        if not ops:
            return changed
        calibration = calibration_of(graph)
        if any(Effects.COMMUNICATES in op.effects for op in graph.ops()):
            fix = 'Choose a cache whose scales are computed for each token, such as kv_cache="fp8".'
            problem = "keys and values of one rank's heads cannot be observed alone"
            raise PassError(problem, got=f"%{ops[0].result.name}", fix=fix)
        values = dict.fromkeys(value for op in ops for value in (op["key"], op["value"]))
        if calibration.batches is not None:  # also what was observed before, which smoothing may have changed
            calibration.observe(graph, [value.name for value in values])
        for value in values:
            calibration.check_seen(graph, value.name, after_top_k=False)
        for op in ops:
            names = ("key", "key" if is_within(op) else "value")
            set_scales(graph, op, *(self._scale(graph, op[name]) for name in names))
        return True

    def _scale(self, graph: Graph, value: Value) -> float:
        amax = statistics_of(graph, value).amax("absmax", "tensor")
        return float(numerics.scale_of(amax, FORMATS[self.format]))


def set_scales(graph: Graph, op: Op, key: float, value: float) -> None:
    """Sets the static scales of an attention."""
    attrs: dict[str, Any] = {**op.attrs, **dict(zip(SCALES, (key, value), strict=True))}
    graph.set_args(op, op.args, attrs)
