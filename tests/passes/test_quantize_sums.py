"""Sums over ranks that are sent as codes: errors within half a unit of the codes, on all ranks alike."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_graphs import RandomBlocks, rank_graphs, residual_mlps, run_ranks
from torch import Tensor

from passes.sharding.quantize_sums import QuantizeSums
from qcompiler.errors import PassError
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pass
from qcompiler.testing import random_inputs

HALF_UNIT, HALF_SMALLEST = 2.0**-4, 2.0**-10
"""Half a unit of the last place of an E4M3 code: relative to a normal number, and in scales for a subnormal one."""

ROUNDING = 2.0**-20
"""Relative errors of scales, quotients and additions in FP32."""

FEW = 4


def programs(graph: Graph, mesh: str) -> list[Graph]:
    return rank_graphs(graph, mesh, "quantize-sums", rewrite=f'sequence-parallel{{mesh="{mesh}", few={FEW}}}; ')


def bound(terms: list[Tensor], scales: list[Tensor], columns: int) -> Tensor:
    """The largest difference between the sum of FP32 terms and of their codes, for each element."""
    spread = [scale.repeat_interleave(columns, -1)[..., : terms[0].shape[-1]] for scale in scales]
    pairs = zip(terms, spread, strict=True)
    each = [torch.maximum(HALF_UNIT * term.abs(), HALF_SMALLEST * scale) for term, scale in pairs]
    return torch.stack(each).sum(0) + ROUNDING * torch.stack(terms).abs().sum(0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(1, 1), (3, 1), (1, 7), (3, 6), (2, 5)]))
def test_random_graphs(seed: int, sizes: tuple[int, int]) -> None:
    """Each sum is within the bound of the sum of the ranks' terms in that program, for any number of tokens."""
    blocks = RandomBlocks(seed)
    graph = Graph.parse(blocks.text())
    _, graph.weights = random_inputs(graph, seed)
    mesh = f"tp={blocks.parts}"
    ranks = programs(graph, mesh)
    assert "reduce_scatter_tokens" not in str(ranks[0])
    x = torch.randn(*sizes, blocks.width, generator=torch.Generator().manual_seed(seed))
    outputs, values = run_ranks(ranks, mesh, [x])
    assert all(torch.equal(output, outputs[0][0]) for (output,) in outputs)
    tokens = sizes[0] * sizes[1]
    sums = [*ranks[0].ops("quant.sum_terms")]
    assert sums
    for op in sums:
        term = op["terms"].op["x"].name.removesuffix("_q")
        parts = [own[op.result.name][0] for own in values]
        if tokens < FEW:
            assert all(torch.equal(part, parts[0]) for part in parts)
        found = parts[0] if tokens < FEW else torch.cat(parts)
        assert not found[tokens:].any()  # rows that no token has
        terms = [own[term].flatten(0, 1) for own in values]
        scales = [own[f"{term}_s"].flatten(0, 1) for own in values]
        assert ((found[:tokens] - torch.stack(terms).sum(0)).abs() <= bound(terms, scales, 128)).all()


