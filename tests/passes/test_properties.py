"""Small random models through the fp8_tile pipeline: valid after each pass, and each pass keeps its declared effect."""

from random import Random

import pytest
import torch

from passes.analyses.candidates import SMALLEST
from qcompiler.interpreter import interpret
from qcompiler.ir import DType, Graph, TensorType, Value, symbol
from qcompiler.pass_manager.instruments import CheckChanged, Validate
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.schemes.named import pipeline
from qcompiler.testing import difference, random_graph, random_inputs

SIZES = (1, 8, 40, 128, 130, 256)
DTYPES = (DType.f32, DType.bf16, DType.f16)


class Model:
    """A random tree of matmuls, elementwise operations, views, casts and copies, on weights that may be shared."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.graph = Graph("model")
        self.lead: tuple[object, ...] = self.rng.choice([(), (symbol("s0"),), (2, symbol("s0"))])
        self.dtype = self.rng.choice(DTYPES)
        self.values = [self.graph.add_input("x", self.kind(self.rng.choice(SIZES)))]
        self.weights: list[Value] = []
        for _ in range(self.rng.randint(2, 9)):
            self.values.append(self.rng.choice([self.matmul, self.matmul, self.matmul, self.elementwise, self.copy])())
        self.graph.set_outputs(self.rng.sample(self.values[1:], self.rng.randint(1, 2)))

    def kind(self, last: int) -> TensorType:
        return TensorType(self.dtype, (*self.lead, last))  # type: ignore[arg-type]  # sizes

    def add(self, name: str, *args: object, types: list[TensorType], **attrs: object) -> Value:
        return self.graph.append(name, *args, types=types, attrs=attrs).result  # type: ignore[arg-type]  # arguments

    def width(self, value: Value) -> int:
        size = value.tensor.shape[-1]
        assert isinstance(size, int)
        return size

    def param(self, *shape: int) -> Value:
        """A weight: an existing one, or a cast or slice of a new one."""
        kind = TensorType(self.dtype, shape)
        known = [weight for weight in self.weights if weight.type == kind]
        if known and self.rng.random() < 0.6:
            return self.rng.choice(known)
        how = self.rng.random()
        stored = TensorType(DType.f32, shape) if how < 0.2 else TensorType(self.dtype, (shape[0] + 3, *shape[1:]))
        name = f"w{len(self.graph)}"
        op = self.graph.append("core.param", attrs={"name": name}, types=[kind if how >= 0.4 else stored], names=[name])
        made = op.result
        if how < 0.2:
            made = self.add("aten._to_copy", made, types=[kind], dtype=self.dtype)
        elif how < 0.4:
            made = self.add("aten.slice.Tensor", made, 0, 1, shape[0] + 1, types=[kind])
        self.weights.append(made)
        return made

    def matmul(self) -> Value:
        x = self.rng.choice(self.values)
        k, n = self.width(x), self.rng.choice(SIZES)
        bias = [self.param(n)] if self.rng.random() < 0.5 else []
        if self.rng.random() < 0.5:
            return self.add("aten.linear", x, self.param(n, k), *bias, types=[self.kind(n)])
        if len(self.lead) == 1 and bias:
            return self.add("aten.addmm", *bias, x, self.param(k, n), types=[self.kind(n)])
        return self.add("aten.matmul", x, self.param(k, n), types=[self.kind(n)])

    def elementwise(self) -> Value:
        x = self.rng.choice(self.values)
        if self.rng.random() < 0.3:
            return self.add("aten.mul.Tensor", x, self.param(self.width(x)), types=[self.kind(self.width(x))])
        return self.add(self.rng.choice(["aten.silu", "aten.neg", "aten.tanh"]), x, types=[self.kind(self.width(x))])

    def copy(self) -> Value:
        x = self.rng.choice(self.values)
        name = self.rng.choice(["aten.clone", "aten.alias", "aten._to_copy"])
        return self.add(name, x, types=[self.kind(self.width(x))])


def tiny(weight: Value) -> bool:
    return any(isinstance(size, int) and size < SMALLEST for size in weight.tensor.shape)


def with_numbers(graph: Graph, seed: int) -> list[torch.Tensor]:
    """Inputs, and weights scaled so that values do not grow through the graph."""
    inputs, weights = random_inputs(graph, seed, {"s0": 3})
    graph.weights = {name: tensor / max(1, tensor.shape[-1]) ** 0.5 for name, tensor in weights.items()}
    return inputs


def until(name: str) -> tuple[Pipeline, Pipeline]:
    """The scheme's pipeline, up to and including the pass called `name`."""
    steps = pipeline("fp8_tile")
    at = steps.names.index(name) + 1
    return Pipeline(steps.passes[:at]), Pipeline(steps.passes[at:])


def shared(graph: Graph, inputs: list[torch.Tensor]) -> int:
    """The number of outputs that share memory with another output or with an input or weight."""
    given = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, *graph.weights.values())}
    places = [tensor.untyped_storage().data_ptr() for tensor in interpret(graph, inputs) if tensor.numel()]
    return sum(place in given or places.count(place) > 1 for place in places)


@pytest.mark.parametrize("seed", range(40))
def test_the_kernel_graph_computes_what_the_quantized_graph_computes(seed: int) -> None:
    graph = Model(seed).graph
    inputs = with_numbers(graph, seed)
    shared_before = shared(graph, inputs)
    quantize, lower = until("fp8-tile")
    run_pipeline(quantize, graph, instruments=[CheckChanged(), Validate()], inputs=inputs)
    qdq = interpret(graph, inputs)
    done = run_pipeline(lower, graph, instruments=[CheckChanged(), Validate()], inputs=inputs)
    for got, want in zip(interpret(graph, inputs), qdq, strict=True):
        assert got.dtype is want.dtype
        assert difference(got, want) < 1e-8
    # Every matmul has a constant matrix here, so only those with a tiny matrix remain.
    left = [op for op in graph.ops() if op.name.startswith(("aten.linear", "aten.mm", "aten.matmul", "aten.addmm"))]
    assert all(op.name == "aten.linear" and tiny(op["weight"]) for op in left)
    assert not any(done.skipped[name] for name in lower.names[: lower.names.index("to-kernels") + 1])
    # No two outputs newly share memory, and no output newly shares memory with an input or weight.
    assert shared(graph, inputs) <= shared_before
    text = str(graph)
    run_pipeline(pipeline("fp8_tile"), graph)
    assert str(graph) == text


@pytest.mark.parametrize("seed", range(25))
def test_any_valid_graph_survives(seed: int) -> None:
    graph = random_graph(seed, size=25)
    run_pipeline(pipeline("fp8_tile"), graph, instruments=[CheckChanged()])
    runnable = random_graph(seed, size=25, runnable=True)
    inputs, weights = random_inputs(runnable, seed)
    runnable.weights = dict(weights)
    exact = Pipeline.parse(
        "canonicalize; dead-code; share-quantize; fuse-linear; fold-constants; dead-code; to-kernels"
    )
    run_pipeline(exact, runnable, instruments=[CheckChanged(), Validate()], inputs=inputs)
