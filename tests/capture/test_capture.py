"""Capture: supported models and calls of every kind, and the error message for each unsupported one."""

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import SiluMlp
from torch import Tensor, nn
from torch.nn import functional

from qcompiler.capture import capture
from qcompiler.errors import CaptureError, CaptureWarning, InputError
from qcompiler.ir import Graph
from qcompiler.ir.ranges import Range
from qcompiler.testing import Function, verified


def names(graph: Graph) -> list[str]:
    return [op.name for op in graph.ops()]


# The captured graph


def test_an_mlp_becomes_three_operations_with_locations() -> None:
    model = SiluMlp()
    captured = capture(model, (torch.randn(3, 5, 8),))
    graph = verified(captured.graph)
    assert names(graph)[4:] == ["aten.linear", "aten.silu", "aten.linear"]
    assert graph.name == "SiluMlp" and [str(v.type) for v in graph.inputs] == ["f32[s0, s1, 8]"]
    first = graph.ops("aten.linear")[0]
    assert first.args == (graph["x"], graph["fc1.weight"], graph["fc1.bias"])
    assert first.loc.module == "fc1" and first.loc.file.endswith("models.py") and first.loc.line > 0
    x = torch.randn(1, 9, 8)
    assert torch.equal(captured.run(x), model(x))


def test_composites_that_passes_match_are_not_decomposed() -> None:
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
    assert len(captured.signature.conditions) <= 1  # required by group_norm; none about strides


def test_an_einsum_becomes_a_batched_matmul() -> None:
    captured = capture(
        Function(lambda a, b: torch.einsum("bsd,btd->bst", a, b)), (torch.randn(2, 3, 4), torch.randn(2, 5, 4))
    )
    assert "aten.bmm" in names(captured.graph) and "aten.einsum" not in names(captured.graph)


def test_operations_with_several_results_have_no_getitem() -> None:
    def function(x: torch.Tensor) -> Any:
        a, b = x.split(4, dim=-1)
        return torch.stack([*x.chunk(2, -1), a, b]), x.unbind(1)[0], torch.max(x, -1)

    with pytest.warns(CaptureWarning, match=r"dimension 1 of args\[0\] is fixed to 2\."):  # unbind returns two results
        captured = capture(Function(function), (torch.randn(3, 2, 8),))
    graph = verified(captured.graph)
    assert "core.getitem" not in names(graph)
    assert [str(v) for v in graph.ops("aten.split.Tensor")[0].results] == ["%split.0", "%split.1"]
    x = torch.randn(5, 2, 8)
    assert all(torch.equal(a, b) for a, b in zip(captured.run(x)[2], torch.max(x, -1), strict=True))


