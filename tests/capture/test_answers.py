"""Questions that a model's Python code asks about data: answered from the example, checked in each call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qcompiler
from qcompiler.capture import answers, capture
from qcompiler.errors import CaptureError, CaptureWarning, InputError
from qcompiler.ir import Graph

LIKE_EXAMPLE = "these inputs lead the model's code to a different result than the example"


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return functional.linear(x, layer.weight, layer.bias)


class Branching(nn.Module):
    """Adds a term if the mask hides something, like Longformer and LED."""

    mode: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)
        self.register_buffer("mode", torch.tensor([1, 0]))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.mode[0]:  # does not depend on inputs
            x = x * 2
        if (mask == 0).any():
            x = x * mask[..., None]
        return linear(self.linear, x)


class Splitting(nn.Module):
    """Splits rows by sizes given in an input, like Qwen2-VL with its images."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        parts = [part if part.shape[0] > 1 else part * 2 for part in torch.split(x, sizes.tolist())]
        ends = torch.tensor([int(sizes.max()), sizes.min()])
        means = torch.cat([part.mean(0, keepdim=True) for part in parts])
        return linear(self.linear, means) * ends.sum()


class Selecting(nn.Module):
    """Selects rows with a mask: their number depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        (rows,) = torch.nonzero(mask, as_tuple=True)
        assert rows.shape[0] > 1
        return linear(self.linear, x[rows])


def example(model: nn.Module) -> tuple[Tensor, ...]:
    rows = torch.randn(6, 64)
    if isinstance(model, Splitting):
        return rows, torch.tensor([1, 2, 3])
    return rows, torch.tensor([1, 0, 1, 1, 0, 1])


def warned(model: nn.Module, *inputs: Tensor) -> Any:
    with pytest.warns(CaptureWarning, match="capture fixes sizes and values: all sizes are fixed"):
        return capture(model.eval(), inputs)


@pytest.mark.parametrize("kind", [Branching, Splitting, Selecting])
def test_other_values_with_the_same_answers_match_the_model(kind: Callable[[], nn.Module]) -> None:
    model = kind()
    x, data = example(model)
    captured = warned(model, x, data)
    others = [data] if isinstance(model, Splitting) else [data, data.flip(0)]
    for other in others:
        x = torch.randn(6, 64)
        assert torch.equal(captured.run(x, other), model(x, other))


@pytest.mark.parametrize(
    ("kind", "other", "said"),
    [
        (Branching, [1, 1, 1, 1, 1, 1], r"if \(mask == 0\).any\(\): \(.*test_answers.py:\d+\) is True"),
        (Splitting, [2, 2, 2], r"parts = .*sizes.tolist\(\)\)\] \(.*test_answers.py:\d+\) is 1"),
        (Selecting, [1, 1, 1, 1, 0, 1], r"a size that depends on tensor values differs"),
    ],
)
def test_other_answers_are_an_error(kind: Callable[[], nn.Module], other: list[int], said: str) -> None:
    model = kind()
    x, data = example(model)
    with pytest.warns(CaptureWarning):
        compiled = qcompiler.compile(model.eval(), scheme="fp8_tile", target="cpu", example_inputs=(x, data))
    assert compiled(x, data).shape == model(x, data).shape
    with pytest.raises(InputError, match=rf"{LIKE_EXAMPLE}: at capture, {said}.*Compile the model again"):
        compiled(x, torch.tensor(other))


def test_only_answers_that_an_input_can_change_are_checked() -> None:
    model = Branching()
    captured = warned(model, *example(model))
    messages = [str(op.attrs["message"]) for op in captured.graph.ops("core.expect")]
    assert len(messages) == 1
    assert "(mask == 0).any()" in messages[0]
    assert captured.notes == captured.fixed
    assert "reads are fixed to the example's (" in captured.fixed[-1]


def test_the_checks_survive_passes_text_and_artefacts(tmp_path: Path) -> None:
    model = Branching().eval()
    x, mask = example(model)
    with pytest.warns(CaptureWarning):
        compiled = qcompiler.compile(model, scheme="fp8_tile", target="cpu", example_inputs=(x, mask))
    last = compiled.graph
    assert len(last.ops("core.expect")) == 1
    assert str(Graph.parse(str(last))) == str(last)
    compiled.save(tmp_path / "artefact")
    loaded = qcompiler.load(tmp_path / "artefact")
    assert torch.equal(loaded(x, mask), compiled(x, mask))
    with pytest.raises(InputError, match=LIKE_EXAMPLE):
        loaded(x, torch.ones_like(mask))


def test_fixed_sizes_may_be_used_with_answers() -> None:
    model = Branching().eval()
    with pytest.warns(CaptureWarning, match="sizes and values"):
        captured = capture(model, example(model), dynamic_shapes=None)
    assert len(captured.graph.ops("core.expect")) == 1


class Routed(nn.Module):
    """Branches on computed values: on an activation, or on a parameter and an integer input."""

    def __init__(self, on_weights: bool) -> None:
        super().__init__()
        self.linear, self.on_weights = nn.Linear(64, 4), on_weights

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        scores = self.linear.weight[0, rows] if self.on_weights else x
        return linear(self.linear, x if scores.sum() > 0 else -x)


@pytest.mark.parametrize("on_weights", [True, False])
def test_a_branch_on_activations_is_refused(on_weights: bool) -> None:
    with pytest.raises(CaptureError, match=r"(?s)depends on tensor values.*if scores.sum\(\) > 0"):
        capture(Routed(on_weights).eval(), (torch.randn(3, 64), torch.tensor([0, 5])))


def test_a_model_that_reads_each_element_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MOST_ANSWERS", 2)
    with pytest.raises(CaptureError, match="depends on tensor values"):
        capture(Splitting().eval(), example(Splitting()))


class Counting(nn.Module):
    """Takes another branch from its third call on: the answer follows from state, not from an input."""

    step: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)
        self.register_buffer("step", torch.zeros((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        late = bool(self.step > 1)
        self.step += 1
        return linear(self.linear, -x if late else x)


def test_an_answer_that_depends_on_a_buffer_is_checked_in_each_call() -> None:
    model, x = Counting(torch.int64).eval(), torch.randn(3, 64)
    with pytest.warns(CaptureWarning, match="sizes and values"):
        compiled = qcompiler.compile(model, scheme="fp8_tile", target="cpu", example_inputs=(x,))
    first, second = compiled(x), compiled(x)
    assert torch.equal(first, second)
    with pytest.raises(InputError, match=LIKE_EXAMPLE):
        compiled(x)


class Tossing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.linear, x if torch.rand(()) < 2 else -x)


@pytest.mark.parametrize("model", [Counting(torch.float32), Tossing()], ids=["a float buffer", "a random number"])
def test_a_branch_on_a_float_buffer_or_a_random_number_is_refused(model: nn.Module) -> None:
    with pytest.raises(CaptureError, match="depends on tensor values"):
        capture(model.eval(), (torch.randn(3, 64),))
