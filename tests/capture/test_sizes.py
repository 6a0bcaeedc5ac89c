"""Sizes that capture leaves dynamic: sums of other sizes, 0 and 1; and warnings about sizes that it fixes."""

from typing import Any

import pytest
import torch
from sympy import Integer
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional

import qcompiler
from qcompiler import knobs
from qcompiler.capture import capture
from qcompiler.capture.deadline import OutOfTime, time_limit
from qcompiler.capture.open_sizes import _with_sums
from qcompiler.capture.signature import Condition
from qcompiler.errors import CaptureWarning, InputError
from qcompiler.ir.ranges import Range
from qcompiler.ir.sizes import parse_size
from qcompiler.testing import Function, verified


def types(captured: Any) -> list[str]:
    return [str(value.type) for value in captured.graph.inputs]


class Step(nn.Module):
    """Attention over past and new tokens, with a mask over both, as generate() calls a decoder."""

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = torch.cat([keys, x], 2), torch.cat([values, x], 2)
        if mask.shape[1] < keys.shape[2]:
            mask = functional.pad(mask, (0, keys.shape[2] - mask.shape[1]))
        if mask.shape[1] > keys.shape[2]:
            mask = mask[:, : keys.shape[2]]
        y = functional.scaled_dot_product_attention(x, keys, values, mask.bool()[:, None, None])
        return y, keys, values


def step(batch: int, past: int, new: int) -> tuple[Tensor, ...]:
    ones = torch.ones(batch, past + new, dtype=torch.int64)
    return torch.randn(batch, 2, new, 8), torch.randn(batch, 2, past, 8), torch.randn(batch, 2, past, 8), ones


@pytest.mark.parametrize("example", [(2, 5, 3), (1, 6, 4)])
def test_a_mask_over_past_and_new_tokens_leaves_all_sizes_dynamic(example: tuple[int, int, int]) -> None:
    model = Step().eval()
    captured = capture(model, step(*example))
    verified(captured.graph)
    assert types(captured)[:2] == ["f32[s0, s1, s2, s3]", "f32[s0, s1, s4, s3]"]
    assert types(captured)[3].endswith(", s2 + s4]")
    assert captured.signature.conditions == () and captured.signature.symbols == captured.graph.symbols
    assert all(bounds.high is None for bounds in captured.graph.symbols.values())
    for sizes in ((1, 9, 1), (3, 4, 6), (1, 0, 2)):
        call = step(*sizes)
        assert all(torch.equal(a, b) for a, b in zip(captured.run(*call), model(*call), strict=True))
    x, keys, values, mask = step(1, 4, 2)
    with pytest.raises(InputError, match=r"dimension 1 of mask contradicts the other inputs: got 5; need s2 \+ s4 = 6"):
        captured.run(x, keys, values, mask[:, :5])


def test_sums_required_only_by_the_model_are_tried() -> None:
    def function(new: Tensor, past: Tensor, mask: Tensor) -> Tensor:
        rows = torch.cat([past, new]).sum(1)
        return rows[torch.arange(mask.shape[0])].sum() + mask[torch.arange(rows.shape[0])].sum()

    def call(past: int, new: int) -> tuple[Tensor, ...]:
        return torch.randn(new, 4), torch.randn(past, 4), torch.ones(past + new)

    captured = capture(Function(function), call(7, 4))
    assert types(captured) == ["f32[s0, s1]", "f32[s2, s1]", "f32[s3]"]
    new, past, mask = call(9, 1)
    assert torch.equal(captured.run(new, past, mask), function(new, past, mask))


def test_a_mask_grows_with_a_single_new_token() -> None:
    """An example with one token is traced with two; the mask must then be longer by one, too."""

    def function(ids: Tensor, past: Tensor, mask: Tensor) -> Tensor:
        x = torch.cat([past, ids[..., None].float().expand(-1, -1, past.shape[2])], 1)
        return (x * mask[..., None]).cumsum(1)[:, -ids.shape[1] :]

    def call(batch: int, past: int, new: int) -> tuple[Tensor, ...]:
        return torch.randint(9, (batch, new)), torch.randn(batch, past, 4), torch.ones(batch, past + new)

    captured = capture(Function(function), call(1, 5, 1))
    assert types(captured) == ["i64[s0, s1]", "f32[s0, s2, s3]", "f32[s0, s1 + s2]"]
    inputs = call(3, 8, 4)
    assert torch.equal(captured.run(*inputs), function(*inputs))


def test_cross_attention_is_captured_although_a_condition_has_no_value_at_size_0() -> None:
    model = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    query, key = torch.randn(3, 5, 64), torch.randn(3, 7, 64)
    captured = capture(model, (query, key, key))
    assert types(captured)[:2] == ["f32[s0, s1, 64]", "f32[s2, s3, 64]"]
    query, key = torch.randn(1, 9, 64), torch.randn(1, 2, 64)
    torch.testing.assert_close(captured.run(query, key, key)[0], model(query, key, key)[0], rtol=1e-6, atol=1e-6)


def test_a_condition_that_divides_by_a_size_says_nothing_at_size_0() -> None:
    condition = Condition("==", parse_size("mod(s0, s1)"), 0)
    assert condition.holds({"s0": 6, "s1": 3}) and not condition.holds({"s0": 7, "s1": 3})
    assert condition.holds({"s0": 7, "s1": 0})


