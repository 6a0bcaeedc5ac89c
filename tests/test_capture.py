"""Capture: every kind of model and call that has to work, and the sentence for each that cannot."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from qcompiler.capture import Captured, capture
from qcompiler.capture.bounds import BoundsCheck
from qcompiler.capture.locations import short_path
from qcompiler.errors import CaptureError
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.ir.graph import Range


def run(captured: Captured, *args: Any, **kwargs: Any) -> Any:
    """What the graph gives for a call."""
    return captured.signature.unflatten(interpret(captured.graph, captured.signature.flatten(args, kwargs)))


def check_text(captured: Captured) -> Graph:
    """The graph, verified, after a round trip through its text."""
    captured.graph.verify()
    assert str(Graph.parse(str(captured.graph))) == str(captured.graph)
    return captured.graph


def names(graph: Graph) -> list[str]:
    return [op.name for op in graph.ops()]


class Function(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8)
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc2(functional.silu(self.fc1(x)))


# What a graph looks like


def test_an_mlp_becomes_three_operations_that_know_where_they_come_from() -> None:
    model = MLP()
    captured = capture(model, (torch.randn(3, 5, 8),))
    graph = check_text(captured)
    assert names(graph)[4:] == ["aten.linear", "aten.silu", "aten.linear"]
    assert graph.name == "MLP" and [str(v.type) for v in graph.inputs] == ["f32[s0, s1, 8]"]
    first = graph.ops("aten.linear")[0]
    assert first.args == (graph["x"], graph["fc1.weight"], graph["fc1.bias"])
    assert first.loc.module == "fc1" and first.loc.file.endswith("test_capture.py") and first.loc.line > 0
    x = torch.randn(1, 9, 8)
    assert torch.equal(run(captured, x), model(x))


def test_composites_that_passes_look_for_stay_whole() -> None:
    class Composites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.eval()

        def forward(self, q: torch.Tensor, image: torch.Tensor) -> Any:
            y = functional.scaled_dot_product_attention(q, q, q)
            y = functional.rms_norm(functional.layer_norm(y, (8,)), (8,)) @ q.transpose(1, 2)
            return functional.gelu(functional.softmax(y, -1)), functional.group_norm(self.conv(image), 2)

    captured = capture(Composites(), (torch.randn(2, 5, 8), torch.randn(2, 3, 6, 6)))
    whole = {
        "scaled_dot_product_attention",
        "layer_norm",
        "rms_norm",
        "matmul",
        "softmax.int",
        "gelu",
        "conv2d",
        "group_norm",
    }
    assert {f"aten.{name}" for name in whole} <= set(names(captured.graph))
    assert len(captured.signature.conditions) <= 1  # what group_norm demands; nothing about strides


def test_an_einsum_becomes_a_batched_product() -> None:
    captured = capture(
        Function(lambda a, b: torch.einsum("bsd,btd->bst", a, b)), (torch.randn(2, 3, 4), torch.randn(2, 5, 4))
    )
    assert "aten.bmm" in names(captured.graph) and "aten.einsum" not in names(captured.graph)


def test_operations_with_several_results_have_no_getitem() -> None:
    def function(x: torch.Tensor) -> Any:
        a, b = x.split(4, dim=-1)
        return torch.stack([*x.chunk(2, -1), a, b]), x.unbind(1)[0], torch.max(x, -1)

    captured = capture(Function(function), (torch.randn(3, 2, 8),))
    graph = check_text(captured)
    assert "core.getitem" not in names(graph)
    assert [str(v) for v in graph.ops("aten.split.Tensor")[0].results] == ["%split.0", "%split.1"]
    x = torch.randn(5, 2, 8)
    assert all(torch.equal(a, b) for a, b in zip(run(captured, x)[2], torch.max(x, -1), strict=True))


def test_sizes_are_values() -> None:
    def function(x: torch.Tensor) -> Any:
        n = x.shape[0]
        return torch.arange(n * 2 + 1), x.new_zeros((n // 2, n)), n * 3, x.reshape(-1)

    captured = capture(Function(function), (torch.randn(6, 4),))
    graph = check_text(captured)
    outputs = [str(v.type) for v in graph.outputs]  # type: ignore[union-attr]
    assert outputs == ["i64[2*s0 + 1]", "f32[floordiv(s0, 2), s0]", "int(3*s0)", "f32[s0*s1]"]
    got = run(captured, torch.randn(9, 4))
    assert (len(got[0]), tuple(got[1].shape), got[2]) == (19, (4, 9), 27)
    assert all("device" not in op.attrs for op in graph)


def test_mixed_dtypes_and_autocast_and_no_grad_regions_are_inlined() -> None:
    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.fc(x)
            with torch.no_grad():
                scale = x.float().square().mean(-1, keepdim=True)
            return y * scale.to(torch.float16) + x.to(torch.float16)

    model = Regions().eval()
    captured = capture(model, (torch.randn(3, 8),))
    graph = check_text(captured)
    assert str(graph.ops("aten.linear")[0].result.type) == "bf16[s0, 8]"
    assert all(name.startswith(("aten.", "core.")) for name in names(graph))
    x = torch.randn(5, 8)
    assert torch.equal(run(captured, x), model(x))


def test_in_place_operators_become_functional() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y[:, 0] = 0
        y.add_(x).relu_()
        return y

    captured = capture(Function(function), (torch.randn(3, 4),))
    assert not any(name.split(".")[1].endswith("_") for name in names(captured.graph))
    assert "core.update" not in names(captured.graph)


def test_unused_inputs_stay_and_unused_weights_go() -> None:
    model = MLP()
    model.register_buffer("unused", torch.zeros(3))
    captured = capture(model, (torch.randn(3, 8),))
    assert "unused" not in captured.graph.weights
    both = capture(Function(lambda x, y: x + 1), (torch.randn(3), torch.randn(4)))
    assert len(both.graph.inputs) == 2
    assert torch.equal(run(both, torch.ones(2), torch.ones(7)), torch.full((2,), 2.0))


# Calls


@dataclass
class Box:
    left: torch.Tensor
    rest: list[Any]


torch.utils._pytree.register_dataclass(Box)


class Nested(nn.Module):
    def forward(
        self,
        x: torch.Tensor,
        box: Box,
        *,
        batch: dict[str, Any],
        mask: torch.Tensor | None = None,
        times: int = 2,
        neg: bool = False,
    ) -> Any:
        y = (x + box.left) * times + batch["a"][1]
        if mask is not None:
            y = y * mask
        return Box(-y if neg else y, [box.rest[0] * 2, None, {"k": (x, 5, "text")}])


def test_nested_arguments_and_results() -> None:
    def call(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        box = Box(torch.randn(n, 4), [torch.randn(n)])
        return (torch.randn(n, 4), box), {"batch": {"a": [None, torch.randn(4)]}, "times": 3, "neg": True}

    model = Nested().eval()
    args, kwargs = call(3)
    captured = capture(model, args, kwargs)
    check_text(captured)
    args, kwargs = call(6)
    got, want = run(captured, *args, **kwargs), model(*args, **kwargs)
    assert isinstance(got, Box) and torch.equal(got.left, want.left) and torch.equal(got.rest[0], want.rest[0])
    assert got.rest[1] is None and got.rest[2]["k"][1:] == (5, "text")


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_examples_of_size_1_are_still_dynamic(shape: tuple[int, int]) -> None:
    def function(x: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return functional.softmax(x @ x.transpose(1, 2), -1) @ x * scale[:, 0] + bias.unsqueeze(-1)

    def call(batch: int, length: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(batch, length, 4), torch.randn(batch, length), torch.ones(batch, 1, 1, 4)

    model = Function(function)
    captured = capture(model, call(*shape))
    assert [str(v.type) for v in captured.graph.inputs[:2]] == ["f32[s0, s1, s2]", "f32[s0, s1]"]
    for sizes in ((1, 1), (3, 5), (1, 6), (4, 1)):
        args = call(*sizes)
        assert torch.equal(run(captured, *args), model(*args))


def test_a_size_of_1_that_the_model_needs_stays_1() -> None:
    captured = capture(Function(lambda x, bias: x + bias.expand(x.shape[0], 4)), (torch.randn(3, 4), torch.randn(1, 4)))
    assert [str(v.type) for v in captured.graph.inputs] == ["f32[s0, 4]", "f32[1, 4]"]


def test_the_least_size_is_found_by_trying() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * (2 if x.shape[0] == 1 else 3) + y.sum()

    captured = capture(Function(function), (torch.randn(4, 3), torch.randn(5)))
    assert captured.graph.symbols == {"s0": Range(2), "s1": Range(0), "s2": Range(0)}
    assert captured.signature.symbols == captured.graph.symbols


def test_a_batch_of_1_needs_all_its_symbols_at_1() -> None:
    def function(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask[torch.arange(x.shape[0])]  # the mask's batch is another symbol, but may not be the smaller one

    model = Function(function)
    captured = capture(model, (torch.randn(3, 4), torch.randn(3, 4)))
    assert [str(v.type) for v in captured.graph.inputs] == ["f32[s0, s1]", "f32[s2, s1]"]
    x, mask = torch.randn(1, 4), torch.randn(1, 4)
    assert torch.equal(run(captured, x, mask), model(x, mask))


def test_fixed_shapes_and_a_specification_of_ones_own() -> None:
    fixed = capture(MLP(), (torch.randn(3, 5, 8),), dynamic_shapes=None)
    assert str(fixed.graph.inputs[0].type) == "f32[3, 5, 8]" and fixed.graph.symbols == {}
    rows = torch.export.Dim("rows", min=2, max=64)
    own = capture(MLP(), (torch.randn(3, 5, 8),), dynamic_shapes={"x": {0: rows}})
    assert str(own.graph.inputs[0].type) == "f32[s0, 5, 8]" and own.graph.symbols["s0"].high == 64


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


def test_buffers_that_the_model_writes_are_updates_and_are_restored() -> None:
    model = Counter()
    buffer = model.mean
    captured = capture(model, (torch.randn(3, 4),))
    graph = check_text(captured)
    assert model.mean is buffer and not model.mean.any() and model.count == 0
    assert {str(op.attrs["name"]) for op in graph.ops("core.buffer")} == {"count", "mean"}
    x, updates = torch.randn(5, 4), dict[str, torch.Tensor]()
    (out,) = interpret(graph, [x], updates=updates)
    assert torch.equal(out, model(x))
    assert torch.equal(updates["mean"], model.mean) and updates["count"] == 1


def test_a_cache_in_a_buffer() -> None:
    model = Cache()
    captured = capture(model, (torch.randn(2, 3, 4), torch.arange(3)))
    check_text(captured)
    assert not model.keys.any()
    x, updates = torch.randn(2, 5, 4), dict[str, torch.Tensor]()
    (out,) = interpret(captured.graph, captured.signature.flatten((x, torch.arange(4, 9))), updates=updates)
    assert torch.equal(out, model(x, torch.arange(4, 9)))
    assert torch.equal(updates["keys"], model.keys)


def test_inputs_that_the_model_writes_are_updates_and_the_example_is_left_alone() -> None:
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


def test_weights_are_shared_and_the_model_is_left_as_it_was() -> None:
    model = MLP()
    before = copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    captured = capture(model, (torch.randn(3, 8),))
    for name, parameter in model.named_parameters():
        assert captured.graph.weights[name].data_ptr() == parameter.data_ptr()
        assert torch.equal(parameter, before[name]) and parameter.requires_grad and parameter.grad is None
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert "forward" not in vars(model)


def test_tied_weights_are_one_value_that_knows_its_names() -> None:
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
    (param,) = check_text(captured).ops("core.param")
    name = str(param.attrs["name"])
    assert set(captured.graph.weights.ties[name]) == {"embed.weight", "head.weight"}  # type: ignore[attr-defined]
    assert param.attrs["role"] == "output_embeddings"
    assert len(captured.graph.uses(param.result)) == 2


def test_constants_of_the_code_become_weights() -> None:
    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.arange(4.0)  # no buffer
            self.eval()

        def forward(self, x: torch.Tensor) -> Any:
            return x * self.table + torch.tensor([1.0, 2.0, 3.0, 4.0])

    model = Constants()
    captured = capture(model, (torch.randn(3, 4),))
    assert len(captured.graph.weights) == 2
    x = torch.randn(6, 4)
    assert torch.equal(run(captured, x), model(x))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_on_the_meta_device_gives_the_structure_alone(rows: int) -> None:
    with torch.device("meta"):
        model = MLP()
    x = torch.empty(rows, 8, device="meta")
    captured = capture(model, (x,), allow_meta=True)
    assert str(check_text(captured).inputs[0].type) == "f32[s0, 8]"
    assert captured.graph.weights["fc1.weight"].is_meta
    real = MLP()
    (out,) = interpret(captured.graph, [torch.ones(3, 8)], real.state_dict())
    assert torch.equal(out, real(torch.ones(3, 8)))


# Other sources and ways


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program_is_as_good_as_a_model(decomposed: bool) -> None:
    model = MLP()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own
        program = torch.export.export(model, (torch.randn(3, 8),), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}})
        program = program.run_decompositions() if decomposed else program
    captured = capture(program)
    check_text(captured)
    assert captured.graph.weights["fc1.weight"].data_ptr() == model.fc1.weight.data_ptr()
    x = torch.randn(5, 8)
    torch.testing.assert_close(run(captured, x), model(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(run(captured, x=x), run(captured, x))


def test_strict_mode_is_tried_when_plain_tracing_fails() -> None:
    model = Function(lambda x: torch.from_numpy(x.numpy() * 2) + x)  # only dynamo understands numpy
    captured = capture(model, (torch.randn(3, 4),))
    assert torch.equal(run(captured, torch.ones(5, 4)), torch.full((5, 4), 3.0))


def test_a_graph_that_differs_from_the_model_is_refused() -> None:
    class Growing(nn.Module):
        """Holds state outside of buffers, so that no two calls agree."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.eval()

        def forward(self, x: torch.Tensor) -> Any:
            self.calls += 1
            return x * self.calls

    with pytest.raises(CaptureError, match=r"the output differs: got a largest difference of .*x\[2, 3\]"):
        capture(Growing(), (torch.randn(3, 4),))
    capture(Growing(), (torch.randn(3, 4),), check=False)


