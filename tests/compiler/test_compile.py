"""`qcompiler.compile`: the public interface; its errors are in test_errors.py."""

import copy
import inspect
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from models import Mlp
from torch import Tensor, nn

import qcompiler
from qcompiler import CaptureError, CompiledModel, InputError, QCompilerError
from qcompiler.pass_manager.pipeline import PASSES


class Counter(nn.Module):
    """State that each call changes: both the sum of what came in, and how often something did."""

    total: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("total", torch.zeros(16))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = self.total * 1
        self.total.add_(self.linear(x).sum(0))
        self.calls.add_(1)
        return before, self.total * self.calls


class Struct(NamedTuple):
    hidden: Tensor
    rest: dict[str, Any]


def close(got: Tensor, want: Tensor, limit: float = 0.08) -> bool:
    got, want = got.detach(), want.detach()
    return float((got - want).norm() / want.norm().clamp_min(1e-9)) < limit


X = torch.randn(5, 200, generator=torch.Generator().manual_seed(1))


def test_the_first_call_captures(mlp: Mlp) -> None:
    compiled = qcompiler.compile(mlp, scheme="fp8_tile")
    assert isinstance(compiled, nn.Module) and not compiled.training
    assert "not captured yet" in repr(compiled)
    with pytest.raises(CaptureError, match=r"the model is not captured yet\. Call it once with real inputs"):
        print(compiled.report)
    assert close(compiled(X), mlp(X))
    assert "2 of 2 matmuls" in repr(compiled)
    assert torch.equal(compiled(X[:2]), qcompiler.compile(mlp, example_inputs=(X,))(X[:2]))


def test_device_and_dtype_are_those_of_the_model(mlp: Mlp, fast: CompiledModel) -> None:
    assert (fast.device, fast.dtype) == (torch.device("cpu"), torch.float32)
    half = qcompiler.compile(mlp.bfloat16(), example_inputs=(X.bfloat16(),))
    assert half.dtype is torch.bfloat16
    with pytest.raises(CaptureError, match="not captured yet"):
        print(qcompiler.compile(mlp).dtype)


def test_a_model_without_a_configuration_gives_none_away(fast: CompiledModel) -> None:
    assert not hasattr(fast, "config")


def test_each_pass_leaves_a_record(fast: CompiledModel) -> None:
    assert [step.stage for step in fast.steps] == list(fast.stages)[1:]
    assert [step.spec for step in fast.steps] == [str(step) for step in fast.pipeline]
    tile = fast.steps[list(fast.stages).index("fp8-tile") - 1]
    assert (tile.effect, tile.changed) == ("lossy", True) and tile.seconds > 0
    assert not next(step for step in fast.steps if step.stage == "share-quantize").changed


def test_stages_report_source_and_graph(fast: CompiledModel) -> None:
    assert list(fast.stages) == [
        "captured", "canonicalize", "attention", "dead-code", "merge-linears", "fp8-tile", "share-quantize",
        "fuse-linear", "fold-constants", "dead-code#2", "to-kernels", "gather-codes", "fuse-norm-quantize",
        "fuse-activation-quantize", "fuse-epilogue",
    ]  # fmt: skip
    assert "quant.dequantize" in str(fast.stages["fp8-tile"])
    assert "+ " in str(qcompiler.diff(fast.stages["captured"], fast.graph))
    assert "2 of 2 matmuls with a constant operand are quantized" in str(fast.report)
    assert "kernels.scaled_linear(" in fast.source and fast.source.startswith('"""@Mlp')
    assert len(fast.stages["to-kernels"].ops("kernel.scaled_linear")) == 2
    linears = [op.name for op in fast.graph.ops() if "linear" in op.name]
    assert linears == ["kernel.fused_linear", "kernel.scaled_linear"]
    assert str(qcompiler.Graph.parse(str(fast.graph))) == str(fast.graph)
    assert fast.graph.to_networkx().number_of_nodes() == len(fast.graph)
    fast.graph.verify()


def test_the_result_is_that_of_the_interpreted_graph(fast: CompiledModel) -> None:
    (want,) = qcompiler.interpret(fast.graph, [X])
    assert torch.equal(fast(X), want)


@pytest.mark.parametrize("rows", [0, 1, 2, 33])
def test_any_number_of_rows(fast: CompiledModel, mlp: Mlp, rows: int) -> None:
    got = fast(X[:1].repeat(rows, 1))
    assert got.shape == (rows, 64) and (not rows or close(got, mlp(X[:1].repeat(rows, 1))))


@pytest.mark.parametrize("x", [X.t().contiguous().t(), X[:, :1].expand(5, 200), X.repeat(1, 2)[:, ::2]])
def test_inputs_that_are_not_contiguous(fast: CompiledModel, x: Tensor) -> None:
    assert not x.is_contiguous() and torch.equal(fast(x), fast(x.contiguous()))


