"""Helpers for testing passes: random valid graphs, and comparison of graph text and tensors.

    graph = random_graph(seed, runnable=True)
    inputs, weights = random_inputs(graph, seed)
    before = interpret(graph, inputs, weights)
    MyPass().run(graph)
    assert difference(interpret(graph, inputs, weights)[0], before[0]) < 1e-3

The same seed gives the same graph.
"""

import difflib
import math
import textwrap
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import torch

from qcompiler.errors import QCompilerError
from qcompiler.ir import (
    NONE,
    Argument,
    DType,
    Format,
    Graph,
    Location,
    Range,
    ScalarType,
    Size,
    Tag,
    TensorType,
    Type,
    Value,
    ceildiv,
    evaluate,
    symbol,
)
from qcompiler.ir.formats import FP8_BLOCK, FP8_TILE
from qcompiler.ir.graph import BUFFER, PARAM
from qcompiler.numerics.dtypes import torch_dtype

FORMATS = (FP8_TILE, FP8_BLOCK, Format(DType.f8e4m3fn, (1, 64)))
FLOATS = (DType.f32, DType.bf16, DType.f16)
NAMES = ("x", "a.b", "linear_1", "0", "-", "w$-x", "x.", "_", "äöü", "重み", "return", "None", "inf", "loc", "x_²")
KEYS = (
    "alpha",
    "dtype",
    "nan",
    "inf",
    "loc",
    "in",
    "by",
    "where",
    "return",
    "true",
    "None",
    "bf16",
    "int",
    "a.b",
    "_1",
)
TEXTS = (
    "",
    "fc1",
    'say "hi"',
    "a\\b",
    "two\nlines\t\r",
    "ünï→✓",
    "\x00\x1f\x7f\u2028\ud800",
    "%x, // }",
    "C:\\m.py",
    "😀",
)
LITERALS: tuple[Argument, ...] = (
    None, True, False, 0, 1, -1, 2**63, -(2**70), 0.0, -0.0, 1.5, -2.5e-7, 1e22, 5e-324, 1.7976931348623157e308,
    math.inf, -math.inf, math.nan, *DType, Tag("contiguous_format"), Tag("strided"), Tag("cuda:0"), (), ((), (None,)),
)  # fmt: skip
OPEN_OPS = ("aten.linear", "aten.add.Tensor", "aten.cat", "aten.index.Tensor", "aten.slice.Tensor", "prims.view_of")


def random_graph(seed: int | Random, *, size: int = 12, runnable: bool = False) -> Graph:
    """A random valid graph of about `size` operations that covers all IR features.

    With `runnable`, the interpreter can run it; otherwise it also has unusual names, literals, types, and arguments.
    """
    writer = _Writer(seed if isinstance(seed, Random) else Random(seed), runnable)
    return writer.write(size)