# What is refused, in one sentence each


def hooked() -> nn.Module:
    model = MLP()
    model.fc1.register_forward_hook(lambda *_: None)
    return model


def backward_hooked() -> nn.Module:
    model = MLP()
    model.fc2.register_full_backward_hook(lambda *_: None)
    return model


def pre_hooked() -> nn.Module:
    model = MLP()
    model.register_forward_pre_hook(lambda *_: None)
    return model


def offloaded() -> nn.Module:
    model = MLP()
    model.fc1._hf_hook = type("AlignDevicesHook", (), {})()
    return model


def half_training() -> nn.Module:
    model = MLP()
    model.fc2.train()
    return model


def half_meta() -> nn.Module:
    model = MLP()
    model.fc2.to("meta")
    return model


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.trace(MLP(), torch.randn(2, 8))


def compiled() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor imports what is deprecated
        return torch.compile(MLP())


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: MLP().train(), r"training mode: got model.training is True. Call model.eval\(\)"),
    (half_training, "training mode: got model.fc2.training is True"),
    (hooked, "a forward hook on model.fc1, and a graph cannot call it: got hooked.<locals>.<lambda>"),
    (pre_hooked, "a forward pre-hook on model, "),
    (backward_hooked, "a backward hook on model.fc2, "),
    (offloaded, "accelerate has put a hook on model.fc1.*: got AlignDevicesHook"),
    (half_meta, "'fc2.weight' lies on the meta device and has no data"),
    (compiled, "a model that torch.compile wraps"),
    (lambda: print, "only a torch.nn.Module or an ExportedProgram can be captured: got builtin_function_or_method"),
    (scripted, "a TorchScript module cannot be captured"),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED, ids=[r[1][:40] for r in REFUSED])
