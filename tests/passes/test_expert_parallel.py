"""Experts divided among ranks: the sum of all ranks is the whole, also if a rank has no entry or all of them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_graphs import run_ranks

from passes.analyses.expert_regions import expert_regions
from passes.analyses.integer_ranges import limits_of
from qcompiler.errors import PassError
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Mesh
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline

MIXTURE = """func @m(%h: bf16[s0, 32], %e: i64[s0, 2], %p: bf16[s0, 2]) -> (bf16[s0, 32]) where s0 in 1..16 {
  %w1 = core.param() {name = "w1"} : bf16[12, 48, 32]
  %w2 = core.param() {name = "w2"} : bf16[12, 32, 24]
  %w1t = aten.transpose.int(%w1, 1, 2) : bf16[12, 32, 48]
  %w2t = aten.transpose.int(%w2, 1, 2) : bf16[12, 24, 32]
  %expert = aten.view(%e, [-1]) : i64[2*s0]
  %prob = aten.view(%p, [-1]) : bf16[2*s0]
  %key, %order = aten.sort(%expert) : i64[2*s0], i64[2*s0]
  %token = aten.floor_divide(%order, 2) : i64[2*s0]
  %x = aten.index.Tensor(%h, [%token]) : bf16[2*s0, 32]
  %float = aten._to_copy(%key) {dtype = f32} : f32[2*s0]
  %counts = aten.histc(%float, 12, 0, 11) : f32[12]
  %ends = aten.cumsum(%counts, 0) {dtype = i32} : i32[12]
  %y = aten._grouped_mm(%x, %w1t, %ends) : bf16[2*s0, 48]
  %g, %u = aten.chunk(%y, 2, -1) : bf16[2*s0, 24], bf16[2*s0, 24]
  %a = aten.silu(%g) : bf16[2*s0, 24]
  %b = aten.mul.Tensor(%a, %u) : bf16[2*s0, 24]
  %z = aten._grouped_mm(%b, %w2t, %ends) : bf16[2*s0, 32]
  %sorted = aten.index.Tensor(%prob, [%order]) : bf16[2*s0]
  %column = aten.unsqueeze(%sorted, 1) : bf16[2*s0, 1]
  %weighted = aten.mul.Tensor(%z, %column) : bf16[2*s0, 32]
  LINES
  return %r
}"""
ENDS = {
    "unsorted": """%place = aten.argsort(%order) : i64[2*s0]
  %back = aten.index.Tensor(%weighted, [%place]) : bf16[2*s0, 32]
  %each = aten.view(%back, [-1, 2, 32]) : bf16[s0, 2, 32]
  %sum = aten.sum.dim_IntList(%each, [1]) : bf16[s0, 32]
  %r = aten.add.Tensor(%h, %sum) : bf16[s0, 32]""",
    "added": """%zero = aten.zeros_like(%h) : bf16[s0, 32]
  %sum = aten.index_add(%zero, 0, %token, %weighted) : bf16[s0, 32]
  %r = aten.add.Tensor(%h, %sum) : bf16[s0, 32]""",
}


def mixture(lines: str) -> Graph:
    graph, generator = Graph.parse(MIXTURE.replace("LINES", lines)), torch.Generator().manual_seed(0)
    for name, shape in (("w1", (12, 48, 32)), ("w2", (12, 32, 24)), ("t", (12, 32))):
        if f'"{name}"' in lines or name != "t":
            graph.weights[name] = (torch.randn(shape, generator=generator) / 4).bfloat16()
    graph.verify()
    return graph


def divided(graph: Graph, mesh: str) -> list[Graph]:
    """The programs of all ranks."""
    ranks = []
    for rank in range(Mesh.parse(mesh).size):
        own = graph.clone()
        steps = f'expert-parallel{{mesh="{mesh}", rank={rank}}}; partition{{mesh="{mesh}", rank={rank}}}'
        run_pipeline(Pipeline.parse(steps), own)
        own.verify()
        ranks.append(own)
    assert len({str(own) for own in ranks}) == 1
    return ranks


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([2, 3, 4]),
    st.sampled_from(sorted(ENDS)),
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), min_size=1, max_size=9),
)
def test_the_sum_of_all_ranks_is_the_whole(ranks: int, end: str, chosen: list[tuple[int, int]]) -> None:
    graph, mesh = mixture(ENDS[end]), f"tp={ranks}"
    generator = torch.Generator().manual_seed(len(chosen))
    inputs: list[Any] = [torch.randn(len(chosen), 32, generator=generator).bfloat16(), torch.tensor(chosen)]
    inputs.append(torch.rand(len(chosen), 2, generator=generator).bfloat16())
    (whole,) = interpret(graph, inputs)
    programs = divided(graph, mesh)
    outputs, values = run_ranks(programs, mesh, inputs)
    for (output,) in outputs:  # two entries of a token are rounded one after the other
        torch.testing.assert_close(output, whole, rtol=2**-7, atol=2**-7)
    for rank, own in enumerate(values):
        mine = range(rank * 12 // ranks, (rank + 1) * 12 // ranks)
        count = sum(expert in mine for pair in chosen for expert in pair)
        assert int(own["ends_own"][-1]) == count  # a rank multiplies its own entries only: none, or all
        assert not own["z_own"][count:].any()
        assert programs[rank].weights["w1"].shape[0] == 12 // ranks


BIASED = """
  %t = core.param() {name = "t"} : bf16[12, 32]
  %bias = aten.index.Tensor(%t, [%key]) : bf16[2*s0, 32]
  %biased = aten.add.Tensor(%weighted, %bias) : bf16[2*s0, 32]
