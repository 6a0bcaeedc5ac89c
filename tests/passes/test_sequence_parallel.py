"""Sequence-parallel norms on all ranks: equal bits to the graph whose sums all ranks hold, for any number of tokens."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_graphs import RandomBlocks, rank_graphs, residual_mlps, run_ranks

from passes.analyses.sent_bytes import Sending
from passes.analyses.token_regions import token_regions
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.ir.formats import FP8_TILE
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.testing import random_inputs

SMALL = "#format<f8e4m3fn, block = [1, 4]>"
QUANTIZED = (
    f"quantize{{x_format={SMALL}, w_format=#format<f8e4m3fn, block = [2, 4]>}}; share-quantize; fuse-linear; "
    "fold-constants; dead-code; to-kernels; "
)


def both(graph: Graph, mesh: str, few: int, then: str = "") -> tuple[list[Graph], list[Graph]]:
    """The programs of all ranks without and with sequence-parallel norms."""
    cut = f'sequence-parallel{{mesh="{mesh}", few={few}}}; '
    after = then.replace("to-kernels; ", "to-kernels; gather-quantized; ")
    return rank_graphs(graph, mesh, then), rank_graphs(graph, mesh, after, rewrite=cut)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([(1, 1), (3, 1), (1, 7), (3, 6), (2, 5)]))
def test_random_graphs(seed: int, few: int, sizes: tuple[int, int]) -> None:
    blocks = RandomBlocks(seed)
    graph = Graph.parse(blocks.text())
    _, graph.weights = random_inputs(graph, seed)
    mesh = f"tp={blocks.parts}"
    plain, cut = both(graph, mesh, few)
    scattered = sum("coll.reduce_scatter_tokens" in line for line in str(cut[0]).splitlines())
    shape = f"f32[s0, s1, {blocks.width}]"  # not the sums of norms
    assert scattered == sum("coll.all_reduce" in line and shape in line for line in str(plain[0]).splitlines())
    x = torch.randn(*sizes, blocks.width, generator=torch.Generator().manual_seed(seed))
    (outputs, _), (expected, _) = run_ranks(cut, mesh, [x]), run_ranks(plain, mesh, [x])
    for (output,) in outputs:
        assert torch.equal(output, expected[0][0])  # the simulation adds in the same order
    (whole,) = interpret(graph, [x])
    torch.testing.assert_close(outputs[0][0], whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


LAYERS = residual_mlps(16, 32, 64)


@pytest.mark.parametrize("ranks", [2, 4])
def test_codes_and_scales_are_gathered_with_equal_bits(ranks: int) -> None:
    graph = Graph.parse(LAYERS)
    _, graph.weights = random_inputs(graph, 0)
    mesh, unit = f"tp={ranks}", "[2, 4]"
    fused = QUANTIZED + "fuse-norm-quantize"
    plain = rank_graphs(graph, mesh, fused, unit)
    after = fused.replace("to-kernels; ", "to-kernels; gather-quantized; ")
    cut = rank_graphs(graph, mesh, after, unit, rewrite=f'sequence-parallel{{mesh="{mesh}", few=3}}; ')
    lines = [line for line in str(cut[0]).splitlines() if "all_gather_tokens" in line]
    assert [line.split(" = ")[0].strip() for line in lines] == ["%m1_q", "%m1_s", "%r2"]
    assert "%m1_part_q, %m1_part_s, %r1_part = kernel.fused_quantize(%x_part, %y1_sum_part" in str(cut[0])
    for shape in ((1, 1), (1, 2), (3, 5)):
        x = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(1))
        (outputs, values), (expected, whole) = run_ranks(cut, mesh, [x]), run_ranks(plain, mesh, [x])
        assert all(torch.equal(output, expected[0][0]) for (output,) in outputs)
        for name in ("m1_q", "m1_s"):
            assert all(torch.equal(own[name].float(), whole[0][name].float()) for own in values)


def test_each_rank_computes_its_tokens_only() -> None:
    graph = Graph.parse(LAYERS)
    _, graph.weights = random_inputs(graph, 0)
    (_, cut), x = both(graph, "tp=4", 3), torch.randn(3, 5, 16)
    _, values = run_ranks(cut, "tp=4", [x])
    assert {tuple(own["r1_part"].shape) for own in values} == {(1, 4, 16)}
    rows = torch.cat([own["r1_part"][0] for own in values])
    assert not rows[15:].any()  # the last rank has a row of zeros
    _, few = run_ranks(cut, "tp=4", [x[:1, :2]])
    assert {tuple(own["r1_part"].shape) for own in few} == {(1, 2, 16)}


def test_bytes_are_the_ones_that_the_finished_program_sends() -> None:
    """Codes and scales of the norm, and terms in codes, although layers are quantized much later."""
    graph, mesh, unit = Graph.parse(LAYERS), "tp=2", "[2, 4]"
    _, graph.weights = random_inputs(graph, 0)
    summed = graph.clone()
    run_pipeline(Pipeline.parse(f'shard{{mesh="{mesh}", unit={unit}}}; collectives'), summed)
    (region,) = token_regions(summed, "tp")
    form = FP8_TILE.with_block((1, 4))
    assert region.sent(summed, Sending()) == (2 * 64, 2 * 64)
    rewrite = f'sequence-parallel{{mesh="{mesh}", few=3, reads={SMALL}, sums={SMALL}}}; '
    after = QUANTIZED.replace("to-kernels; ", "to-kernels; gather-quantized; ")
    for sums, more in ((None, ""), (form, f"quantize-sums{{format={SMALL}}}; ")):
        (cut, _) = rank_graphs(graph, mesh, more + after, unit, rewrite=rewrite)
        sizes: Counter[str] = Counter()
        for op in cut:
            for value in op.results if op.name.startswith("coll.") else ():
                sizes[op.name] += int(str(value.tensor.shape[-1])) * value.tensor.dtype.bits // 8
        gathers, scatters = sizes.pop("coll.all_gather_tokens"), sizes.total() - sizes["coll.own_tokens"]
        assert region.sent(summed, Sending(form, sums=sums)) == (scatters, gathers)