def random_inputs(
    graph: Graph, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Random inputs and weights for a graph; symbols that are not in `sizes` get a small size in their range."""
    rng, generator = Random(seed), torch.Generator().manual_seed(seed)
    bound = {name: _size_within(rng, bounds) for name, bounds in sorted(graph.symbols.items())} | dict(sizes or {})

    def fill(type: Type) -> Any:
        if isinstance(type, TensorType):
            shape = [evaluate(size, bound) for size in type.shape]
            return torch.randn(shape, generator=generator).to(torch_dtype(type.dtype))
        value = type.value if isinstance(type, ScalarType) else None
        return rng.randint(1, 4) if value is None else evaluate(value, bound)

    weights = {str(op.attrs["name"]): fill(op.result.type) for op in graph if op.name in (PARAM, BUFFER)}
    return [fill(value.type) for value in graph.inputs], weights


def assert_text(graph: Graph, expected: str, *, locations: bool = False) -> None:
    """Raises AssertionError with a diff unless `graph` prints as `expected`, ignoring its indentation."""
    got, want = graph.text(locations=locations), textwrap.dedent(expected).strip()
    if got != want:
        lines = difflib.unified_diff(want.splitlines(), got.splitlines(), "expected", "got", lineterm="")
        raise AssertionError(f"@{graph.name} does not print as expected\n" + "\n".join(lines))


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative squared error: 0 if equal, about 1 if unrelated, at any scale; inf if non-finite values differ."""
    if got.shape != want.shape:
        raise QCompilerError("tensors of different shapes cannot be compared", got=[*got.shape], need=[*want.shape])
    if got.is_complex() or want.is_complex():
        got, want = torch.view_as_real(got.to(torch.complex128)), torch.view_as_real(want.to(torch.complex128))
    got, want = got.double(), want.double()
    finite = got.isfinite() & want.isfinite()
    same = (got == want) | (got.isnan() & want.isnan())
    if not (finite | same).all():
        return math.inf
    got, want = got[finite], want[finite]
    top = max(float(got.abs().max()), float(want.abs().max())) if got.numel() else 0.0
    if not top:
        return 0.0
    got, want = got / top, want / top  # squares of very large or small numbers would overflow or underflow FP64
    return float((got - want).square().sum() / (got.square() + want.square()).sum())


def _size_within(rng: Random, bounds: Range) -> int:
    high = bounds.low + 5 if bounds.high is None else min(bounds.high, bounds.low + 5)
    return rng.randint(bounds.low, high)


class _Writer:
    """Builds one random graph; each step adds one or more operations with known types."""

    def __init__(self, rng: Random, runnable: bool) -> None:
        self.rng, self.runnable = rng, runnable
        self.graph = Graph("main" if runnable else rng.choice(("main", "λ.0-$")))
        self.sizes: list[Size] = [1, 2, 5]
        self.tensors: list[Value] = []
        """Floating-point tensors whose last size is an integer."""
        self.updated: set[Value] = set()

    def write(self, size: int) -> Graph:
        for name in self.rng.sample(("s0", "s1", "s27"), self.rng.randint(0, 2)):
            low = self.rng.randint(1, 4)
            self.graph.symbols[name] = Range(low, self.rng.choice((None, low, 4096)))
            self.sizes += [symbol(name), symbol(name) * 2 + 1]
        for _ in range(self.rng.randint(0, 3)):
            kind = TensorType(self.rng.choice(FLOATS), self.shape())
            self.tensors.append(self.graph.add_input(self.name("x"), kind, self.location()))
        if not self.runnable and self.rng.random() < 0.5:
            self.graph.add_input(self.name("n"), self.strange_type())
        while len(self.graph) < size:
            self.rng.choice(self.STEPS if self.runnable else (*self.STEPS, _Writer.strange, _Writer.strange))(self)
        self.graph.set_outputs(self.outputs())
        return self.graph

    # Parts

    def shape(self) -> tuple[Size, ...]:
        lead = [self.rng.choice(self.sizes) for _ in range(self.rng.randint(0, 2))]
        return (*lead, self.rng.choice((1, 4, 24, 128, 200)))

    def name(self, plain: str) -> str:
        if self.runnable or self.rng.random() < 0.7:
            return plain
        return self.graph.fresh(self.rng.choice(NAMES))

    def location(self) -> Location:
        pick = self.rng.choice
        if self.rng.random() < 0.4:
            return Location()
        texts = ("", "mlp.py", "fc1") if self.runnable else TEXTS
        file = pick(texts)
        return Location(file, self.rng.randint(0, 999) if file else 0, pick(texts), pick(texts))

    def add(self, op: str, *args: Argument, types: list[Type] | None = None, **attrs: Any) -> tuple[Value, ...]:
        plain = op.split(".")[1]
        names = None if types is None or self.runnable else [self.name(plain) for _ in types]
        return self.graph.append(op, *args, attrs=attrs, types=types, names=names, loc=self.location()).results

    def tensor(self) -> Value:
        """An existing tensor or a new weight."""
        if self.tensors and self.rng.random() < 0.9:
            return self.rng.choice(self.tensors)
        shape = [size if isinstance(size, int) else 3 for size in self.shape()]
        self.tensors.append(self.weight(self.rng.choice(FLOATS), *shape))
        return self.tensors[-1]

    def weight(self, dtype: DType, *shape: int, op: str = PARAM) -> Value:
        name = f"layer.{len(self.graph)}.weight"
        return self.graph.append(op, attrs={"name": name}, types=[TensorType(dtype, shape)], names=[name]).result

    def last_size(self, value: Value) -> int:
        size = value.tensor.shape[-1]
        return size if isinstance(size, int) else 0

    # Runnable steps

    def elementwise(self) -> None:
        x = self.tensor()
        op = self.rng.choice(("aten.neg", "aten.relu", "aten.silu", "aten.tanh"))
        self.tensors += self.add(op, x, types=[x.type])

    def sum_of_two(self) -> None:
        x = self.tensor()
        y = self.rng.choice([other for other in self.tensors if other.type == x.type])
        self.tensors += self.add("aten.add.Tensor", x, y, types=[x.type], alpha=self.rng.choice((1, -2, 0.5)))

    def linear(self) -> None:
        x = self.tensor()
        n, k = self.rng.choice((1, 16, 130)), self.last_size(x)
        bias = (self.weight(x.tensor.dtype, n),) if self.rng.random() < 0.5 else ()
        kind = TensorType(x.tensor.dtype, (*x.tensor.shape[:-1], n))
        self.tensors += self.add("aten.linear", x, self.weight(x.tensor.dtype, n, k), *bias, types=[kind])

    def concatenation(self) -> None:
        x = self.tensor()
        if (k := self.last_size(x)) <= 256:
            parts = tuple(self.rng.choices([other for other in self.tensors if other.type == x.type], k=3))
            self.tensors += self.add(
                "aten.cat", parts, -1, types=[TensorType(x.tensor.dtype, (*x.tensor.shape[:-1], 3 * k))]
            )

    def split(self) -> None:
        x = self.tensor()
        k, part = self.last_size(x), self.rng.choice((1, 3, 64))
        if k <= 8 * part:
            sizes = [min(part, k - at) for at in range(0, k, part)]
            types: list[Type] = [TensorType(x.tensor.dtype, (*x.tensor.shape[:-1], size)) for size in sizes]
            self.tensors += self.add("aten.split.Tensor", x, part, -1, types=types)

    def topk(self) -> None:
        x = self.tensor()
        shape = (*x.tensor.shape[:-1], 1)
        types: list[Type] = [TensorType(x.tensor.dtype, shape), TensorType(DType.i64, shape)]
        self.tensors.append(self.add("aten.topk", x, 1, types=types)[0])

    def sizes_of(self) -> None:
        x = self.tensor()
        rows = x.tensor.shape[0]
        (n,) = self.add("aten.sym_size.int", x, 0, types=[ScalarType("int", rows)])
        (m,) = self.add("core.add", n, 3, types=[ScalarType("int", rows + 3)])
        (half,) = self.add("core.floordiv", m, 2, types=[ScalarType("int", ceildiv(rows + 2, 2))])
        kind = TensorType(DType.f32, (ceildiv(rows + 2, 2), 4))
        self.tensors += self.add("aten.full", (half, 4), 1.5, types=[kind], dtype=DType.f32)

    def cast(self) -> None:
        x, dtype = self.tensor(), self.rng.choice(FLOATS)
        self.tensors += self.add("aten._to_copy", x, types=[TensorType(dtype, x.tensor.shape)], dtype=dtype)

    def copy(self) -> None:
        x = self.tensor()
        self.tensors += self.add("aten.clone", x, types=[x.type], memory_format=Tag("contiguous_format"))

    def quantize(self) -> None:
        x, format = self.tensor(), self.rng.choice(FORMATS)
        data, scale = self.add("quant.quantize", x, format=format)
        if self.rng.random() < 0.5:
            self.tensors += self.add("quant.dequantize", data, scale, format=format, out_dtype=DType.f32)
            return
        w = self.add("quant.quantize", self.weight(DType.bf16, 130, self.last_size(x)), format=format)
        bias: Argument = self.weight(DType.f32, 130) if self.rng.random() < 0.5 else None
        out: dict[str, Any] = {"out_dtype": DType.bf16, "w_format": format, "x_format": format}
        self.tensors += self.add("quant.linear", data, scale, *w, bias, **out)

    def update(self) -> None:
        old = self.weight(DType.f32, 2, 4, op=BUFFER)
        if (inputs := set(self.graph.inputs) & set(self.tensors) - self.updated) and self.rng.random() < 0.5:
            old = min(inputs, key=str)
        self.updated.add(old)
        (new,) = self.add("aten.add.Scalar", old, 1, types=[old.type])
        self.add("core.update", old, new, types=[])

    STEPS: tuple[Callable[["_Writer"], None], ...] = (
        elementwise, sum_of_two, linear, concatenation, split, topk, sizes_of, cast, copy, quantize, update,
    )  # fmt: skip

    # Valid, but not runnable

    def strange(self) -> None:
        args = [self.strange_argument(0) for _ in range(self.rng.randint(0, 4))]
        attrs = {key: self.strange_argument(0) for key in self.rng.sample(KEYS, self.rng.randint(0, 3))}
        types = [self.strange_type() for _ in range(self.rng.randint(0, 3))]
        self.add(self.rng.choice(OPEN_OPS), *args, types=types, **attrs)

    def strange_argument(self, depth: int) -> Argument:
        kind = self.rng.random()
        if kind < 0.2 and depth < 3:
            return tuple(self.strange_argument(depth + 1) for _ in range(self.rng.randint(0, 3)))
        values = [value for op in self.graph for value in op.results] if kind < 0.5 else []
        if values:
            return self.rng.choice(values)
        return self.rng.choice(TEXTS if kind > 0.9 else LITERALS)

    def strange_type(self) -> Type:
        size = self.strange_size()
        choices: tuple[Type, ...] = (
            NONE, ScalarType("int"), ScalarType("int", size), ScalarType("float"), ScalarType("bool"),
            TensorType(DType.bf16, ()), TensorType(self.rng.choice([*DType]), (0, size, *self.shape())),
        )  # fmt: skip
        return self.rng.choice(choices)

    def strange_size(self) -> Size:
        a, b = symbol("u0") * self.rng.choice(self.sizes), self.rng.choice(self.sizes)
        return self.rng.choice((a, a + b, a * b - 7, (a + b) // 128, (a - b) % 6, ceildiv(a * 64, 128), b + 1))

    def outputs(self) -> tuple[Argument, ...]:
        if self.runnable:
            return tuple(self.rng.sample(self.tensors, min(len(self.tensors), 3)))
        return tuple(self.strange_argument(0) for _ in range(self.rng.randint(0, 4)))


class Function(torch.nn.Module):
    """Wraps a function as a module in evaluation mode."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.function(*args, **kwargs)


def verified(graph: Graph) -> Graph:
    """Verifies the graph, checks that its text round-trips, and returns it."""
    graph.verify()
    assert_text(Graph.parse(str(graph)), str(graph), locations=True)
    return graph