def test_a_custom_pass(mlp: Mlp) -> None:
    @dataclass(frozen=True)
    class Nothing(qcompiler.Pass):
        """x -> x."""

        name: ClassVar[str] = "nothing-in-test-compile"

        def run(self, graph: qcompiler.Graph) -> bool:
            return False

    try:
        edited = qcompiler.pipeline("fp8_tile").insert_after("fp8-tile", Nothing())
        assert Nothing.name in qcompiler.compile(mlp, example_inputs=(X,), pipeline=edited).stages
        text = qcompiler.compile(mlp, example_inputs=(X,), pipeline=str(edited))
        assert text.pipeline == edited
    finally:
        del PASSES[Nothing.name]


def test_a_pipeline_that_only_simulates_counts_as_quantized(mlp: Mlp) -> None:
    slow = qcompiler.compile(mlp, example_inputs=(X,), pipeline="fp8-tile")
    fast = qcompiler.compile(mlp, example_inputs=(X,))
    assert len(slow.report.quantized) == 2
    assert torch.allclose(slow(X), fast(X), rtol=1e-5, atol=1e-6)
    assert "lookup(" in slow.source


def test_the_signature_is_the_models_own(fast: CompiledModel, mlp: Mlp) -> None:
    assert inspect.signature(fast.forward) == inspect.signature(mlp.forward)
    assert inspect.getdoc(fast.forward) == "f32[rows, 200] -> f32[rows, 64]."
    assert type(fast).__name__ == "CompiledModel" and isinstance(fast, CompiledModel)
    assert inspect.signature(qcompiler.compile(mlp).forward) == inspect.signature(mlp.forward)


def test_arguments_by_name_and_in_structures(mlp: Mlp) -> None:
    fast = qcompiler.compile(mlp, example_inputs=(X,), example_kwargs={"shift": torch.ones(64)})
    want = fast(X, shift=torch.ones(64))
    assert torch.equal(fast(shift=torch.ones(64), x=X), want)
    assert torch.equal(fast(X, None, shift=torch.ones(64)), want)
    assert close(want, mlp(X, shift=torch.ones(64)))


def test_structured_outputs_with_inputs_weights_numbers_and_none() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor, y: Tensor) -> Struct:
            h = self.linear(x)
            return Struct(
                h, {"none": None, "seven": 7, "x": y, "bias": self.linear.bias, "twice": h, "rows": x.shape[0]}
            )

    model, x = Odd().eval(), torch.randn(3, 16)
    fast = qcompiler.compile(model, example_inputs=(x, x))
    for call in ((x, x), (x[:2], x)):
        try:
            got = fast(*call)
        except InputError:  # the example had one tensor twice, and capture may hold the caller to one size for both
            continue
        assert isinstance(got, Struct)
        assert got.rest["none"] is None and got.rest["seven"] == 7 and got.rest["rows"] == call[0].shape[0]
        assert torch.equal(got.rest["x"], call[1]) and torch.equal(got.rest["bias"], model.linear.bias)
        assert torch.equal(got.rest["twice"], got.hidden)


def test_a_model_without_inputs() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self) -> Tensor:
            return self.weight.relu()

    model = Fixed().eval()
    for fast in (qcompiler.compile(model, strict=False), qcompiler.compile(model, example_inputs=(), strict=False)):
        assert torch.equal(fast(), model())


def test_weights_with_names_of_module_attributes() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("device", "_store", "weights"):
                self.register_parameter(name, nn.Parameter(torch.randn(16, 16)))
            self.to_ = nn.ModuleDict({"device": nn.Linear(16, 16)})

        def forward(self, x: Tensor) -> Tensor:
            matrices = dict(self.named_parameters(recurse=False))
            y: Tensor = self.to_["device"](x @ matrices["device"] @ matrices["_store"] @ matrices["weights"])
            return y

    model, x = Names().eval(), torch.randn(3, 16)
    assert close(qcompiler.compile(model, example_inputs=(x,))(x), model(x), 0.2)


def test_state_persists_and_is_the_compiled_models_own() -> None:
    torch.manual_seed(0)
    model, x = Counter().eval(), torch.randn(3, 16)
    fast = qcompiler.compile(model, example_inputs=(x,), strict=True)
    twin = copy.deepcopy(fast)
    first, second = fast(x), fast(x)
    assert torch.equal(first[0], torch.zeros(16)) and torch.allclose(second[0], first[1])
    assert torch.allclose(second[1], 4 * first[1])
    assert not model.total.any() and not model.calls
    assert torch.equal(twin(x)[1], first[1]), "a copy has its own state"
    assert torch.equal(fast.graph.weights["total"], second[1] / 2)


def test_a_graph_with_weights() -> None:
    text = """
    func @g(%x: f32[s0, 32], %class: f32[s0, 16]) -> (f32[s0, 16], f32[s0, 16]) {
      %w = core.param() {name = "w"} : f32[16, 32]
      %linear = aten.linear(%x, %w) : f32[s0, 16]
      %sum = aten.add.Tensor(%linear, %class) : f32[s0, 16]
      return %sum, %linear
    }
    """
    graph = qcompiler.Graph.parse(text)
    graph.weights = {"w": torch.randn(16, 32)}
    before = str(graph)
    fast = qcompiler.compile(graph, example_inputs=(torch.randn(2, 32), torch.randn(2, 16)))
    x, y = torch.randn(3, 32), torch.randn(3, 16)
    got = fast(x, y)
    assert close(got[1], x @ graph.weights["w"].T) and torch.allclose(got[0], got[1] + y)
    assert str(graph) == before and list(graph.weights) == ["w"]
    with pytest.raises(InputError, match="class contradicts"):
        fast(x, y[:2])


