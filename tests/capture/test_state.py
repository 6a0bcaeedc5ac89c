"""Capture of state and weights."""

import copy
import warnings
from typing import Any

import pytest
import torch
from models import SiluMlp
from torch import Tensor, nn

from qcompiler.capture import capture
from qcompiler.errors import CaptureWarning
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.testing import Function, verified


def names(graph: Graph) -> list[str]:
    return [op.name for op in graph.ops()]


# State


class Counter(nn.Module):
    count: torch.Tensor
    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4), persistent=False)
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return x * self.count - self.mean


class Cache(nn.Module):
    keys: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, 16, 4))
        self.eval()

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        self.keys.index_copy_(1, position, x)
        return x @ self.keys.transpose(1, 2)


def test_buffers_written_by_the_model_become_updates_and_are_restored() -> None:
    model = Counter()
    buffer = model.mean
    captured = capture(model, (torch.randn(3, 4),))
    graph = verified(captured.graph)
    assert model.mean is buffer and not model.mean.any() and model.count == 0
    assert {str(op.attrs["name"]) for op in graph.ops("core.buffer")} == {"count", "mean"}
    x, updates = torch.randn(5, 4), dict[str, torch.Tensor]()
    (out,) = interpret(graph, [x], updates=updates)
    assert torch.equal(out, model(x))
    assert torch.equal(updates["mean"], model.mean) and updates["count"] == 1


def test_a_cache_in_a_buffer() -> None:
    model = Cache()
    captured = capture(model, (torch.randn(2, 3, 4), torch.arange(3)))
    verified(captured.graph)
    assert not model.keys.any()
    x, updates = torch.randn(2, 5, 4), dict[str, torch.Tensor]()
    (out,) = interpret(captured.graph, captured.signature.flatten((x, torch.arange(4, 9))), updates=updates)
    assert torch.equal(out, model(x, torch.arange(4, 9)))
    assert torch.equal(updates["keys"], model.keys)


def test_inputs_written_by_the_model_become_updates_and_the_example_stays_unchanged() -> None:
    def function(x: torch.Tensor, log: torch.Tensor) -> torch.Tensor:
        log.add_(x.sum())
        return x * log

    x, log = torch.randn(3), torch.zeros(2, 1)
    captured = capture(Function(function), (x, log))
    assert not log.any()
    updates = dict[str, torch.Tensor]()
    (out,) = interpret(captured.graph, [x, log], updates=updates)
    assert torch.equal(updates[captured.graph.inputs[1].name], torch.full((2, 1), x.sum().item()))
    assert torch.equal(out, x * x.sum().expand(2, 1)) and not log.any()


# Weights


def test_weights_are_shared_and_the_model_stays_unchanged() -> None:
    model = SiluMlp()
    before = copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    captured = capture(model, (torch.randn(3, 8),))
    for name, parameter in model.named_parameters():
        assert captured.graph.weights[name].data_ptr() == parameter.data_ptr()
        assert torch.equal(parameter, before[name]) and parameter.requires_grad and parameter.grad is None
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert "forward" not in vars(model)


def test_tied_weights_are_one_value_with_all_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight
            self.eval()

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, ids: torch.Tensor) -> Any:
            return self.head(self.embed(ids))

    captured = capture(Tied(), (torch.randint(10, (3, 4)),))
    (param,) = verified(captured.graph).ops("core.param")
    name = str(param.attrs["name"])
    assert set(captured.graph.weights.ties[name]) == {"embed.weight", "head.weight"}  # type: ignore[attr-defined]
    assert param.attrs["role"] == "output_embeddings"
    assert len(captured.graph.uses(param.result)) == 2


def test_constants_in_code_become_weights() -> None:
    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.arange(4.0)  # not a buffer
            self.eval()

        def forward(self, x: torch.Tensor) -> Any:
            return x * self.table + torch.tensor([1.0, 2.0, 3.0, 4.0])

    model = Constants()
    captured = capture(model, (torch.randn(3, 4),))
    assert len(captured.graph.weights) == 2
    x = torch.randn(6, 4)
    assert torch.equal(captured.run(x), model(x))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_on_the_meta_device_gives_only_the_structure(rows: int) -> None:
    with torch.device("meta"):
        model = SiluMlp()
    x = torch.empty(rows, 8, device="meta")
    captured = capture(model, (x,), allow_meta=True)
    assert str(verified(captured.graph).inputs[0].type) == "f32[s0, 8]"
    assert captured.graph.weights["fc1.weight"].is_meta
    real = SiluMlp()
    (out,) = interpret(captured.graph, [torch.ones(3, 8)], real.state_dict())
    assert torch.equal(out, real(torch.ones(3, 8)))


class Windows(nn.Module):
    """Attention in windows that shrink to the smallest input so far, like those of Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.linear = 8, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] <= self.window:
            self.window = x.shape[1]
        y: Tensor = self.linear(x).unflatten(1, (-1, self.window)).mean(1)
        return y


def test_plain_attributes_changed_by_a_run_or_a_trace_are_restored() -> None:
    model, x = Windows().eval(), torch.randn(3, 8, 16)
    want = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)  # the number of windows is fixed
        captured = capture(model, (x,))
    assert model.window == 8 and type(model.window) is int
    assert torch.equal(model(x), want) and torch.equal(captured.run(x), want)
    model.window = 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        capture(model, (x,))
    assert model.window == 16 and type(model.window) is int


class Notes(SiluMlp):
    """Stores past inputs and a mask in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Any] = ["none"]
        self.kinds = {"none"}
        self.masks: dict[Any, Any] = {"none": None}

    def forward(self, x: torch.Tensor) -> Any:
        self.shapes.append(x.shape)
        self.kinds.add(str(x.dtype))
        if "two" not in self.masks:
            self.masks["two"] = torch.full((8,), 2.0)
        return super().forward(x) * self.masks["two"]


@pytest.mark.parametrize("called", [False, True])
def test_containers_changed_by_a_run_or_a_trace_are_restored(called: bool) -> None:
    model, x = Notes(), torch.randn(3, 8)
    want = model(x) if called else None
    kept = model.shapes, model.kinds, model.masks
    contents = [copy.copy(container) for container in kept]
    captured = capture(model, (x,))
    assert all(now is then for now, then in zip((model.shapes, model.kinds, model.masks), kept, strict=True))
    assert [*kept] == contents
    assert torch.equal(captured.run(x), model(x)) and (want is None or torch.equal(want, model(x)))


class Lazy(SiluMlp):
    """Computes a mask and a layer in the first call and keeps them."""

    def forward(self, x: torch.Tensor) -> Any:
        if not hasattr(self, "mask"):
            self.mask = torch.full((8,), 2.0)
            self.last = nn.Linear(8, 8, bias=False).requires_grad_(False)
            nn.init.ones_(self.last.weight)
        self.rows = x.shape[0]
        return super().forward(x) * self.mask + self.last(x)


def test_attributes_added_by_a_trace_are_removed() -> None:
    model, x = Lazy(), torch.randn(3, 8)
    captured = capture(model, (x,))
    assert type(model.rows) is int and type(model.mask) is Tensor
    assert torch.equal(captured.run(x), model(x))
    fresh = Lazy()
    capture(fresh, (x,), check=False)  # without running the model itself
    assert not {"mask", "rows"} & vars(fresh).keys() and "last" not in fresh._modules
    assert fresh(x).shape == (3, 8)
