"""Random arithmetic and moves of elements: fusing them changes no bit, and any region can be interpreted and parsed."""

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler.dialects.aten import overload_of, to_torch
from qcompiler.interpreter import interpret
from qcompiler.ir import Argument, DType, Graph, TensorType, Value, map_tree
from qcompiler.numerics.dtypes import ir_dtype
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.testing import verified

END = 2**63 - 1


class Builder:
    """Builds a graph, and computes each value at once to know its type."""

    def __init__(self) -> None:
        self.graph = Graph("random")
        self.tensors: dict[Value, Tensor] = {}

    def input(self, tensor: Tensor) -> Value:
        value = self.graph.add_input("x", TensorType(ir_dtype(tensor.dtype), tuple(tensor.shape)))
        self.tensors[value] = tensor
        return value

    def append(self, name: str, *args: Argument, **attrs: Argument) -> Value:
        return self.append_all(name, *args, **attrs)[0]

    def append_all(self, name: str, *args: Argument, **attrs: Argument) -> tuple[Value, ...]:
        def read(leaf: object) -> object:
            return self.tensors[leaf] if isinstance(leaf, Value) else to_torch(leaf)  # type: ignore[arg-type]

        made = overload_of(name)(*map_tree(read, args), **{key: to_torch(arg) for key, arg in attrs.items()})
        tensors: list[Tensor] = [made] if isinstance(made, Tensor) else [*made]
        types = [TensorType(ir_dtype(each.dtype), tuple(each.shape)) for each in tensors]
        values = self.graph.append(name, *args, attrs=attrs, types=types).results
        self.tensors |= zip(values, tensors, strict=True)
        return values


Step = Callable[[Builder, Value, st.DataObject], Value]


def negated(build: Builder, x: Value, data: st.DataObject) -> Value:
    return build.append(data.draw(st.sampled_from(["aten.neg", "aten.relu", "aten.clone"])), x)


def limited(build: Builder, x: Value, data: st.DataObject) -> Value:
    low, high = data.draw(st.sampled_from([(-0.5, 0.75), (None, 0.5), (-0.25, None), (0.0, None)]))
    return build.append("aten.clamp", x, low, high)


def scaled(build: Builder, x: Value, data: st.DataObject) -> Value:
    return build.append(data.draw(st.sampled_from(["aten.mul.Tensor", "aten.add.Tensor"])), x, 0.5)


def combined(build: Builder, x: Value, data: st.DataObject) -> Value:
    fits = [y for y in build.tensors if y.tensor.dtype.is_float and broadcasts(shape(y), shape(x))]
    other = data.draw(st.sampled_from(fits))
    return build.append(data.draw(st.sampled_from(["aten.mul.Tensor", "aten.sub.Tensor"])), x, other)


def cast(build: Builder, x: Value, data: st.DataObject) -> Value:
    return build.append("aten._to_copy", x, dtype=data.draw(st.sampled_from([DType.f32, DType.bf16, DType.f16])))


def sliced(build: Builder, x: Value, data: st.DataObject) -> Value:
    axis, start, step = axis_of(x, data), data.draw(st.integers(-3, 2)), data.draw(st.integers(1, 2))
    return build.append("aten.slice.Tensor", x, axis, start, END, step)


def rotated(build: Builder, x: Value, data: st.DataObject) -> Value:
    axis = axis_of(x, data)
    middle = data.draw(st.integers(0, shape(x)[axis]))
    low, high = (build.append("aten.slice.Tensor", x, axis, *ends) for ends in ((0, middle), (middle, END)))
    return build.append("aten.cat", (build.append("aten.neg", high), low), axis)


def transposed(build: Builder, x: Value, data: st.DataObject) -> Value:
    return build.append("aten.transpose.int", x, axis_of(x, data), axis_of(x, data))


def flipped(build: Builder, x: Value, data: st.DataObject) -> Value:
    return build.append("aten.flip", x, (axis_of(x, data),))


def stacked(build: Builder, x: Value, data: st.DataObject) -> Value:
    if len(shape(x)) > 3:
        return x
    both = build.append(
        "aten.stack", (x, build.append("aten.mul.Tensor", x, 2.0)), data.draw(st.integers(0, len(shape(x))))
    )
    return build.append("aten.reshape", both, (-1, shape(both)[-1])) if data.draw(st.booleans()) else both


