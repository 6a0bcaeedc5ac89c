"""Rewrites attention whose keys and values are linear in one latent to attention over the latent (DeepSeek's MLA).

    %kv = aten.linear(%c, %w)                                  c: [s0, s1, R], the latent of each token
    %k, %v = the keys and values of each head, parts of %kv; %key = cat([%k, %rope for all heads], -1)
    %o = attention.causal(%q, %key, %v) {scale = 0.07}
  ->
    %query = cat([bmm(the part of %q for %k, W_k), the part of %q for %rope], -1)      [s0, H, s1, R + r]
    %latent_key = cat([%c, %rope], -1)                                                 [s0, 1, s1, R + r]
    %latent_value = %latent_key[..., :R]
    %sum = attention.causal(%query, %latent_key, %latent_value) {scale = 0.07}         [s0, H, s1, R]
    %o = bmm(%sum, transpose(W_v))

Here W_k and W_v are the rows of `%w` for each head: q . (W_k c) = (q W_k) . c, and sum(p (W_v c)) = W_v sum(p c). All
heads then have the same keys, and a cache holds R + r elements for each token, which are its values, too. The proof is
where each element of keys and values comes from (`analyses.head_sources`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from passes.analyses.head_sources import NotFound, Part, parts_of
from qcompiler.ir import (
    Argument,
    Graph,
    Match,
    Missed,
    Op,
    Rewriter,
    Rule,
    ScalarType,
    Size,
    TensorType,
    Value,
    explain,
)
from qcompiler.ir.sizes import product
from qcompiler.pass_manager.pipeline import Effect, Pass

CAUSAL, LINEAR = "attention.causal", "aten.linear"
NO_LATENT = "its keys and values are not linear in one value that all heads share"


class Projection(NamedTuple):
    """The elements of each head that are a matrix times the latent: `stride` rows of `weight` for each head.

    Attributes:
        weight: `[rows, R]`.
        begin: The first row of head 0's rows.
        stride: Rows of a head, of which this projection uses a part.
        first: The first row that is used.
        size: The number of rows that are used.
    """

    weight: Value
    begin: int
    stride: int
    first: int
    size: int


class Latent(NamedTuple):
    """What the keys and values of an attention are computed from.

    Attributes:
        source: The latent of each token, `[..., R]`.
        keys: The part of each head's keys that is computed from the latent.
        at: Where that part is in a key.
        values: The values, computed from the latent.
        shared: The other parts of the keys, which all heads share.
        values_from: The result of the linear that computes the values.
    """

    source: Value
    keys: Projection
    at: Part
    values: Projection
    shared: tuple[Part, ...]
    values_from: Value

    @property
    def rank(self) -> int:
        """The number of elements of the latent."""
        return fixed(self.source.tensor.shape[-1])


class OverLatent(Rule):
    """causal(q, cat([W_k c, rope]), W_v c)  ->  W_v causal(cat([q W_k, q_rope]), cat([c, rope]), c)"""

    root = (CAUSAL,)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        heads, groups = op["query"].tensor.shape[1], op["key"].tensor.shape[1]
        sizes = (heads, op["key"].tensor.shape[3], op["value"].tensor.shape[3])
        if heads != groups or not all(isinstance(size, int) for size in sizes) or groups == 1:
            return Missed(NO_LATENT)
        try:
            keys, values = (parts_of(graph, op[name]) for name in ("key", "value"))
        except NotFound as error:
            return Missed(NO_LATENT, error.value)
        found = latent_of(graph, keys, values, fixed(heads))
        if isinstance(found, Missed):
            return found
        return why_not_supported(op) or why_not_worth(op, found) or {"found": found}

    def rewrite(self, op: Op, rewriter: Rewriter, found: Latent) -> None:
        build = _Builder(rewriter, op)
        query = build.query(found)
        key = build.key(found)
        value = build.prefix(key, found.rank)
        args = (query, key, value, *op.args[3:])
        for linear in dict.fromkeys((found.at.source, found.values_from)):
            remark = "its rows for each head multiply queries and sums over the latent instead"
            rewriter.graph.remark(linear, remark)
        mixed = rewriter.insert(CAUSAL, *args, attrs=op.attrs, names=["of_latent"]).result
        rewriter.replace(op, build.projected(mixed, found.values, transposed=True))


def fixed(size: Size) -> int:
    """A size that is known to be an integer."""
    assert isinstance(size, int)
    return size


def latent_of(graph: Graph, keys: Sequence[Part], values: Sequence[Part], heads: int) -> Latent | Missed:
    """The latent of the parts of keys and values, or why there is none."""
    own = [part for part in keys if part.stride]
    if len(own) != 1 or len(values) != 1 or not values[0].stride:
        return Missed(NO_LATENT)
    projections = []
    for part in (*own, *values):
        linear = part.source.op
        if linear.name != LINEAR or not graph.is_constant(linear["weight"]):
            return Missed(NO_LATENT, part.source)
        if linear.get("bias") is not None:
            return Missed("the linear of its keys and values adds a bias", linear.result)
        found = _projection(part, linear["weight"], heads)
        if found is None:
            return Missed("the rows of its weight are not divided among the heads", linear["weight"])
        projections.append(found)
    (latent, other) = (part.source.op["input"] for part in (*own, *values))
    if latent is not other:
        return Missed("its keys are linear in another value than its values", other)
    shared = tuple(part for part in keys if not part.stride)
    return Latent(latent, projections[0], own[0], projections[1], shared, values[0].source)


def _projection(part: Part, weight: Value, heads: int) -> Projection | None:
    """The rows of a weight that compute a part; None if they are not a part of equally many rows for each head."""
    begin, first = part.offset // part.stride * part.stride, part.offset % part.stride
    rows = weight.tensor.shape[0]
    if part.stride < 1 or not isinstance(rows, int) or first + part.size > part.stride:
        return None
    return Projection(weight, begin, part.stride, first, part.size) if begin + part.stride * heads <= rows else None


def why_not_supported(op: Op) -> Missed | None:
    """Whether the attention has more than a scale: the kernel for latents has no windows, limits of scores or sinks."""
    more = [name for name in op.attrs if name != "scale"]
    more += [value.name for path, value in op.operands() if path[0] not in (0, 1, 2)]
    return Missed(f"attention over its latent does not support '{more[0]}'") if more else None


def why_not_worth(op: Op, found: Latent) -> Missed | None:
    """Whether attention over the latent grows more than the cache shrinks, as if the latent is a whole hidden state."""
    rank = found.rank
    wide = rank + sum(part.size for part in found.shared)
    key, value = op["key"].tensor, op["value"].tensor
    heads, size = fixed(key.shape[1]), fixed(key.shape[3]) + fixed(value.shape[3])
    if heads * size * size > wide * (wide + rank):
        return None
    text = f"a token's latent has {wide} elements instead of {heads * size}, but each head would read {wide + rank}"
    return Missed(f"{text} instead of {size}", found.source)


class _Builder:
    """Inserts the operations that replace one attention."""

    def __init__(self, rewriter: Rewriter, op: Op) -> None:
        self.rewriter, self.op = rewriter, op
        self.batch, heads, self.length, _ = op["query"].tensor.shape
        self.heads = fixed(heads)
        self.sizes: dict[int, Value | int] = {}

    def insert(self, name: str, *args: Argument, shape: Sequence[Size], called: str) -> Value:
        """The result of a new operation."""
        types = [TensorType(self.op.result.tensor.dtype, tuple(shape))]
        return self.rewriter.insert(name, *args, types=types, names=[called]).result

    def key(self, found: Latent) -> Value:
        """The latent and the shared parts of the keys, as one head."""
        parts = [self.one_head(found.source, 0, found.rank, "latent")]
        parts += [self.one_head(part.source, part.offset, part.size, "shared") for part in found.shared]
        return self.joined(parts, 1, "latent_key")

    def prefix(self, key: Value, rank: int) -> Value:
        """The first elements of the keys; as a slice of them, which shows that a cache need not store both."""
        shape = (*key.tensor.shape[:3], rank)
        if key.tensor.shape == shape:
            return key
        return self.insert("aten.slice.Tensor", key, 3, 0, rank, shape=shape, called="latent_value")

    def one_head(self, source: Value, offset: int, size: int, called: str) -> Value:
        """Columns of one value for each token, `[B, 1, S, size]`."""
        *lead, columns = source.tensor.shape
        if lead == [self.batch, self.length]:
            source = self.insert(
                "aten.unsqueeze", source, 1, shape=(self.batch, 1, self.length, columns), called=called
            )
        elif lead != [self.batch, 1, self.length]:
            shape = (self.batch, 1, self.length, columns)
            to = (self.sizes[1], 1, self.sizes[2], fixed(columns))
            source = self.insert("aten.reshape", source, to, shape=shape, called=called)
        return self.part(source, offset, size, called)

    def measured(self, by_head: Value) -> tuple[Value | int, Value | int]:
        """Batch and length of the first `[H, B, S, K]`, which is needed anyway: literals, or values."""
        for axis in (1, 2):
            size = by_head.tensor.shape[axis]
            if axis not in self.sizes and not isinstance(size, int):
                types = [ScalarType("int", size)]
                self.sizes[axis] = self.rewriter.insert("aten.sym_size.int", by_head, axis, types=types).result
            elif isinstance(size, int):
                self.sizes[axis] = size
        return self.sizes[1], self.sizes[2]

    def query(self, found: Latent) -> Value:
        """The queries of the latent and of the shared parts."""
        query, own = self.op["query"], found.keys
        part = self.part(query, found.at.start, found.at.size, "query")
        parts = [self.projected(part, own, transposed=False)]
        parts += [self.part(query, part.start, part.size, "query_shared") for part in found.shared]
        return self.joined(parts, self.heads, "latent_query")

    def part(self, value: Value, start: int, size: int, called: str) -> Value:
        """Some elements of each head; the operand of a concatenation if that is the part."""
        if value.tensor.shape[3] == size:
            return value
        if value.op.name == "aten.cat" and value.op.argument("dim") in (3, -1):
            first: Size = 0
            for _, each in value.op.operands():
                if (first, each.tensor.shape[3], each.tensor.dtype) == (start, size, value.tensor.dtype):
                    return each
                first = first + each.tensor.shape[3]
        shape = (*value.tensor.shape[:3], size)
        return self.insert("aten.slice.Tensor", value, 3, start, start + size, shape=shape, called=called)

    def joined(self, parts: Sequence[Value], heads: Size, called: str) -> Value:
        """Parts of each head in one."""
        if len(parts) == 1:
            return parts[0]
        shape = (self.batch, heads, self.length, sum(fixed(part.tensor.shape[3]) for part in parts))
        return self.insert("aten.cat", tuple(parts), 3, shape=shape, called=called)

    def projected(self, x: Value, projection: Projection, *, transposed: bool) -> Value:
        """The elements `[B, H, S, K]` of each head times the head's matrix, a part of its rows of the weight."""
        batch, heads, length = self.batch, self.heads, self.length
        matrix, k = self.matrix(projection, transposed), fixed(x.tensor.shape[3])
        n, tokens = fixed(matrix.tensor.shape[2]), product((batch, length))
        x = self.insert("aten.permute", x, (1, 0, 2, 3), shape=(heads, batch, length, k), called="by_head")
        sizes = self.measured(x)
        x = self.insert("aten.reshape", x, (heads, -1, k), shape=(heads, tokens, k), called="rows")
        y = self.insert("aten.bmm", x, matrix, shape=(heads, tokens, n), called="projected")
        to = (heads, *sizes, n)
        y = self.insert("aten.view", y, to, shape=(heads, batch, length, n), called="of_tokens")
        return self.insert("aten.permute", y, (1, 0, 2, 3), shape=(batch, heads, length, n), called="of_heads")

    def matrix(self, projection: Projection, transposed: bool) -> Value:
        """The matrix of each head, `[H, size, R]`, or its transpose."""
        weight, begin, stride, first, size = projection
        rows, rank = map(fixed, weight.tensor.shape)
        count, named = stride * self.heads, "matrix"
        if (begin, rows) != (0, count):
            weight = self.insert(
                "aten.slice.Tensor", weight, 0, begin, begin + count, shape=(count, rank), called=named
            )
        shape = (self.heads, stride, rank)
        found = self.insert("aten.view", weight, shape, shape=shape, called=named)
        if size != stride:
            shape = (self.heads, size, rank)
            found = self.insert("aten.slice.Tensor", found, 1, first, first + size, shape=shape, called=named)
        if transposed:
            found = self.insert("aten.transpose.int", found, 1, 2, shape=(self.heads, rank, size), called=named)
        return found


@dataclass(frozen=True)
class LatentAttention(Pass):
    """attention over keys and values of each head  ->  attention over the latent that they are computed from"""

    name: ClassVar[str] = "latent-attention"
    effect: ClassVar[Effect] = Effect.REORDERS

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (OverLatent(),)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Reports attention over a latent that is not rewritten; ordinary attention needs no reason."""
        missed = explain(graph, self.rules())
        return {op.result.name: str(why) for op, _, why in missed if why.why != NO_LATENT}