def test_a_bound_of_a_size_that_becomes_a_sum_is_kept() -> None:
    class Bounded(nn.Module):
        def forward(self, past: Tensor, new: Tensor, mask: Tensor) -> Tensor:
            total = past.shape[0] + new.shape[0]
            if mask.shape[0] > total or mask.shape[0] < total or mask.shape[0] > 20:
                return mask.new_zeros(3)
            return torch.cat([past, new]) * mask[torch.arange(past.shape[0] + new.shape[0])]

    model = Bounded().eval()
    captured = capture(model, (torch.randn(4), torch.randn(3), torch.randn(7)))
    assert types(captured) == ["f32[s0]", "f32[s1]", "f32[s0 + s1]"]
    assert captured.graph.symbols == {"s0": Range(0), "s1": Range(0)}
    assert torch.equal(captured.run(torch.ones(1), torch.ones(1), torch.ones(2)), torch.ones(2))
    with pytest.raises(
        InputError, match=r"a different branch for these sizes: got s0 = 20, s1 = 9; need s0 \+ s1 <= 20"
    ):
        captured.run(torch.ones(20), torch.ones(9), torch.ones(29))


# Messages about fixed sizes


def loop(x: Tensor) -> Tensor:
    total = x[:, 0]
    for index in range(1, x.shape[1]):
        total = total + x[:, index]
    return total


def test_a_loop_over_a_size_is_reported_with_its_line() -> None:
    line = loop.__code__.co_firstlineno + 2
    sentence = rf"dimension 1 of args\[0\] is fixed to 5 \(.*test_sizes.py:{line}\)\. Capture"
    with pytest.warns(CaptureWarning, match=sentence) as caught:
        captured = capture(Function(loop), (torch.randn(3, 5),))
    assert types(captured) == ["f32[s0, 5]"] and len(captured.fixed) == 1
    assert caught[0].filename == __file__
    assert capture(Function(loop), (torch.randn(3, 5),), dynamic_shapes=None).fixed == ()  # fixed on request


def test_an_example_traced_with_a_larger_size_is_still_accepted() -> None:
    """Torch fixes the sequence to the traced 2, so capture must trace the example's own size of 1 instead."""
    with pytest.warns(CaptureWarning, match="is fixed to 1"):
        captured = capture(Function(loop), (torch.randn(3, 1),))
    assert torch.equal(captured.run(torch.ones(4, 1)), torch.ones(4))


def test_sizes_required_by_weights_are_not_reported() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 5)).eval()
    assert capture(model, (torch.randn(2, 3, 8, 8),)).fixed == ()


def test_fewer_sizes_are_dynamic_when_time_runs_out() -> None:
    """With no time, nothing can be proven about a dynamic size; fixed sizes need no proof."""
    model = nn.Conv2d(3, 4, 3).eval()
    sentence = r"all sizes are fixed to the example's, because torch.export took more than 1e-06 s of CPU time"
    with knobs.scope(capture_seconds=1e-6), pytest.warns(CaptureWarning, match=sentence):
        captured = capture(model, (torch.randn(2, 3, 8, 8),))
    assert types(captured) == ["f32[2, 3, 8, 8]"]
    assert types(capture(model, (torch.randn(2, 3, 8, 8),))) == ["f32[s0, 3, s1, s2]"]  # torch is unchanged


def test_a_time_limit_leaves_no_state_behind() -> None:
    before = dict(vars(ShapeEnv))
    with pytest.raises(OutOfTime), time_limit(1e-6):
        ShapeEnv().simplify(Integer(1))
    assert dict(vars(ShapeEnv)) == before
    with time_limit(None):
        assert dict(vars(ShapeEnv)) == before


def test_sizes_are_fixed_if_torch_cannot_keep_them_dynamic() -> None:
    def function(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()  # makes strict mode fail
        if not isinstance(x.shape[0], int):
            raise TypeError("the number of rows must be an int")
        return x * 2

    with pytest.warns(CaptureWarning, match=r"all sizes are fixed .*fails with dynamic sizes \(TypeError: the"):
        captured = capture(Function(function), (torch.randn(3, 4),))
    assert types(captured) == ["f32[3, 4]"]


def test_an_example_is_not_marked_for_later_exports() -> None:
    x = torch.randn(3, 4)
    state = dict(vars(x))
    capture(Function(lambda x: x * 2), (x,))
    assert vars(x) == state


def test_a_warning_that_is_an_error_stays_a_warning() -> None:
    """Warnings are errors in these tests; `compile` does not report that as an unexpected failure."""
    with pytest.raises(CaptureWarning, match="dimension 1 of args"):
        qcompiler.compile(Function(loop), example_inputs=(torch.randn(3, 5),))


def test_sums_are_found_in_a_cache_of_many_layers() -> None:
    layers = [f"s{index}" for index in range(400)]
    sizes = {**dict.fromkeys(layers, 5), "new": 3, "mask": 8}
    alone, summed = _with_sums(tuple(layers), sizes)  # trying every triple of sizes would take half a minute
    assert alone.sums == () and summed.sums == (("mask", ("s0", "new")),)
