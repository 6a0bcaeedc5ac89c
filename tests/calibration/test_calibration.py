"""Statistics of values: streamed, merged and one-shot are the same, and each is what torch computes of all the data."""

import math
from itertools import pairwise, permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler import numerics
from qcompiler.calibration import OBSERVERS, Statistics
from qcompiler.calibration.histogram import CHANNEL_BITS, RATIOS, TENSOR_BITS, bin_count, bin_of, edges, low_for
from qcompiler.calibration.sample import row_keys
from qcompiler.errors import QCompilerError
from qcompiler.ir import DType, Format

FULL: dict[str, Any] = {"histogram": True, "rows": 16}

# What a clip that was found in a histogram may cost. Where steps grow with the magnitude, as in FP8, a few of the
# largest elements decide, and bins do not say where in a step they lie.
FORMATS = {torch.int8: 1.05, torch.float8_e4m3fn: 1.15, torch.float8_e5m2: 1.25}


def batches(seed: int, *sizes: int, channels: int = 5) -> list[Tensor]:
    """Batches of so many rows, with channels of very different magnitude, and some zeros."""
    rng = torch.Generator().manual_seed(seed)
    spread = torch.tensor(10.0) ** torch.linspace(-6, 3, channels)
    made = [torch.randn(size, channels, generator=rng) * spread for size in sizes]
    return [batch * (torch.rand(batch.shape, generator=rng) > 0.1) for batch in made]


def seen(data: list[Tensor], **options: Any) -> Statistics:
    statistics = Statistics.empty(data[0].shape[-1], **options)
    for batch in data:
        statistics.update(batch)
    return statistics