def test_preflight(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(CaptureError, match=sentence):
        capture(make(), (torch.randn(2, 8),))


def test_preflight_of_devices() -> None:
    with pytest.raises(CaptureError, match=r"several devices: got 'fc1.weight' on cpu, 'fc2.weight' on meta"):
        capture(half_meta(), (torch.randn(2, 8),), allow_meta=True)
    with pytest.raises(CaptureError, match=r"another device than the model: .*: got meta; need cpu"):
        capture(MLP(), (torch.randn(2, 8, device="meta"),))


def data_dependent(x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        return x * 2
    return x


def test_a_branch_on_data_is_quoted_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = data_dependent.__code__.co_firstlineno + 1
    with pytest.raises(CaptureError, match=rf"test_capture.py:{line}: if x.sum\(\) > 0:.*torch.where") as caught:
        capture(Function(data_dependent), (torch.randn(3, 4),))
    assert "depends on the values of a tensor" in str(caught.value)
    assert capsys.readouterr().err == ""


def broken(x: torch.Tensor) -> torch.Tensor:
    return x @ torch.ones(3, 3)


def test_any_other_failure_is_one_sentence_with_the_users_line() -> None:
    line = broken.__code__.co_firstlineno + 1
    with pytest.raises(
        CaptureError, match=rf"cannot be traced: got RuntimeError: .*test_capture.py:{line}: return x @"
    ):
        capture(Function(broken), (torch.randn(5, 4),))


def test_control_flow_operators_are_refused_with_the_users_line() -> None:
    model = Function(lambda x: torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x * 3, (x,)))
    with pytest.raises(CaptureError, match=r"control flow over sub-graphs .*got cond \(in .*test_capture.py"):
        capture(model, (torch.randn(3, 4),))


def test_an_unknown_word_for_dynamic_shapes() -> None:
    with pytest.raises(CaptureError, match="got 'dynamic'; need 'auto' or None"):
        capture(MLP(), (torch.randn(2, 8),), dynamic_shapes="dynamic")


# Parts


def test_indices_out_of_range_raise_before_they_reach_a_device() -> None:
    x = torch.randn(4, 3)
    index = torch.tensor
    with BoundsCheck():
        assert x[index([0, -1])].shape == (2, 3) and x[x > 9].numel() == 0
        (
            functional.embedding(index([3]), x),
            x.gather(1, index([[2]])),
            x[:, index([2])],
            x.index_copy(0, index([3]), x[:1]),
        )
        out_of_range: list[Callable[[], Any]] = [
            lambda: x[index([4])],
            lambda: x[:, index([3])],
            lambda: functional.embedding(index([-1]), x),
            lambda: x.gather(1, index([[3]])),
            lambda: x.index_copy(0, index([4]), x[:1]),
            lambda: torch.zeros(3).scatter(0, index([3]), 1.0),
        ]
        for access in out_of_range:
            with pytest.raises(IndexError, match="out of range for"):
                access()


def test_locations_show_no_machine_paths() -> None:
    assert short_path("/opt/x/lib/python3.11/site-packages/transformers/models/a.py") == "transformers/models/a.py"
    assert short_path("/somewhere/else/model.py") == "model.py"
