"""Gives a causal language model key-value caches: one graph for prefill, from any position, and for decoding.

    func @model(%input_ids: i64[s0, s1]) -> (bf16[s0, s1, 128256])
      %o = attention.causal(%q, %k, %v) {scale = 0.125}
      return %logits
  ->
    func @model(%input_ids: i64[s0, s1], %slots: i64[s0], %lengths: i64[s0], %last: i64[s0]) -> (bf16[s0, 128256])
      %cache = state.cache() {name = "layers.0"} : cache<bf16, slots = 16, heads = 8, capacity = 8192, …>
      state.append(%cache, %k, %v, %slots, %lengths)
      %o = state.attend(%cache, %q, %slots, %lengths) {scale = 0.125}
      return %logits_last

Row b continues slot `slots[b]` after its first `lengths[b]` positions, so position i of this call has the number
`lengths[b] + i`. With `chunk`, the cache of a layer with a window is a ring of the positions that a call can read:

    %o = attention.causal(%q, %k, %v) {scale = 0.125, window = 1024}
  ->
    %cache = state.cache() {name = "layers.0"} : cache<bf16, slots = 16, heads = 8, capacity = 8192, …, ring = 3072>
    state.append(%cache, %k, %v, %slots, %lengths) {capacity = 8192}
    %o = state.attend(%cache, %q, %slots, %lengths) {scale = 0.125, window = 1024, capacity = 8192}

Legal only if each path from token ids to logits is position-wise or causal, which `analyses.sequence`
proves. Rows may be padded on the right: positions after `last[b]` write keys that are overwritten before they are read.
"""

from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from passes.analyses.constants import new_parameter
from passes.analyses.sequence import Refused, Sequence, analyze
from passes.attention.last_token import keep_last, only_output
from passes.attention.position_numbers import batch_and_length, number_positions
from passes.cleanup.dead_code import DeadCode
from qcompiler.dialects.attention import reach_of
from qcompiler.dialects.state import cache_of
from qcompiler.errors import PassError
from qcompiler.ir import Argument, CacheType, DType, Format, Graph, Missed, Op, Rewriter, ScalarType, TensorType, Value
from qcompiler.ir.formats import FP8_ROW, FP8_TENSOR, INT8_ROW, INT8_TENSOR
from qcompiler.pass_manager.pipeline import Effect, Pass

CAUSAL, CACHE, ATTEND = "attention.causal", "state.cache", "state.attend"

UNIT = 16
"""The positions of a ring are a multiple of this, so that kernels know some neighbors to be adjacent."""

MORE_DATA = 'qcompiler.decoder(..., kv_cache="fp8_static", calibration=batches)'
SCALES = ("key_scale", "value_scale")
FORMATS: dict[str, Format] = {
    "fp8": FP8_ROW, "int8": INT8_ROW, "fp8_static": FP8_TENSOR, "int8_static": INT8_TENSOR
}  # fmt: skip