def reshaped(build: Builder, x: Value, data: st.DataObject) -> Value:
    size = build.tensors[x].numel()
    columns = data.draw(st.sampled_from([each for each in (1, 2, 3, 4, 6) if size % each == 0]))
    return build.append("aten.reshape", x, (size // columns, columns))


def expanded(build: Builder, x: Value, data: st.DataObject) -> Value:
    if len(shape(x)) > 3:
        return x
    return build.append("aten.expand", build.append("aten.unsqueeze", x, 0), (2, *shape(x)))


def picked(build: Builder, x: Value, data: st.DataObject) -> Value:
    """Elements at indices that are computed from integers, in four ways."""
    rows, (size, *rest) = build.input(torch.randint(-1, 2, (3,))), shape(x)
    wanted = build.append("aten.remainder.Scalar", rows, size)
    match data.draw(st.sampled_from(["index", "index_select", "embedding", "gather"])):
        case "index":
            return build.append("aten.index.Tensor", x, (build.append("aten.sub.Tensor", wanted, size),))
        case "embedding" if len(rest) == 1:
            return build.append("aten.embedding", x, build.append("aten.unsqueeze", wanted, 1))
        case "gather":
            whole = build.append("aten.view", wanted, (3, *(1 for _ in rest)))
            return build.append("aten.gather", x, 0, build.append("aten.expand", whole, (3, *rest)))
    return build.append("aten.index_select", x, 0, wanted)


def counted(build: Builder, x: Value, data: st.DataObject) -> Value:
    """Positions that count up from a number for each row, times `x`."""
    start = build.append("aten.unsqueeze", build.input(torch.randint(-9, 9, shape(x)[-2:-1] or (1,))), 1)
    places = build.append("aten.add.Tensor", start, build.append("aten.arange", shape(x)[-1]))
    return build.append("aten.mul.Tensor", build.append("aten._to_copy", places, dtype=DType.f32), x)


def summed(build: Builder, x: Value, data: st.DataObject) -> Value:
    """A sum over an axis; torch's order of additions depends on the sizes if there are more than 4 terms."""
    axis = axis_of(x, data)
    if shape(x)[axis] > 4:
        x = build.append("aten.slice.Tensor", x, axis, 0, 4)
    return build.append("aten.sum.dim_IntList", x, (axis,), *data.draw(st.sampled_from([(), (True,)])))


def returned(build: Builder, x: Value, data: st.DataObject) -> Value:
    """Rows in the order of random keys, times a number for each row in that order, and back."""
    rows, *rest = shape(x)
    _, order = build.append_all("aten.sort", build.input(torch.randint(0, 3, (rows,))))
    empty = build.append("aten.empty_like", order)
    place = build.append("aten.index_put", empty, (order,), build.append("aten.arange", rows))
    share = build.append("aten.index.Tensor", build.input(torch.randn(rows)), (order,))
    share = build.append("aten.view", share, (rows, *(1 for _ in rest)))
    moved = build.append("aten.mul.Tensor", build.append("aten.index.Tensor", x, (order,)), share)
    return build.append("aten.index.Tensor", moved, (place,))


STEPS: list[Step] = [
    negated, limited, scaled, combined, cast, sliced, rotated, transposed, flipped, stacked, reshaped, expanded, picked,
    counted, summed, returned,
]  # fmt: skip


def shape(value: Value) -> tuple[int, ...]:
    return tuple(int(str(size)) for size in value.tensor.shape)


def broadcasts(own: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    return 0 < len(own) <= len(sizes) and all(a in (1, b) for a, b in zip(own[::-1], sizes[::-1], strict=False))


def axis_of(x: Value, data: st.DataObject) -> int:
    return data.draw(st.integers(0, len(shape(x)) - 1))


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_fusing_changes_no_bit(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 9)))
    build, generator = Builder(), torch.Generator().manual_seed(0)
    values = [build.input(torch.randn(sizes, generator=generator)) for sizes in ((2, 3, 4), (4,), (3, 1))]
    for _ in range(data.draw(st.integers(2, 9))):
        x = data.draw(st.sampled_from(values))
        made = data.draw(st.sampled_from(STEPS))(build, x, data)
        if 0 < build.tensors[made].numel() < 2000 and made.tensor.shape:
            values.append(made)
    build.graph.set_outputs([values[-1], data.draw(st.sampled_from(values))])
    inputs = [build.tensors[value] for value in build.graph.inputs]
    before = interpret(build.graph, inputs)
    run_pipeline(Pipeline.parse("dead-code; fuse-pointwise"), build.graph)
    verified(build.graph)
    for got, want in zip(interpret(build.graph, inputs), before, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.equal(bits(got), bits(want))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32)