def test_sizes_are_values() -> None:
    def function(x: torch.Tensor) -> Any:
        n = x.shape[0]
        return torch.arange(n * 2 + 1), x.new_zeros((n // 2, n)), n * 3, x.reshape(-1)

    captured = capture(Function(function), (torch.randn(6, 4),))
    graph = verified(captured.graph)
    outputs = [str(v.type) for v in graph.outputs]  # type: ignore[union-attr]
    assert outputs == ["i64[2*s0 + 1]", "f32[floordiv(s0, 2), s0]", "int(3*s0)", "f32[s0*s1]"]
    got = captured.run(torch.randn(9, 4))
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
    graph = verified(captured.graph)
    assert str(graph.ops("aten.linear")[0].result.type) == "bf16[s0, 8]"
    assert all(name.startswith(("aten.", "core.")) for name in names(graph))
    x = torch.randn(5, 8)
    assert torch.equal(captured.run(x), model(x))


def test_in_place_operators_become_functional() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y[:, 0] = 0
        y.add_(x).relu_()
        return y

    captured = capture(Function(function), (torch.randn(3, 4),))
    assert not any(name.split(".")[1].endswith("_") for name in names(captured.graph))
    assert "core.update" not in names(captured.graph)


def test_a_mask_may_be_computed_by_vmap() -> None:
    """As in transformers, for masks that look at two positions."""

    def forward(x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        rows = torch.vmap(lambda i, j: (j <= i) & (i - j < 8), in_dims=(None, 0))
        allowed = torch.vmap(rows, in_dims=(0, None))(places, places)
        result: Tensor = allowed.to(x.dtype).add_(1.0) @ x
        return result

    captured = capture(Function(forward), (torch.randn(2, 12, 4),))
    for length in (5, 12, 20):
        x = torch.randn(2, length, 4)
        torch.testing.assert_close(captured.run(x), forward(x))


def test_unused_inputs_stay_and_unused_weights_go() -> None:
    model = SiluMlp()
    model.register_buffer("unused", torch.zeros(3))
    captured = capture(model, (torch.randn(3, 8),))
    assert "unused" not in captured.graph.weights
    both = capture(Function(lambda x, y: x + 1), (torch.randn(3), torch.randn(4)))
    assert len(both.graph.inputs) == 2
    assert torch.equal(both.run(torch.ones(2), torch.ones(7)), torch.full((2,), 2.0))


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
    verified(captured.graph)
    args, kwargs = call(6)
    got, want = captured.run(*args, **kwargs), model(*args, **kwargs)
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
        assert torch.equal(captured.run(*args), model(*args))


def test_an_example_may_be_a_view_into_a_larger_tensor() -> None:
    model, whole = SiluMlp(), torch.randn(4, 5, 16)
    captured = capture(model, (whole[:, 1:, :8],))
    assert torch.equal(captured.run(whole[:2, :, 8:]), model(whole[:2, :, 8:]))


def test_a_size_of_1_that_the_model_requires_stays_1() -> None:
    captured = capture(Function(lambda x, bias: x + bias.expand(x.shape[0], 4)), (torch.randn(3, 4), torch.randn(1, 4)))
    assert [str(v.type) for v in captured.graph.inputs] == ["f32[s0, 4]", "f32[1, 4]"]


def test_the_smallest_size_is_found_by_trying() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * (2 if x.shape[0] == 1 else 3) + y.sum()

    with pytest.warns(CaptureWarning, match=r"fixes sizes: dimension 0 of args\[0\] is at least 2\."):
        captured = capture(Function(function), (torch.randn(4, 3), torch.randn(5)))
    assert captured.graph.symbols == {"s0": Range(2), "s1": Range(0), "s2": Range(0)}
    assert captured.signature.symbols == captured.graph.symbols


def test_a_batch_of_1_needs_all_its_symbols_at_1() -> None:
    def function(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask[torch.arange(x.shape[0])]  # the mask's batch is a different symbol, but must not be smaller

    model = Function(function)
    captured = capture(model, (torch.randn(3, 4), torch.randn(3, 4)))
    assert [str(v.type) for v in captured.graph.inputs] == ["f32[s0, s1]", "f32[s2, s1]"]
    x, mask = torch.randn(1, 4), torch.randn(1, 4)
    assert torch.equal(captured.run(x, mask), model(x, mask))


def test_fixed_shapes_and_a_custom_specification() -> None:
    fixed = capture(SiluMlp(), (torch.randn(3, 5, 8),), dynamic_shapes=None)
    assert str(fixed.graph.inputs[0].type) == "f32[3, 5, 8]" and fixed.graph.symbols == {}
    rows = torch.export.Dim("rows", min=2, max=64)
    own = capture(SiluMlp(), (torch.randn(3, 5, 8),), dynamic_shapes={"x": {0: rows}})
    assert str(own.graph.inputs[0].type) == "f32[s0, 5, 8]" and own.graph.symbols["s0"].high == 64


class Open(nn.Module):
    """Takes keyword arguments that its forward does not name."""

    def forward(self, *terms: torch.Tensor, **rest: Any) -> Any:
        total = sum(terms, rest["bias"])
        return total * 2 if rest["twice"] else total


def test_arguments_that_forward_does_not_name() -> None:
    def call(n: int) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        return (torch.randn(n, 4), torch.randn(n, 4)), {"bias": torch.randn(n, 1), "twice": True}

    model = Open().eval()
    state = dict(vars(model))
    captured = capture(model, *call(3))
    assert vars(model) == state and [v.name for v in captured.graph.inputs] == ["terms_0", "terms_1", "bias"]
    args, kwargs = call(1)
    assert torch.equal(captured.run(*args, **kwargs), model(*args, **kwargs))


def test_sizes_that_must_fit_a_weight_are_numbers() -> None:
    """Only some heights and widths fit the classifier's columns; the example is one such pair."""
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 5)).eval()
    captured = capture(model, (torch.randn(2, 3, 8, 8),))
    assert str(captured.graph.inputs[0].type) == "f32[s0, 3, 8, 8]" and set(captured.graph.symbols) == {"s0"}
    assert str(captured.graph.ops("aten.linear")[0]["input"].type) == "f32[s0, 72]"
    verified(captured.graph)
    with pytest.raises(InputError, match=r"dimension 2 of input .*got 9; need 8. Capture the model again"):
        captured.run(torch.randn(2, 3, 9, 8))


def test_recurrent_layers_warn_only_about_their_sequence() -> None:
    model = nn.GRU(4, 6, batch_first=True).eval()
    with pytest.warns(CaptureWarning) as caught:
        captured = capture(model, (torch.randn(2, 3, 4),))
    assert [str(w.message).split(". ")[0] for w in caught] == [
        "capture fixes sizes: dimension 1 of input is fixed to 3"
    ]
    assert captured.fixed == ("dimension 1 of input is fixed to 3",)
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(captured.run(x)[0], model(x)[0])


# Other inputs and modes of capture


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program_works_like_a_model(decomposed: bool) -> None:
    model = SiluMlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch.export
        program = torch.export.export(model, (torch.randn(3, 8),), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}})
        program = program.run_decompositions() if decomposed else program
    captured = capture(program)
    verified(captured.graph)
    assert captured.graph.weights["fc1.weight"].data_ptr() == model.fc1.weight.data_ptr()
    x = torch.randn(5, 8)
    torch.testing.assert_close(captured.run(x), model(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(captured.run(x=x), captured.run(x))


def test_strict_mode_is_tried_when_plain_tracing_fails() -> None:
    model = Function(lambda x: torch.from_numpy(x.numpy() * 2) + x)  # only dynamo supports numpy
    captured = capture(model, (torch.randn(3, 4),))
    assert torch.equal(captured.run(torch.ones(5, 4)), torch.full((5, 4), 3.0))


def test_a_graph_that_differs_from_the_model_is_refused() -> None:
    class Growing(nn.Module):
        """Keeps state outside of buffers, so repeated calls differ."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.eval()

        def forward(self, x: torch.Tensor) -> Any:
            self.calls += 1
            return x * self.calls

    with pytest.raises(
        CaptureError, match=r"the output differs, in FP64 as well: got a largest difference of .*x\[2, 3\]"
    ):
        capture(Growing(), (torch.randn(3, 4),))
    capture(Growing(), (torch.randn(3, 4),), check=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_torchs_transformer_takes_any_mask(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 1, 1, 24, batch_first=True).eval()

    def call(rows: int, source: int, target: int, causal: bool) -> dict[str, torch.Tensor]:
        mask = torch.ones(target, target).triu(1).bool() if causal else torch.rand(target, target) > 0.9
        mask.fill_diagonal_(False)
        given = mask if dtype == torch.bool else torch.zeros(target, target).masked_fill(mask, -torch.inf)
        return {"src": torch.randn(rows, source, 16), "tgt": torch.randn(rows, target, 16), "tgt_mask": given}

    captured = capture(model, kwargs=call(2, 7, 5, True))
    for sizes in ((2, 7, 5, True), (3, 4, 6, True), (2, 7, 5, False), (1, 3, 8, False)):
        inputs = call(*sizes)
        with torch.no_grad():
            torch.testing.assert_close(captured.run(**inputs), model(**inputs))


class Converts(nn.Module):
    """Converts a layer in forward to the dtype that it already has, like the router of Switch Transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.linear = self.linear.to(x.dtype)
        y: Tensor = self.linear(x)
        return y


def test_a_conversion_that_changes_nothing_is_traced() -> None:
    model, x, before = Converts().eval(), torch.randn(3, 8), nn.Module.to
    assert torch.equal(capture(model, (x,)).run(x), model(x))
    assert nn.Module.to is before and model.linear.weight.dtype is torch.float32
