"""The scales of SmoothQuant against a second implementation of the paper's definition; search, learning, errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.quantizing.quantize import Quantize
from passes.quantizing.scheme_options import SchemeOptions
from passes.smoothing.smooth_scales import (
    ALPHAS,
    BOUNDS,
    SmoothedLinear,
    by_formula,
    by_learning,
    by_search,
    largest,
    output_error,
    to_powers_of_two,
)
from qcompiler.errors import PassError
from qcompiler.ir.formats import FP8_BLOCK, FP8_TILE, INT8_ROW, INT8_TENSOR

TENSOR = Quantize(INT8_TENSOR, INT8_TENSOR)
TOKEN = Quantize(INT8_ROW, INT8_ROW)
TILE = Quantize(FP8_TILE, FP8_BLOCK)


def paper(x: np.ndarray, weights: list[np.ndarray], alpha: float) -> list[float]:
    """Equation 4 per channel: max|X_j|^alpha / max|W_j|^(1 - alpha), over all weights that use X."""
    scales = []
    for channel in range(x.shape[1]):
        top = max(abs(float(number)) for number in x[:, channel])
        weight = max(abs(float(row[channel])) for matrix in weights for row in matrix)
        scales.append(1.0 if top == 0 or weight == 0 else top**alpha / weight ** (1 - alpha))
    return scales


def linear(rows: Tensor, weight: Tensor, labels: Tensor | None = None) -> SmoothedLinear:
    return SmoothedLinear(weight, torch.arange(weight.shape[1]) if labels is None else labels, rows, rows.abs().amax(0))


def outliers(rows: int = 64, channels: int = 128, factor: float = 50.0) -> Tensor:
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(1))
    x[:, [3, channels // 2 + 1]] *= factor
    return x


def weights(n: int = 96, k: int = 128, seed: int = 2) -> Tensor:
    w: Tensor = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5
    return w


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.85, 1.0])
def test_the_formula_matches_the_paper(alpha: float) -> None:
    x, first, second = outliers(17, 40), weights(5, 40), weights(9, 40, seed=3)
    x[:, 11] = 0
    first[:, 12] = second[:, 12] = 0
    every = torch.arange(40)
    x_max = largest([x.abs().amax(0)], [every], every)
    w_max = largest([w.abs().amax(0) for w in (first, second)], [every, every], every)
    got = by_formula(x_max, w_max, alpha)
    want = torch.tensor(paper(x.numpy(), [first.numpy(), second.numpy()], alpha))
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert got[11] == got[12] == 1


magnitudes = st.lists(
    st.sampled_from([0.0, 1e-45, 1e-38, 1e-20, 1e-4, 1.0, 7.5, 1e4, 1e20, 3.4e38]), min_size=6, max_size=6
)


@given(x=magnitudes, w=magnitudes, alpha=st.floats(0, 1))
def test_scales_are_finite_and_bounded_for_any_statistics(x: list[float], w: list[float], alpha: float) -> None:
    scale = by_formula(torch.tensor(x), torch.tensor(w), alpha)
    assert scale.isfinite().all()
    assert (scale >= BOUNDS[0] * (1 - 1e-6)).all() and (scale <= BOUNDS[1]).all()
    for channel, (top, weight) in enumerate(zip(torch.tensor(x), torch.tensor(w), strict=True)):
        if top == 0 or weight == 0:
            assert scale[channel] == 1


@pytest.mark.parametrize("size", [2.0**-60, 2.0**-30, 2.0**30, 2.0**60])
def test_activation_magnitude_does_not_change_ratios_of_scales(size: float) -> None:
    x_max, w_max = outliers().abs().amax(0), weights().abs().amax(0)
    for alpha in (0.25, 0.5, 1.0):
        want, got = by_formula(x_max, w_max, alpha), by_formula(x_max * size, w_max, alpha)
        torch.testing.assert_close(got / got[0], want / want[0], rtol=1e-5, atol=0)
    assert torch.equal(by_formula(x_max, w_max, 0.5), x_max.pow(0.5) / w_max.pow(0.5))  # not normalized within bounds


@pytest.mark.parametrize("size", [2.0**-70, 2.0**-50, 2.0**50])
def test_activation_magnitude_does_not_change_the_error(size: float) -> None:
    x, w = outliers(), weights()
    for options in (TENSOR, TOKEN):
        for scale in (torch.ones(128), by_formula(x.abs().amax(0), w.abs().amax(0), 0.5)):
            want = output_error(scale, [linear(x, w)], options)
            assert output_error(scale, [linear(x * size, w)], options) == want > 0
    assert output_error(torch.ones(128), [linear(x * 0, w)], TENSOR) == 0


def test_tied_channels_share_their_largest_magnitude() -> None:
    values = [torch.tensor([1.0, 5.0, 2.0]), torch.tensor([9.0, 4.0])]
    labels = [torch.tensor([0, 1, 2]), torch.tensor([-1, 3])]  # the second user's first input is not scaled
    classes = torch.tensor([0, 1, 0, 1])
    assert largest(values, labels, classes).tolist() == [2.0, 5.0, 2.0, 5.0]


def test_powers_of_two_are_the_nearest_by_logarithm() -> None:
    scale = torch.tensor([1.0, 1.4, 1.42, 3.0, 0.3, 1e-4, 1e4])
    got = to_powers_of_two(scale)
    assert got.tolist() == [2.0 ** round(math.log2(float(each))) for each in scale]
    mantissa, _ = torch.frexp(got)
    assert (mantissa == 0.5).all()


def fake(x: Tensor, per_row: bool) -> Tensor:
    """INT8 computed by hand: one scale per row, or one for all."""
    scale = (x.abs().amax(1, keepdim=True) if per_row else x.abs().amax()) / 127
    return torch.round(x / scale).clamp(-127, 127) * scale


@pytest.mark.parametrize(("options", "per_row"), [(TENSOR, False), (TOKEN, True)])
def test_the_error_matches_the_scheme(options: SchemeOptions, per_row: bool) -> None:
    x, first, second = outliers(), weights(), weights(32, seed=5)
    scale = torch.rand(128, generator=torch.Generator().manual_seed(4)) + 0.5
    want = 0.0
    for w in (first, second):
        y = x @ w.T
        error = fake(x / scale, per_row) @ fake(w * scale, per_row).T - y
        want += float(error.square().sum() / y.square().sum())
    got = output_error(scale, [linear(x, first), linear(x, second)], options)
    assert got == pytest.approx(want, rel=1e-4)


def test_a_tensor_scale_covers_all_observed_values() -> None:
    x, w = outliers(), weights()
    scale = torch.full((128,), 2.0)
    seen = x.abs().amax(0) * 3  # the sample lacks the largest values
    step = (seen / 2).amax() / 127
    got = torch.round(x / 2 / step) * step @ fake(w * 2, per_row=False).T
    want = float((got - x @ w.T).square().sum() / (x @ w.T).square().sum())
    assert output_error(scale, [SmoothedLinear(w, torch.arange(128), x, seen)], TENSOR) == pytest.approx(want, rel=1e-4)
    assert output_error(scale, [SmoothedLinear(w, torch.arange(128), x, seen)], TOKEN) == output_error(
        scale, [linear(x, w)], TOKEN
    )


def test_labels_map_inputs_to_scales() -> None:
    x, w = outliers(8, 4), weights(3, 4)
    scale = torch.tensor([2.0, 4.0, 8.0])
    labels = torch.tensor([2, -1, 0, 0])
    each = torch.tensor([8.0, 1.0, 2.0, 2.0])
    want = output_error(each, [linear(x, w)], TENSOR)
    assert output_error(scale, [linear(x, w, labels)], TENSOR) == want


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("options", [TENSOR, TOKEN, TILE])
def test_the_search_finds_the_best_point_of_its_grid(options: SchemeOptions, pow2: bool) -> None:
    x, w = outliers(), weights()
    linears = [linear(x, w)]
    x_max, w_max = x.abs().amax(0), w.abs().amax(0)
    got = by_search(x_max, w_max, linears, options, pow2)
    grid = [by_formula(x_max, w_max, alpha) for alpha in ALPHAS]
    tried = [torch.ones(128), *(map(to_powers_of_two, grid) if pow2 else grid)]
    assert output_error(got, linears, options) == min(output_error(each, linears, options) for each in tried)
    if options is TENSOR:  # outliers 50 times larger than the rest ruin a tensor scale
        assert output_error(got, linears, options) < 0.2 * output_error(torch.ones(128), linears, options)


def test_the_search_prefers_no_smoothing_without_a_gain() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(3)).sign()  # all channels are equal
    got = by_search(x.abs().amax(0), torch.ones(128), [linear(x, torch.ones(4, 128))], TENSOR, False)
    assert torch.equal(got, torch.ones(128))


def test_learning_improves_on_its_start_and_keeps_ties() -> None:
    x, w = outliers(), weights()
    linears = [linear(x, w)]
    classes = torch.arange(128) // 2
    x_max, w_max = (largest([v.abs().amax(0)], [torch.arange(128)], classes) for v in (x, w))
    start = by_formula(x_max, w_max, 0.2)
    learned = by_learning(start, classes, linears, TENSOR)
    assert output_error(learned, linears, TENSOR) < 0.5 * output_error(start, linears, TENSOR)
    assert torch.equal(learned[0::2], learned[1::2])
    assert learned.isfinite().all() and (learned > 0).all() and not learned.requires_grad


def test_learning_never_returns_a_worse_result() -> None:
    x, w = torch.randn(32, 128, generator=torch.Generator().manual_seed(7)), weights()
    start = torch.ones(128)
    learned = by_learning(start, torch.arange(128), [linear(x, w)], TILE)
    assert output_error(learned, [linear(x, w)], TILE) <= output_error(start, [linear(x, w)], TILE) * (1 + 1e-5)


def test_parts_are_disjoint_and_one_row_is_used_for_both() -> None:
    whole = linear(torch.arange(10.0).reshape(5, 2), torch.ones(1, 2))
    assert whole.part(0).sample[:, 0].tolist() == [0, 4, 8]
    assert whole.part(1).sample[:, 0].tolist() == [2, 6]
    single = linear(torch.ones(1, 2), torch.ones(1, 2))
    assert torch.equal(single.part(1).sample, single.sample)


def test_without_a_sample_the_message_says_what_to_add() -> None:
    with pytest.raises(PassError, match=r"a sample of the activations is needed.* Put calibrate\{rows=256\} before it"):
        output_error(torch.ones(2), [SmoothedLinear(torch.ones(1, 2), torch.arange(2), None, torch.ones(2))], TENSOR)
