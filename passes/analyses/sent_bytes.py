"""How many bytes of a token ranks send when a region is cut by tokens.

    %s = coll.all_reduce(%y) {mesh = "tp"} : bf16[s0, 576]      scattered: 1152 bytes, or 596 with `sums = #fp8_tile`
    %n = aten.rms_norm(%s, [576], %w)                           gathered: 1152 bytes, or 596 with `reads = #fp8_tile`
    %g = aten.linear(%n, %w1)                                   because a layer that will be quantized reads %n

A scatter or a gather sends as many bytes as its tensor has, up to a factor that is the same for all, and an all-reduce
twice as many. The layers are not quantized yet, so `Sending` says in which formats they will be.
"""

from collections.abc import Collection
from dataclasses import dataclass

from passes.analyses.expert_regions import GROUPED
from passes.analyses.layers import EVERYTHING, why_not_layer
from qcompiler.ir import Format, Graph, Op, Role, Size, Value


@dataclass(frozen=True)
class Sending:
    """The formats in which ranks send tokens.

    Attributes:
        reads: The format in which layers quantize what they read; None: they read the dtype of the model.
        layers: Patterns over the weight names of these layers, of which the last match decides.
        sums: The format of the terms of sums; None: the dtype of the model.
    """

    reads: Format | None = None
    layers: tuple[str, ...] = EVERYTHING
    sums: Format | None = None

    def scattered(self, total: Op) -> int:
        """Bytes of a token in the term that a rank gives to a sum."""
        return _bytes(total.result, self.sums if self.sums is not None and is_multiplied(total["x"]) else None)

    def gathered(self, graph: Graph, value: Value, users: Collection[Op]) -> int:
        """Bytes of a token in a value that some operations read after it is gathered."""
        form = self.reads
        if form is None or form.block[0] != 1 or form.level is not None:
            return _bytes(value, None)  # one scale covers several tokens, which are gathered before they are quantized
        layers = [layer for user in users for layer in _layers_of(graph, value, user)]
        quantized = all(layer is not None and why_not_layer(self.layers, layer, graph) is None for layer in layers)
        return _bytes(value, form if quantized else None)


def _layers_of(graph: Graph, value: Value, user: Op) -> list[Op | None]:
    """The layers for which a user of a value reads its tokens, or their rows in another order; None for others."""
    if user.name == "aten.linear" and value is user["input"]:
        return [user]
    if user.name != "aten.index.Tensor" or value is not user["self"]:
        return [None]
    return [
        layer if layer.name in GROUPED and layer.args[0] is user.result else None for layer in graph.users(user.result)
    ]


def is_multiplied(value: Value) -> bool:
    """Whether a matmul computes a value; else it may be a row of a table that is divided among the ranks."""
    seen: set[Op] = set()
    stack = [value.op]
    while stack:
        op = stack.pop()
        if op.role in (Role.MATMUL, Role.QUANTIZED_MATMUL):
            return True
        if op not in seen:
            seen.add(op)
            stack += [operand.op for _, operand in op.operands()]
    return False


def _bytes(value: Value, form: Format | None) -> int:
    """Bytes of a token of a value, in its own dtype or in a format; 0 if its last axis has no fixed size."""
    token: tuple[Size, ...] = (1, value.tensor.shape[-1])
    if not isinstance(token[-1], int):
        return 0
    if form is not None and form.why_not(token) is None:
        return int(str(form.bytes(token)))
    return token[-1] * value.tensor.dtype.bits // 8
