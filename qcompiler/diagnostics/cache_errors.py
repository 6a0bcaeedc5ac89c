"""The errors of quantized key-value caches: two rows for each attention over one, for its keys and for its values.

attention(q, dequantize(quantize(k)), v)   against   attention(q, k, v)                the same for v

The own error of the keys leaves the values as they are, and the reverse. A cache in the model's dtype has no error.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from passes.attention.kv_cache import SCALES
from qcompiler import numerics
from qcompiler.diagnostics.error_report import KEYS, VALUES, ErrorRow, sqnr
from qcompiler.diagnostics.measured_call import Call, Measured
from qcompiler.dialects import state
from qcompiler.dialects.attention import causal
from qcompiler.ir import Format, Graph, Op, Value
from qcompiler.runtime.caches import allocate

ATTEND, APPEND = "state.attend", "state.append"
PARTS = {KEYS: "key", VALUES: "value"}
"""Part of a cache -> the operand that it stores."""


def attentions(graph: Graph) -> list[Op]:
    """Returns the attentions over caches."""
    return graph.ops(ATTEND)


def cache_errors(quantized: Call, exact: Call, ops: Sequence[Op]) -> Iterator[Measured]:
    """Yields the errors of the keys and of the values of each attention.

    Args:
        quantized: A call of the quantized graph, over empty caches.
        exact: The same call of the float model, over whole sequences.
        ops: Attentions over caches.
    """
    appends = {op["cache"]: op for op in quantized.graph.ops(APPEND)}
    twins = [exact.graph[op.result.name] for op in ops]
    values = exact.observed([*twins, *(value for twin in twins for _, value in twin.op.operands())])
    read = [value for op in (*ops, *appends.values()) for _, value in op.operands()]
    met = quantized.observed([value for value in read if value.op.name != "state.cache"])
    scales = quantized.observed([value for op in ops for _, value in op["cache"].op.operands()])
    for op, twin in zip(ops, twins, strict=True):
        yield from _rows(_Attention(op, appends[op["cache"]], {**met, **scales}), twin, values)


@dataclass(frozen=True)
class _Attention:
    """An attention over a cache, with its operands in the quantized model."""

    op: Op
    append: Op
    operands: Mapping[Value, Tensor]

    @property
    def scales(self) -> list[Tensor]:
        """The static scales of keys and values, f32[1] each; empty if each token and head has its own."""
        return [self.operands[value] for _, value in self.op["cache"].op.operands()]

    def stored(self, part: str, operands: Mapping[str, Tensor]) -> Tensor:
        """Returns keys or values as the cache holds them: in FP32 or wider if it holds codes, else unchanged."""
        kind, given = state.cache_of(self.op["cache"]), operands[PARTS[part]]
        if kind.within and part == VALUES:
            return self.stored(KEYS, operands)[..., : kind.value]
        if not isinstance(kind.element, Format):
            return given
        if kind.is_static:
            scale = self.scales[[*PARTS].index(part)]
            codes = state.quantized(given, scale, numerics.torch_dtype(kind.element.element))
        else:
            codes, scale = numerics.quantize(given, kind.element)
        return (numerics.decode(codes, kind.element) * scale).to(torch.promote_types(given.dtype, torch.float32))

    def met(self, part: str) -> Tensor:
        """Returns keys or values in the quantized model, before they are stored."""
        return self.operands[self.append[PARTS[part]]]

    def over_cache(self, append: Callable[..., None], attend: Callable[..., Tensor]) -> Tensor:
        """Returns the attention in the quantized model, through a new cache."""
        cache = [*allocate(state.cache_of(self.op["cache"]), self.met(KEYS).device).tensors, *self.scales]
        rows = self.operands[self.op["slots"]], self.operands[self.op["lengths"]]
        beside = [self.op.get(name) for name in ("sinks", "slopes")]
        sinks, slopes = (None if value is None else self.operands[value] for value in beside)
        attrs = {name: self.op.argument(name) for name in ("scale", "window", "softcap", "chunk")}
        append(cache, self.met(KEYS), self.met(VALUES), *rows)
        query = self.operands[self.op["query"]]
        return attend(cache, query, *rows, sinks, None, slopes, **attrs)

    def kernel(self) -> float:
        """Returns the difference between the operators of the host module and the reference."""
        operators = torch.ops.qcompiler
        reference = self.over_cache(state.append, state.attend)
        return sqnr(reference, self.over_cache(operators.append_to_cache, operators.attend_to_cache))


def _rows(attention: _Attention, twin: Value, exact: Mapping[Value, Tensor]) -> Iterator[Measured]:
    """Yields the rows of the keys and of the values."""
    op, y, kernel = twin.op, exact[twin], attention.kernel()
    options: dict[str, Any] = {name: attr for name, attr in op.attrs.items() if name not in SCALES}
    options |= {name: exact[value] for name in ("sinks", "slopes") if (value := op.get(name)) is not None}
    given = {name: exact[op[name]] for name in ("query", *PARTS.values())}

    def attend(**changed: Tensor) -> Tensor:
        wide = next(iter(changed.values())).dtype
        query, key, value = ({**given, **changed}[name].to(wide) for name in given)
        return causal(query, key, value, **options).to(y.dtype)

    for part, name in PARTS.items():
        own = attend(**{name: attention.stored(part, given)})
        inherited = attend(**{name: attention.met(part)})
        row = ErrorRow(twin.name, op.loc.module, sqnr(y, own), sqnr(y, inherited), kernel, part)
        yield Measured(row, twin, own)