"""


@pytest.mark.parametrize("end", ENDS)
def test_biases_of_experts(end: str) -> None:
    lines = BIASED + ENDS[end].replace("aten.index.Tensor(%weighted", "aten.index.Tensor(%biased")
    graph = mixture(lines.replace("%token, %weighted)", "%token, %biased)"))
    chosen = torch.tensor([[0, 11], [3, 3], [7, 2]])
    inputs = [torch.ones(3, 32).bfloat16(), chosen, torch.full((3, 2), 0.5).bfloat16()]
    (whole,), programs = interpret(graph, inputs), divided(graph, "tp=3")
    outputs, _ = run_ranks(programs, "tp=3", inputs)
    for (output,) in outputs:
        torch.testing.assert_close(output, whole, rtol=2**-7, atol=2**-6)
    assert torch.equal(programs[1].weights["t"], graph.weights["t"][4:8])


REFUSED = {
    "aten.neg reads the sorted numbers of the experts (%key)": "%r = aten.neg(%key) : i64[2*s0]",
    "it is an output of the model (%r)": "%r = aten.clone(%weighted) : bf16[2*s0, 32]",
    "aten.sum.dim_IntList reads rows sorted by expert": "%r = aten.sum.dim_IntList(%weighted, [0]) : bf16[32]",
    "aten.index.Tensor reads the end of each expert's entries (%ends)": (
        "%r = aten.index.Tensor(%h, [%ends]) : bf16[12, 32]"
    ),
    "aten.index_add reads the tokens of the entries in the order by expert (%token)": (
        "%r = aten.index_add(%h, 0, %token, %weighted) : bf16[s0, 32]"
    ),
    "aten.neg reads the order of the entries by expert (%order)": "%r = aten.neg(%order) : i64[2*s0]",
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(why: str) -> None:
    text = MIXTURE.replace("LINES", REFUSED[why])
    result = text.rpartition("%r = ")[2].split(" : ")[1].split("\n")[0]
    graph = Graph.parse(text.replace("-> (bf16[s0, 32])", f"-> ({result})"))
    found, missed = expert_regions(graph)
    assert not found
    assert {str(reason).partition(" (%weighted")[0] for reason in missed.values()} == {why}
    assert not run_pipeline(Pipeline.parse('expert-parallel{mesh="tp=2"}'), graph).steps[0].changed


def test_patterns_and_numbers_of_ranks() -> None:
    graph = mixture(ENDS["added"])
    for options, why in {
        'mesh="tp=5"': "12 experts cannot be divided among 5 ranks; the nearest possible number of ranks is 4",
        'mesh="tp=2", layers=["*", "!w2"]': "the pattern '!w2' excludes it",
    }.items():
        run = run_pipeline(Pipeline.parse(f"expert-parallel{{{options}}}"), graph)
        assert not run.steps[0].changed and why in str(run.skipped["expert-parallel"])
    with pytest.raises(PassError, match="option 'rank' of pass 'expert-parallel' is wrong: got 2; need 0 to 1"):
        Pipeline.parse('expert-parallel{mesh="tp=2", rank=2}')
    step = Pipeline.parse('expert-parallel{mesh="tp=1"}')
    before = str(graph)
    run_pipeline(step, graph)
    assert str(graph) == before


def test_own_entries_are_grouped_by_one_kernel() -> None:
    """Numbers that `own_first` changes are still below the number of experts, so that no general sort is needed."""
    lines = ENDS["unsorted"].replace("aten.argsort(%order)", "aten.index_put(%empty, [%order], %count)")
    more = "%empty = aten.empty_like(%order) : i64[2*s0]\n  %rows = aten.sym_size.int(%h, 0) : int(s0)\n"
    more += "  %all = core.mul(2, %rows) : int(2*s0)\n  %count = aten.arange(%all) : i64[2*s0]\n  "
    (graph, *_) = divided(mixture(more + lines), "tp=2")
    assert str(limits_of(graph["expert_own"])) == "Limits(low=0, high=11)"
    run_pipeline(Pipeline.parse("group-entries"), graph)
    graph.verify()
    (entries,) = graph.ops("kernel.group_entries")
    assert entries["keys"] is graph["expert_own"] and graph["ends_own"].op["self"] is entries.results[4]