WIDE = """func @m(%x: f32[s0, 256]) -> (f32[s0, 256]) where s0 in 1..64 {
  %n = core.param() {name = "n"} : f32[256]
  %w1 = core.param() {name = "w1"} : f32[64, 256]
  %w2 = core.param() {name = "w2"} : f32[256, 64]
  %g = aten.linear(%x, %w1) : f32[s0, 64]
  %h = aten.relu(%g) : f32[s0, 64]
  %y = aten.linear(%h, %w2) : f32[s0, 256]
  %r = aten.add.Tensor(%x, %y) : f32[s0, 256]
  %m = aten.rms_norm(%r, [256], %n) : f32[s0, 256]
  return %m
}"""


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_bound_is_tight(ranks: int) -> None:
    graph = Graph.parse(
        WIDE.replace("64, 256", f"{64 * ranks}, 256")
        .replace("256, 64", f"256, {64 * ranks}")
        .replace("s0, 64", f"s0, {64 * ranks}")
    )
    _, graph.weights = random_inputs(graph, 0)
    mesh = f"tp={ranks}"
    x = torch.randn(23, 256, generator=torch.Generator().manual_seed(1))
    _, values = run_ranks(programs(graph, mesh), mesh, [x])
    found = torch.cat([own["y_sum_part"] for own in values])[:23]
    terms, scales = [own["y"] for own in values], [own["y_s"] for own in values]
    used = (found - torch.stack(terms).sum(0)).abs() / bound(terms, scales, 128)
    assert 0.5 < used.max() <= 1
    # Errors of terms are independent: they add up as their squares do, about 2.7% of a term of normal numbers.
    error = (found - torch.stack(terms).sum(0)).norm() / torch.stack(terms).norm()
    assert 0.02 < error < 0.035


def test_a_term_that_is_not_finite_stays_so() -> None:
    graph = Graph.parse(WIDE)
    _, graph.weights = random_inputs(graph, 0)
    x = torch.ones(8, 256)
    x[3, 5] = torch.inf
    outputs, _ = run_ranks(programs(graph, "tp=2"), "tp=2", [x])
    assert [int(row) for row in outputs[0][0].isfinite().all(1).logical_not().nonzero()] == [3]


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("#fp8_block", "in which one scale covers several tokens, which different ranks receive: got #fp8_block; need"),
        ("#fp8_tensor", "in which one scale covers several tokens"),
        ("#nvfp4", "cannot be sent in a format: kernels need symmetric 8-bit codes"),
    ],
)
def test_wrong_formats(format: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Pass.parse(f"quantize-sums{{format={format}}}")


def test_named_formats() -> None:
    assert Pass.parse("quantize-sums{format=int8_row}") == Pass.parse("quantize-sums{format=#int8_row}")
    assert str(Pass.parse("quantize-sums{format=fp8_tile}")) == str(QuantizeSums()) == "quantize-sums"
    with pytest.raises(PassError, match="has a wrong value: got fp8_tiles; need a format such as #fp8_tile"):
        Pass.parse("quantize-sums{format=fp8_tiles}")


QUANTIZED = (
    "quantize-sums; "
    "fp8-tile{x_format=#format<f8e4m3fn, block = [1, 32]>, w_format=#format<f8e4m3fn, block = [32, 32]>}; "
    "share-quantize; fuse-linear; fold-constants; dead-code; to-kernels; gather-quantized"
)
LAYERS = residual_mlps(64, 128, 128)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_fused_sum_has_equal_bits(ranks: int) -> None:
    graph = Graph.parse(LAYERS)
    _, graph.weights = random_inputs(graph, 0)
    mesh = f"tp={ranks}"
    rewrite = f'sequence-parallel{{mesh="{mesh}", few={FEW}}}; '
    plain = rank_graphs(graph, mesh, QUANTIZED, "[32, 32]", rewrite=rewrite)
    fused = rank_graphs(graph, mesh, f"{QUANTIZED}; fuse-norm-quantize; fuse-sum-quantize", "[32, 32]", rewrite=rewrite)
    assert str(fused[0]).count("kernel.fused_sum_quantize(%y1_terms_q, %y1_terms_s, %x_part, %n)") == 1
    assert str(fused[0]).count("quant.sum_terms(%y2_terms_q, %y2_terms_s)") == 1  # nothing quantizes the last sum
    for shape in ((1, 1), (1, 4), (3, 5)):
        x = torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1))
        (outputs, values), (expected, whole) = run_ranks(fused, mesh, [x]), run_ranks(plain, mesh, [x])
        assert all(torch.equal(output, expected[0][0]) for (output,) in outputs)
        for name in ("m1_q", "m1_s"):
            assert all(torch.equal(own[name].float(), whole[0][name].float()) for own in values)