def tensors(statistics: Statistics, *, average: bool = True) -> dict[str, Tensor]:
    """All stored statistics; those that depend on the order of batches only if `average`."""
    found = {key: value for key, value in vars(statistics).items() if isinstance(value, Tensor)}
    if statistics.histogram is not None:
        found |= {"fine": statistics.histogram.tensor, "coarse": statistics.histogram.channel}
    if statistics.sample is not None:
        found |= {"sample": statistics.sample.rows, "keys": statistics.sample.keys}
    return found if average else {key: found[key] for key in found.keys() - {"average", "first"}}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key in want:
        assert torch.equal(got[key], want[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ranges_are_those_of_all_the_data(dtype: torch.dtype) -> None:
    data = [batch.to(dtype) for batch in batches(0, 7, 0, 1, 300)]
    got = seen([data[0].reshape(7, 1, 5), *data[1:]], **FULL)
    whole = torch.cat(data).float()
    assert (got.rows, got.batches, got.filled, got.channels) == (308, 4, 3, 5)
    assert torch.equal(got.absmax, whole.abs().amax(0))
    assert torch.equal(got.minimum, whole.amin(0)) and torch.equal(got.maximum, whole.amax(0))
    assert {value.dtype for value in (got.absmax, got.minimum, got.maximum, got.average)} == {torch.float32}
    average = None
    for batch in (data[0], data[1], data[2], data[3]):
        if len(batch):
            new = batch.double().abs().amax(0)
            average = new if average is None else 0.9 * average + 0.1 * new
    assert average is not None
    torch.testing.assert_close(got.average.double(), average, rtol=1e-6, atol=0)
    for per, want in (("channel", got.average), ("tensor", got.average.max())):
        assert torch.equal(got.amax("moving_average", per), want)
        assert torch.equal(got.amax("absmax", per), got.amax("minmax", per))
    assert torch.equal(got.amax("absmax", "tensor"), whole.abs().max())
    assert torch.equal(got.amax("minmax", "channel"), whole.abs().amax(0))


@given(cuts=st.lists(st.integers(0, 60), max_size=6), order=st.randoms(use_true_random=False), seed=st.integers(0, 9))
@settings(max_examples=40)
def test_splits_and_order_do_not_count(cuts: list[int], order: Any, seed: int) -> None:
    (whole,) = batches(seed, 60)
    bounds = [0, *sorted(cuts), 60]
    parts = [whole[first:last] for first, last in pairwise(bounds)]
    order.shuffle(parts)
    got, want = seen(parts, **FULL), seen([whole], **FULL)
    assert_equal(tensors(got, average=False), tensors(want, average=False))
    assert (got.rows, got.batches) == (60, len(parts))


@given(cut=st.integers(0, 5), seed=st.integers(0, 9))
@settings(max_examples=30)
def test_merged_is_streamed(cut: int, seed: int) -> None:
    data = batches(seed, 4, 0, 9, 1, 30)
    if seed % 2:
        data[3][0, 1], data[4][:2, 0] = math.nan, math.inf
    empty = Statistics.empty(5, **FULL)
    left, right = (seen(part, **FULL) if part else empty for part in (data[:cut], data[cut:]))
    kept = {key: value.clone() for key, value in tensors(right).items()}
    left.merge(right)
    want = seen(data, **FULL)
    assert_equal(tensors(left, average=False), tensors(want, average=False))
    torch.testing.assert_close(left.average, want.average, rtol=1e-6, atol=0)
    for key in ("rows", "batches", "filled", "nan", "inf", "nonfinite_batch"):
        assert getattr(left, key) == getattr(want, key), key
    left.update(data[0])  # and goes on its own way
    want.update(data[0])
    torch.testing.assert_close(left.average, want.average, rtol=1e-6, atol=0)
    assert_equal(tensors(right), kept)


def test_merging_keeps_what_both_have() -> None:
    data = batches(0, 40, 40)
    both = seen(data[:1], histogram=True, rows=8)
    both.merge(seen(data[1:], rows=4))
    assert both.histogram is None and both.sample is not None and both.sample.capacity == len(both.sample.rows) == 4
    assert_equal(
        {"rows": both.sample.rows}, {"rows": tensors(seen([torch.cat(data)], rows=4))["sample"]}
    )  # the sample of the whole
    both.merge(seen(data[1:]))
    assert both.sample is None
    with pytest.raises(QCompilerError, match="statistics of different values cannot be merged: got 3 channels; need 5"):
        both.merge(Statistics.empty(3))


def test_memory_does_not_grow_with_the_data() -> None:
    one, many = seen(batches(0, 50), **FULL), seen(batches(1, *[50] * 40), **FULL)
    assert {key: value.shape for key, value in tensors(one).items()} == {
        key: value.shape for key, value in tensors(many).items()
    }


def test_what_is_not_finite_is_counted_and_counts_nowhere_else() -> None:
    x = torch.tensor([[1.0, math.nan, -2.0], [math.inf, math.nan, 3.0], [-4.0, math.nan, 0.5]])
    got = seen([torch.ones(2, 3), x, x], **FULL)
    assert (got.nan, got.inf, got.nonfinite_batch) == (6, 2, 1)
    assert (
        got.absmax.tolist() == [4, 1, 3] and got.minimum.tolist() == [-4, 1, -2] and got.maximum.tolist() == [1, 1, 3]
    )
    assert got.histogram is not None and got.histogram.channel.sum(1).tolist() == [6, 2, 8]
    assert int(got.histogram.tensor.sum()) == 16
    assert got.sample is not None and got.sample.rows.tolist() == [[1, 1, 1]]
    only = seen([x[:, 1:2]])
    assert only.unseen and only.amax("minmax", "channel").tolist() == [0]


@pytest.mark.parametrize("data", [[], [torch.zeros(0, 5)], [torch.zeros(3, 5)], [-torch.zeros(1, 5)]])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_nothing_seen(data: list[Tensor], observer: str) -> None:
    got = Statistics.empty(5, **FULL)
    for batch in data:
        got.update(batch)
    assert got.unseen
    assert (
        torch.equal(got.amax(observer, "tensor"), torch.zeros(())) and got.amax(observer, "channel").tolist() == [0] * 5
    )


def test_no_channels() -> None:
    got = seen([torch.zeros(3, 0)], **FULL)
    assert got.rows == 3 and got.unseen
    assert got.amax("absmax", "tensor").shape == () and got.amax("mse", "channel").shape == (0,)


# Histograms


@pytest.mark.parametrize("bits", [TENSOR_BITS, CHANNEL_BITS])
def test_bins_are_where_their_edges_say(bits: int) -> None:
    x = torch.cat([torch.tensor([0.0, 1e-45, 2.0**-24, 2.0**24, 3e38, 1.0]), torch.randn(3000).exp() ** 4])
    lower, upper = edges(bits)
    at = bin_of(x, bits)
    assert bool((lower[at] <= x).all() and ((x < upper[at]) | (x == 0)).all())
    assert at[:5].tolist() == [0, 1, 1, bin_count(bits) - 1, bin_count(bits) - 1]
    inner = slice(2, -1)
    assert float((upper[inner] / lower[inner]).max()) <= 1 + 2.0**-bits
    assert torch.equal(upper[1:-1], lower[2:])


@pytest.mark.parametrize("percent", [0.01, 25, 50, 99, 99.9, 99.99])
@pytest.mark.parametrize("rows", [1, 2, 10, 2000])
def test_percentiles_are_within_a_bin_of_the_quantiles(percent: float, rows: int) -> None:
    (data,) = batches(3, rows)
    got = seen([data], histogram=True)
    cases = [(got.amax("percentile", "tensor", percentile=percent), data.abs().flatten(), TENSOR_BITS)]
    channels = got.amax("percentile", "channel", percentile=percent)
    cases += [(channels[index], data[:, index].abs(), CHANNEL_BITS) for index in range(5)]
    for value, magnitudes, bits in cases:
        want = torch.quantile(magnitudes.double(), percent / 100)
        rank = percent / 100 * (len(magnitudes) - 1)
        around = magnitudes.sort().values[[math.floor(rank), math.ceil(rank)]]
        width = max(float(edges(bits)[1][at] - edges(bits)[0][at]) for at in bin_of(around, bits).tolist())
        assert abs(float(value) - float(want)) <= width
        assert value <= magnitudes.max()


def test_all_percent_is_absmax_and_outliers_are_cut() -> None:
    (data,) = batches(4, 5000)
    data[17, 2] = 1e4
    got = seen([data], histogram=True)
    for per in ("tensor", "channel"):
        assert torch.equal(
            got.amax("percentile", per, percentile=100), got.absmax if per == "channel" else got.absmax.max()
        )
    assert float(got.amax("percentile", "channel", percentile=99.9)[2]) < 1
    above = seen([torch.tensor([[2.0**30], [2.0**31], [2.0**100]])], histogram=True)
    assert float(above.amax("percentile", "tensor", percentile=100)) == 2.0**100


def squared_errors(x: Tensor, dtype: torch.dtype, profile: str) -> Tensor:
    """For each of RATIOS, what the clip does to the real data."""
    flat, block = x.abs().flatten(), (1, numerics.ALL)
    found = []
    for ratio in RATIOS:
        scale = numerics.scale_of((flat.max() * ratio).reshape(1), numerics.format_of((1, 1), dtype, profile))
        codes = numerics.quantize_static(flat, scale, numerics.format_of(block, dtype, profile))
        found.append(
            (numerics.dequantize(codes, scale, format=numerics.format_of(block, codes.dtype)) - flat)
            .double()
            .square()
            .sum()
        )
    return torch.stack(found)


SHAPES: dict[str, Any] = {
    "gauss": lambda x: x,
    "heavy": lambda x: x**3,
    "one-sided": lambda x: torch.nn.functional.silu(2 * x),
    "tiny": lambda x: 1e-3 * x.exp(),
}


@pytest.mark.parametrize("profile", ["deepseek", "ue8m0"])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_mse_is_nearly_as_good_as_brute_force_on_the_data(shape: str, dtype: torch.dtype, profile: str) -> None:
    format = numerics.format_of((1, 1), dtype, profile)
    data = SHAPES[shape](torch.randn(3000, 4, generator=torch.Generator().manual_seed(1)))
    got = seen([data], histogram=True)
    clips = [(got.amax("mse", "tensor", format=format), data)]
    clips += [(c, data[:, i]) for i, c in enumerate(got.amax("mse", "channel", format=format))]
    for clip, part in clips:
        ratio = float(clip / part.abs().max())
        at = min(range(len(RATIOS)), key=lambda index: abs(RATIOS[index] - ratio))
        assert abs(RATIOS[at] - ratio) < 1e-6
        errors = squared_errors(part, dtype, profile)
        assert float(errors[at] / errors.min()) < FORMATS[dtype]


def test_mse_cuts_where_that_pays_and_only_there() -> None:
    flat = torch.linspace(-1, 1, 2001).unsqueeze(1)
    assert float(seen([flat], histogram=True).amax("mse", "tensor")) > 0.98
    bulk = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)
    outlier = torch.cat([bulk, torch.full((1, 1), 8.0)])
    # (8 - clip)² + n · (clip / 127)² / 12 is least at this clip.
    want = 8 / (1 + len(outlier) / (12 * 127**2))
    assert abs(float(seen([outlier], histogram=True).amax("mse", "tensor")) - want) < 0.15
    tiny = seen([outlier * 2.0**-66], histogram=True)  # the squares of these leave FP32
    assert abs(float(tiny.amax("mse", "tensor")) * 2.0**66 - want) < 0.15


@pytest.mark.parametrize("exponent", [-85, -60, -30, 40, 100])
def test_the_size_of_the_values_does_not_change_where_they_are_clipped(exponent: int) -> None:
    data = torch.randn(4000, 3, generator=torch.Generator().manual_seed(2))
    data[17] *= 40
    usual, other = seen([data], histogram=True), seen([data * 2.0**exponent], histogram=True)
    for observer in ("percentile", "mse"):
        for per in ("tensor", "channel"):
            want, got = (each.amax(observer, per, percentile=99.9) for each in (usual, other))
            torch.testing.assert_close(got * 2.0**-exponent, want, rtol=1e-4, atol=0)


def test_histograms_of_values_that_grow_add_up_in_any_order() -> None:
    data = [
        torch.randn(50, 3, generator=torch.Generator().manual_seed(i)) * 2.0**e for i, e in enumerate((-70, -20, 30))
    ]
    data.append(torch.zeros(2, 3))
    whole = seen([torch.cat(data)], histogram=True)
    for order in permutations(data):
        streamed, merged = seen(list(order), histogram=True), seen([order[0]], histogram=True)
        for batch in order[1:]:
            merged.merge(seen([batch], histogram=True))
        for got in (streamed, merged):
            assert got.histogram is not None and whole.histogram is not None
            assert got.histogram.low == whole.histogram.low == low_for(float(whole.absmax.max()))
            assert torch.equal(got.histogram.tensor, whole.histogram.tensor)
            assert torch.equal(got.histogram.channel, whole.histogram.channel)


@pytest.mark.parametrize(
    ("largest", "low"),
    [
        (0.0, None),
        (1e-45, -126),
        (2.0**-110, -125),
        (2.0**-20, -35),
        (2.0**-9, -24),
        (1.0, -24),
        (2.0**23, -24),
        (3e38, 80),
    ],
)
def test_the_lowest_exponent_follows_the_largest_magnitude(largest: float, low: int | None) -> None:
    assert low_for(largest) == low
    lower, upper = edges(TENSOR_BITS, low)
    assert bool((lower[1:] == upper[:-1]).all()) and upper[-1] == math.inf and lower[-1] <= 2.0**128
    at = int(bin_of(torch.tensor(largest), TENSOR_BITS, low))
    assert lower[at] <= torch.tensor(largest).double() <= upper[at]


# Samples


def test_a_sample_has_different_rows_of_the_data() -> None:
    (data,) = batches(5, 200)
    repeated = torch.cat([data, data[:1].expand(500, -1)])
    got = seen([repeated[at : at + 60] for at in range(0, 700, 60)], rows=32).sample
    assert got is not None and got.rows.shape == (32, 5)
    assert torch.equal(got.rows.unique(dim=0).sort(0).values, got.rows.sort(0).values)
    assert all(bool((data == row).all(1).any()) for row in got.rows)
    assert_equal({"rows": got.rows}, {"rows": tensors(seen([data.flip(0)], rows=32))["sample"]})
    few = seen([data[:3]], rows=32).sample
    assert few is not None and few.rows.shape == (3, 5)


def test_every_row_has_the_same_chance() -> None:
    data = torch.arange(4000, dtype=torch.float32).unsqueeze(1).expand(-1, 3)
    kept = seen([data], rows=1000).sample
    assert kept is not None
    counts = torch.histc(kept.rows[:, 0], bins=8, min=0, max=4000)
    assert len(kept.rows) == 1000 and float((counts - 125).abs().max()) < 5 * math.sqrt(125)
    assert len(row_keys(data.contiguous()).unique()) == 4000


# Scaling


@given(seed=st.integers(0, 20))
@settings(max_examples=20)
def test_scaled_is_what_would_have_been_seen(seed: int) -> None:
    data = batches(seed, 6, 20)
    factor = torch.rand(5, generator=torch.Generator().manual_seed(seed)) + 0.01
    before = seen(data, **FULL)
    kept = {key: value.clone() for key, value in tensors(before).items()}
    got, want = before.scaled(factor), seen([batch * factor for batch in data])
    for key in ("absmax", "minimum", "maximum", "first"):
        assert torch.equal(getattr(got, key), getattr(want, key)), key
    torch.testing.assert_close(got.average, want.average, rtol=1e-6, atol=0)
    assert got.sample is not None and before.sample is not None
    assert torch.equal(got.sample.rows, before.sample.rows * factor)
    assert (got.rows, got.batches, got.filled) == (26, 2, 2) and got.histogram is None
    got.update(data[0])  # shares nothing
    assert_equal(tensors(before), kept)


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.amax("absmx", "tensor"), "unknown observer: got 'absmx'. Did you mean 'absmax'? Known: absmax, m"),
        (lambda s: s.amax("absmax", "chanel"), "unknown granularity: got 'chanel'. Did you mean 'channel'?"),
        (lambda s: s.amax("percentile", "tensor", percentile=0), "the percentile is out of range: got 0; need above"),
        (lambda s: s.amax("percentile", "tensor", percentile=math.nan), "the percentile is out of range: got nan"),
        (
            lambda s: s.amax("mse", "tensor", format=numerics.format_of((1, 1), torch.int16)),
            "the dtype is not an 8-bit code type: got torch.int16; need torch.float8",
        ),
        (
            lambda s: s.amax("mse", "tensor", format=Format(DType.i8, (1, 1), profile="deepsek")),
            "unknown quantization profile: got 'deepsek'",
        ),
        (lambda s: s.update(torch.ones(2, 6)), "the batch does not fit the statistics: got f32[2, 6]; need floating"),
        (lambda s: s.update(torch.ones(2, 5).long()), "the batch does not fit the statistics: got i64[2, 5]; need"),
        (lambda s: s.update(torch.tensor(1.0)), "the batch does not fit the statistics: got f32[]; need floating poi"),
        (lambda s: s.scaled(torch.ones(4)), "statistics cannot be scaled by this factor: got f32[4] with a smallest e"),
        (lambda s: s.scaled(-torch.ones(5)), "statistics cannot be scaled by this factor: got f32[5] with a smallest"),
        (lambda s: s.scaled(torch.full((5,), math.inf)), "statistics cannot be scaled by this factor: got f32[5]"),
    ],
)
def test_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(QCompilerError) as error:
        call(seen(batches(0, 9), **FULL))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_observers_that_need_a_histogram_say_so(observer: str) -> None:
    with pytest.raises(QCompilerError) as error:
        seen(batches(0, 9)).amax(observer, "channel")
    assert str(error.value) == (
        f"observer '{observer}' needs a histogram, but there is none. Observe it with histogram=True; in a pipeline, "
        "use calibrate{histogram=true}. Scaling a value drops its histogram."
    )