def test_an_exported_program(mlp: Mlp) -> None:
    program = torch.export.export(mlp, (X,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=1)}})
    fast = qcompiler.compile(program)
    assert torch.equal(fast(X[:3]), qcompiler.compile(mlp, example_inputs=(X,))(X[:3]))


def test_inference_only(fast: CompiledModel) -> None:
    assert not fast(X.clone().requires_grad_()).requires_grad
    assert not any(tensor.requires_grad for tensor in fast.state_dict().values())
    assert fast.train() is fast and not fast.training and not nn.Sequential(fast).train()[0].training
    assert fast.eval() is fast


@pytest.mark.parametrize("lazy", [False, True])
def test_under_autocast_and_inference_mode(mlp: Mlp, lazy: bool) -> None:
    fast = qcompiler.compile(mlp) if lazy else qcompiler.compile(mlp, example_inputs=(X,))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        got = fast(X)
    assert got.dtype is torch.float32 and torch.equal(got, fast(X))
    assert not any(tensor.is_inference() for tensor in fast.buffers())


def test_state_dict_round_trips(fast: CompiledModel, mlp: Mlp) -> None:
    other = qcompiler.compile(Mlp().eval(), example_inputs=(X,))
    bias = other.graph.weights["up.bias"]
    assert not torch.equal(other(X), fast(X))
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(X), fast(X))
    assert not torch.equal(bias, other.graph.weights["up.bias"]), "the model that was compiled keeps its bias"
    assert torch.equal(qcompiler.interpret(other.graph, [X])[0], fast(X))


def test_copies(fast: CompiledModel) -> None:
    twin = copy.deepcopy(fast)
    assert torch.equal(twin(X), fast(X)) and twin.report is fast.report
    mine = {tensor.data_ptr() for tensor in fast.buffers()}
    assert not mine & {tensor.data_ptr() for tensor in twin.buffers()}
    assert torch.equal(copy.copy(fast)(X), fast(X))
    lazy = copy.deepcopy(qcompiler.compile(Mlp().eval()))
    assert lazy(X).shape == (5, 64)


def test_calls_from_threads(mlp: Mlp) -> None:
    fast = qcompiler.compile(mlp)
    got: list[Tensor] = []
    threads = [threading.Thread(target=lambda: got.append(fast(X))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 3 and all(torch.equal(one, fast(X)) for one in got)


def test_a_model_becomes_compiled_in_place() -> None:
    model = Mlp().eval()
    lazy = qcompiler.compile(model)
    twin, handle = copy.deepcopy(lazy), copy.copy(lazy)
    assert lazy.origin is model and handle.origin is model and isinstance(twin.origin, Mlp) and twin.origin is not model
    with pytest.raises(CaptureError, match="the model is not captured yet"):
        _ = lazy.program
    lazy(X)
    assert lazy.program.graph is lazy.graph and lazy.origin is model
    assert torch.equal(handle(X), lazy(X)) and handle.graph is not lazy.graph
    assert torch.equal(twin(X), lazy(X)) and twin.origin is None  # its copy of the model is gone


def test_moving_away_and_back(fast: CompiledModel) -> None:
    twin = copy.deepcopy(fast)
    twin.to("cpu")
    assert torch.equal(twin(X), fast(X))
    twin.to("meta")
    assert twin.graph.weights["up.weight_q"].is_meta, "no tensor is held where it was"
    with pytest.raises(
        InputError, match=r"moved off the device that it was compiled for: got meta; need cpu\. Move it back"
    ):
        twin(X)


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_element_types_are_fixed(fast: CompiledModel, change: Callable[[nn.Module], nn.Module]) -> None:
    twin = copy.deepcopy(fast)
    with pytest.raises(
        QCompilerError,
        match=r"the dtypes of a compiled model are fixed: got up_bias as torch\.\w+; need torch\.float32",
    ):
        change(nn.Sequential(twin))
    assert torch.equal(twin(X), fast(X))


def test_pickling_is_refused(fast: CompiledModel) -> None:
    with pytest.raises(QCompilerError, match=r"a compiled model cannot be pickled\. Save it: compiled\.save\(folder\)"):
        pickle.dumps(fast)


def test_instruments_see_real_inputs(mlp: Mlp) -> None:
    seen: list[Any] = []

    class Watch(qcompiler.instruments.Instrument):
        def begin(self, graph: qcompiler.Graph, inputs: Any) -> None:
            seen.extend(inputs)

    qcompiler.compile(mlp, instruments=[Watch()])(X)
    qcompiler.compile(mlp, instruments=(Watch(), qcompiler.instruments.Validate()), example_inputs=(X,))
    assert len(seen) == 2 and all(torch.equal(x, X) for x in seen)