@dataclass(frozen=True)
class KvCache(Pass):
    """`attention.causal` over all positions  ->  `state.append`, `state.attend` over a cache

    Attributes:
        format: How keys and values are stored: as codes with one scale per token and head, or with the static scales of
            each attention ("…_static"), which the pass `cache-scales` sets; None for the model's dtype.
        slots: Number of sequences that the caches hold.
        capacity: Number of positions of each sequence.
        chunk: Largest number of tokens of a row in one call, padding included. The cache of a layer with a window then
            holds only `window - 1 + chunk` positions, rounded up. None: any number of tokens, and all positions.
        logits: The logits of the token `last[b]` of each row b, or of all tokens.
        ids: The name of the input of token ids.
        positions: The name of the input of position numbers, if the graph has it; it is removed.
        start: Whether the graph has the input `start`: the length of all rows if the host knows it, as for a chunk of a
            prompt, else -1. Attention of a long chunk is faster with it.
    """

    name: ClassVar[str] = "kv-cache"
    effect: ClassVar[Effect] = Effect.LOSSY
    budget: ClassVar[float] = 0.1

    format: Literal["fp8", "int8", "fp8_static", "int8_static"] | None = None
    slots: int = 1
    capacity: int = 2048
    chunk: int | None = None
    logits: Literal["last", "all"] = "last"
    ids: str = "input_ids"
    positions: str = "position_ids"
    start: bool = False

    def __post_init__(self) -> None:
        """Raises PassError for sizes that are not positive."""
        super().__post_init__()
        for name in ("slots", "capacity", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PassError(f"option '{name}' of pass '{self.name}' is not positive", got=value, need="1 or more")

    def run(self, graph: Graph) -> bool:
        """Replaces every attention; raises PassError, before any change, if the graph is not causal."""
        if graph.ops(CACHE):
            return False
        sequence = self._proven(graph, self.positions)
        if not graph.ops(CAUSAL):
            need = "at least one attention.causal, which the pass 'attention' makes"
            raise PassError("the graph has no attention to cache", got=f"@{graph.name}", need=need)
        _check_logits(sequence, only_output(graph))
        _check_places(graph, sequence, self.capacity)
        DeadCode().run(graph)
        batch, length = batch_and_length(graph, sequence)
        kind = TensorType(DType.i64, (sequence.batch, sequence.length))
        numbers = graph.add_input("positions", kind)
        number_positions(graph, sequence, numbers, batch)
        sequence = self._proven(graph, numbers.name)
        slots, lengths = (graph.add_input(name, TensorType(DType.i64, kind.shape[:1])) for name in ("slots", "lengths"))
        if self.logits == "last":
            keep_last(graph, sequence, graph.add_input("last", slots.type), batch)
        start = [graph.add_input("start", ScalarType("int"))] if self.start else []
        _count_from(graph, numbers, lengths, (batch, length))
        for value in graph.inputs:
            if value.name == self.positions:  # its numbers are not read any more, but its sizes may be
                _replace_sizes(graph, value, (batch, length))
        self._cache_attention(graph, slots, lengths, start)
        DeadCode().run(graph)
        for value in graph.inputs:
            if not graph.uses(value):
                graph.erase(value.op)
        return True

    def translated(
        self, before: Graph, inputs: List[Any], outputs: Mapping[str, Any]
    ) -> tuple[List[Any], Mapping[str, Any]]:
        """The call that begins as many sequences, and as much of them, as the caches hold; see `Pass.translated`."""
        (ids,) = (given for value, given in zip(before.inputs, inputs, strict=True) if value.name == self.ids)
        ids = ids[: self.slots, : min(self.capacity, self.chunk or self.capacity)]
        rows, length = ids.shape
        zeros = torch.zeros(rows, dtype=torch.int64, device=ids.device)
        slots = torch.arange(rows, device=ids.device)
        kept = {name: output[:rows, :length] for name, output in outputs.items()}
        start = [0] * self.start
        if self.logits == "all":
            return [ids, slots, zeros, *start], kept
        return [ids, slots, zeros, zeros + (length - 1), *start], {name: output[:, -1] for name, output in kept.items()}

    def explain(self, graph: Graph) -> dict[str, str]:
        """Why the cache of a layer with a window holds all positions, by the name of the cache."""
        reasons = {}
        for op in graph.ops(CACHE):
            windows = [reach_of(user) for user in graph.users(op.result) if user.name == ATTEND]
            why = self._ring(windows)
            if cache_of(op.result).ring is None and any(windows) and isinstance(why, Missed):
                reasons[op.result.name] = str(why)
        return reasons

    def _proven(self, graph: Graph, positions: str) -> Sequence:
        found = analyze(graph, self.ids, positions)
        if isinstance(found, Refused):
            raise PassError(
                "the model cannot run with a key-value cache",
                got=found.why,
                where=str(found.op.loc) or None,
                need="position-wise operations and causal attention between token ids and logits",
            )
        return found

    def _cache_attention(self, graph: Graph, slots: Value, lengths: Value, start: List[Value]) -> None:
        """Replaces each attention; attentions over the same keys and values share a cache."""
        made: dict[tuple[Value, Value], Value] = {}
        for op in graph.ops(CAUSAL):
            pair = op["key"], op["value"]
            if pair not in made:
                sharing = [each for each in graph.ops(CAUSAL) if (each["key"], each["value"]) == pair]
                ring = self._ring([reach_of(each) for each in sharing])
                made[pair] = self._cache(op, graph, f"layers.{len(made)}", ring)
                attrs = self._attrs(made[pair])
                graph.insert(op, "state.append", made[pair], *pair, slots, lengths, attrs=attrs, loc=op.loc)
            given: list[Argument] = [op.argument("sinks"), start[0] if start else None, op.argument("slopes")]
            while given and given[-1] is None:
                given.pop()
            args = (made[pair], op["query"], slots, lengths, *given)
            attrs = {name: attr for name, attr in op.attrs.items() if name not in SCALES} | self._attrs(made[pair])
            new = graph.insert(op, ATTEND, *args, attrs=attrs, loc=op.loc).result
            graph.replace(op.result, new)
            name = op.result.name
            graph.erase(op)
            graph.rename(new, name)

    def _ring(self, windows: List[int | None]) -> int | Missed:
        """The positions that a cache has to hold if all attentions over it have windows, or why it holds all."""
        reach = max((window for window in windows if window is not None), default=None)
        if reach is None or None in windows:
            return Missed("its cache holds all positions, because an attention over it has neither window nor chunks")
        if self.chunk is None:
            return Missed("its cache holds all positions, because a call may have any number of tokens: no 'chunk'")
        ring = -(-(reach - 1 + self.chunk) // UNIT) * UNIT
        if ring >= self.capacity:
            why = f"a window of {reach} and calls of {self.chunk} tokens need {ring}"
            return Missed(f"its cache holds all {self.capacity} positions, because {why}")
        return ring

    def _attrs(self, cache: Value) -> dict[str, Argument]:
        """The attributes of operations over a cache that follow from its type."""
        return {} if cache_of(cache).ring is None else {"capacity": self.capacity}

    def _cache(self, op: Op, graph: Graph, name: str, ring: int | Missed) -> Value:
        """A new cache for the keys and values of an attention."""
        kind = self._type(op, None if isinstance(ring, Missed) else ring)
        scales = self._scales(op, graph, name) if kind.is_static else ()
        return graph.insert(op, CACHE, *scales, attrs={"name": name}, types=[kind], names=["cache"], loc=op.loc).result

    def _scales(self, op: Op, graph: Graph, layer: str) -> List[Value]:
        """The static scales of an attention as weights of the graph."""
        if missing := [name for name in SCALES if name not in op.attrs]:
            raise PassError(
                f"an attention has no static scales for a cache of format '{self.format}'",
                got=f"no {missing[0]} for {op.result}", need="scales from the checkpoint, or calibration data",
                where=str(op.loc) or None, fix=f"Give the data: {MORE_DATA}.",
            )  # fmt: skip
        rewriter = Rewriter(graph, op, self.name)
        if is_within(op):
            return [new_parameter(rewriter, f"{layer}.key_scale", torch.tensor([op.attrs["key_scale"]]))] * 2
        return [new_parameter(rewriter, f"{layer}.{name}", torch.tensor([op.attrs[name]])) for name in SCALES]

    def _type(self, op: Op, ring: int | None) -> CacheType:
        key, value = op["key"].tensor, op["value"].tensor
        heads, size, value_size = key.shape[1], key.shape[3], value.shape[3]
        if not (isinstance(heads, int) and isinstance(size, int) and isinstance(value_size, int)):
            got, need = f"{key} and {value}", "heads and head sizes that do not depend on the inputs"
            raise PassError("a cache cannot hold keys and values of unknown size", got=got, need=need)
        element = FORMATS[self.format] if self.format else key.dtype
        return CacheType(element, self.slots, heads, self.capacity, size, value_size, ring, is_within(op))


def is_within(attention: Op) -> bool:
    """Whether the values of an attention are the first elements of its keys, as `latent-attention` makes them."""
    key, part = attention["key"], attention["value"].op
    if part.name != "aten.slice.Tensor" or part["self"] is not key or part.argument("dim") not in (3, -1):
        return False
    return part.argument("start") in (0, None) and part.argument("step") == 1 and part.result.type != key.type


def _check_logits(sequence: Sequence, output: Value) -> None:
    """Raises PassError unless the output is [batch, positions, …]."""
    lead = [[digit.kind for digit in axis] for axis in sequence.labels[output].axes[:2]]
    if lead != [["batch"], ["positions"]]:
        need = f"[{sequence.batch}, {sequence.length}, vocabulary]"
        raise PassError("the output of the graph is not the logits of each token", got=output.type, need=need)


def _check_places(graph: Graph, sequence: Sequence, capacity: int) -> None:
    """Raises PassError if the model has learned fewer position embeddings than a slot has positions."""
    for value, offset in sequence.positions.items():
        for user in graph.users(value):
            rows = user["weight"].tensor.shape[0] if user.name == "aten.embedding" else None
            if isinstance(rows, int) and rows - offset < capacity:
                raise PassError(
                    "the model has fewer position embeddings than the cache has positions",
                    got=f"capacity={capacity}",
                    need=f"at most {rows - offset}, because {user['weight']} has {rows} rows",
                    where=str(user.loc) or None,
                )


def _count_from(graph: Graph, numbers: Value, lengths: Value, sizes: tuple[Value, Value]) -> None:
    """Replaces the input `numbers` by `lengths[b] + 0, lengths[b] + 1, …` for each row b, and its sizes by `sizes`."""
    batch, positions = numbers.tensor.shape
    _replace_sizes(graph, numbers, sizes)
    length = sizes[1]
    before = next(op for op in graph if graph.rank(op) > graph.rank(length.op))
    types = [TensorType(DType.i64, (positions,))]
    place = graph.insert(before, "aten.arange", length, types=types, names=["place"]).result
    types = [TensorType(DType.i64, (batch, 1))]
    start = graph.insert(before, "aten.unsqueeze", lengths, 1, types=types, names=["start"]).result
    name = numbers.name
    new = graph.insert(before, "aten.add.Tensor", start, place, types=[numbers.type], names=[name]).result
    graph.replace(numbers, new)
    graph.erase(numbers.op)
    graph.rename(new, name)


def _replace_sizes(graph: Graph, value: Value, sizes: tuple[Value, Value]) -> None:
    """Replaces the sizes that are read from a matrix by equal ones."""
    for user in graph.users(value):
        axis = user.argument("dim") if user.name == "aten.sym_size.int" else None
        if isinstance(axis, int) and sizes[axis].type == user.result.type:
            graph.replace(user.result, sizes[axis])
            graph.erase(user)
