"""Sharded graphs: random ones on all ranks against one process, what is refused, and what each rank stores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_graphs import RandomBlocks, rank_graphs, run_ranks

from passes.analyses.sharding_cuts import Cutting
from passes.analyses.sharding_regions import regions
from qcompiler.errors import PassError, QCompilerError
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pass, Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.runtime.weights import Weights
from qcompiler.testing import random_inputs


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs(seed: int) -> None:
    blocks = RandomBlocks(seed)
    graph = Graph.parse(blocks.text())
    graph.verify()
    inputs, graph.weights = random_inputs(graph, seed)
    (whole,) = interpret(graph, inputs)
    mesh = f"tp={blocks.parts}"
    graphs = rank_graphs(graph, mesh)
    outputs, _ = run_ranks(graphs, mesh, inputs)
    shape = f"f32[s0, s1, {blocks.width}]"  # not the sums of norms
    sums = sum("coll.all_reduce" in line and shape in line for line in str(graphs[0]).splitlines())
    assert sums == sum(" = aten.add.Tensor" in line for line in blocks.lines)  # every block is sharded
    for (output,) in outputs:
        torch.testing.assert_close(output, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
        assert torch.equal(output, outputs[0][0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.data())
def test_random_shardings(seed: int, data: st.DataObject) -> None:
    """Excluded layers are whole on each rank, and the ranks compute what one process computes."""
    blocks = RandomBlocks(seed)
    graph = Graph.parse(blocks.text())
    inputs, graph.weights = random_inputs(graph, seed)
    (whole,) = interpret(graph, inputs)
    linears = [str(op["weight"].op.attrs["name"]) for op in graph.ops("aten.linear")]
    excluded = data.draw(st.sets(st.sampled_from(linears), max_size=2))
    layers = ", ".join(f'"{pattern}"' for pattern in ("*", *(f"!{name}" for name in sorted(excluded))))
    mesh, more = f"tp={blocks.parts}", f", layers=[{layers}]"
    options = f'{{mesh="{mesh}"{more}}}'
    run = run_pipeline(Pipeline.parse(f"split-norms{options}; shard{options}"), graph.clone())
    if not run.steps[1].changed:
        assert "excludes it" in str(run.skipped)
        return
    graphs = rank_graphs(graph, mesh, more=more)
    outputs, _ = run_ranks(graphs, mesh, inputs)
    for (output,) in outputs:
        torch.testing.assert_close(output, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
    for name in excluded:
        assert all(torch.equal(own.weights[name], graph.weights[name]) for own in graphs)


MLP = """func @m(%x: f32[s0, 64]) -> (f32[s0, 64]) where s0 in 1..64 {
  %w1 = core.param() {name = "w1"} : f32[256, 64]
  %w2 = core.param() {name = "w2"} : f32[64, 256]
  %b2 = core.param() {name = "b2"} : f32[64]
  %g = aten.linear(%x, %w1) : f32[s0, 256]
  LINES
  %y = aten.linear(%h, %w2, %b2) : f32[s0, 64]
  return %y
}"""


def mlp(lines: str = "%h = aten.relu(%g) : f32[s0, 256]") -> Graph:
    return Graph.parse(MLP.replace("LINES", lines))


def test_each_rank_stores_its_own_parts() -> None:
    graph = mlp()
    _, tensors = random_inputs(graph, 0)
    read: list[str] = []

    def loader(name: str) -> torch.Tensor:
        read.append(name)
        return tensors[name]

    graph.weights = Weights({name: lambda name=name: loader(name) for name in tensors})  # type: ignore[misc]
    ranks = rank_graphs(graph, "tp=2")
    assert not read  # parts are cut when they are read
    for at, rank in enumerate(ranks):
        weights = {name: rank.weights[name] for name in tensors}
        assert torch.equal(weights["w1"], tensors["w1"][128 * at : 128 * (at + 1)])
        assert torch.equal(weights["w2"], tensors["w2"][:, 128 * at : 128 * (at + 1)])
        assert torch.equal(weights["b2"], tensors["b2"] if at == 0 else torch.zeros(64))
        assert all(w.untyped_storage().nbytes() == w.nbytes for name, w in weights.items() if name != "b2")
    assert sorted(read) == sorted(tensors)  # once for all ranks
    assert torch.equal(graph.weights["w1"], tensors["w1"])


ATTENTION = """func @m(%x: bf16[s0, s1, 16384]) -> (bf16[s0, s1, 16384]) where s0 in 1..4, s1 in 1..16 {
  %wq = core.param() {name = "wq"} : bf16[16384, 16384]
  %wk = core.param() {name = "wk"} : bf16[1024, 16384]
  %wv = core.param() {name = "wv"} : bf16[1024, 16384]
  %wo = core.param() {name = "wo"} : bf16[16384, 16384]
  %b = aten.sym_size.int(%x, 0) : int(s0)
  %s = aten.sym_size.int(%x, 1) : int(s1)
  %q = aten.linear(%x, %wq) : bf16[s0, s1, 16384]
  %qh = aten.view(%q, [%b, %s, 128, 128]) : bf16[s0, s1, 128, 128]
  %qt = aten.transpose.int(%qh, 1, 2) : bf16[s0, 128, s1, 128]
  %k = aten.linear(%x, %wk) : bf16[s0, s1, 1024]
  %kh = aten.view(%k, [%b, %s, 8, 128]) : bf16[s0, s1, 8, 128]
  %kt = aten.transpose.int(%kh, 1, 2) : bf16[s0, 8, s1, 128]
  %v = aten.linear(%x, %wv) : bf16[s0, s1, 1024]
  %vh = aten.view(%v, [%b, %s, 8, 128]) : bf16[s0, s1, 8, 128]
  %vt = aten.transpose.int(%vh, 1, 2) : bf16[s0, 8, s1, 128]
  %o = attention.causal(%qt, %kt, %vt) {scale = 0.1} : bf16[s0, 128, s1, 128]
  %ot = aten.transpose.int(%o, 1, 2) : bf16[s0, s1, 128, 128]
  %of = aten.view(%ot, [%b, %s, 16384]) : bf16[s0, s1, 16384]
  %y = aten.linear(%of, %wo) : bf16[s0, s1, 16384]
  return %y
}"""


@pytest.mark.parametrize(("ranks", "keys"), [(4, 2), (8, 1), (16, 1), (64, 1)])
def test_llama_405b(ranks: int, keys: int) -> None:
    """8 heads of keys, each read by 16 heads of queries, with blocks of 128."""
    (graph, *_) = rank_graphs(Graph.parse(ATTENTION), f"tp={ranks}", unit="[128, 128]")
    graph.verify()
    heads = 128 // ranks
    assert f"%o = attention.causal(%qt, %kt, %vt) {{scale = 0.1}} : bf16[s0, {heads}, s1, 128]" in str(graph)
    assert f'%wk = core.param() {{name = "wk"}} : bf16[{128 * keys}, 16384]' in str(graph)
    assert f'%wo = core.param() {{name = "wo"}} : bf16[16384, {128 * heads}]' in str(graph)


def test_numbers_of_ranks_between_heads_of_keys() -> None:
    for ranks, nearest in ((12, 8), (24, 16), (48, 32), (256, 128)):
        _, missed = regions(Graph.parse(ATTENTION), Cutting(ranks, unit=(128, 128)))
        reasons = {str(why).partition("; ")[2].partition(" (")[0] for why in missed.values() if "cut into" in why.why}
        assert reasons == {f"the nearest possible number of parts is {nearest}"}


VOCABULARY = """func @m(%ids: i64[s0, s1]) -> (f32[s0, s1, 48]) where s0 in 1..4, s1 in 1..16 {
  %t = core.param() {name = "t"} : f32[48, 32]
  %w = core.param() {name = "w"} : f32[48, 32]
  %b = core.param() {name = "b"} : f32[48]
  %x = aten.embedding(%t, %ids) : f32[s0, s1, 32]
  %h = aten.softmax.int(%x, -1) : f32[s0, s1, 32]
  %y = aten.linear(%h, %w, %b) : f32[s0, s1, 48]
  %z = aten.tanh(%y) : f32[s0, s1, 48]
  return %z
}"""


@pytest.mark.parametrize("parts", [2, 4])
def test_gathered_columns_have_equal_bits(parts: int) -> None:
    graph, mesh = Graph.parse(VOCABULARY), f"tp={parts}"
    graph.verify()
    _, graph.weights = random_inputs(graph, 0)
    ids = torch.arange(30).reshape(2, 15)
    ranks = rank_graphs(graph, mesh, more=", gather=1024")
    assert str(ranks[0]).count("coll.all_gather") == 2
    assert {tuple(ranks[0].weights[name].shape) for name in "tw"} == {(48, 32 // parts), (48 // parts, 32)}
    (whole,), (outputs, _) = interpret(graph, [ids]), run_ranks(ranks, mesh, [ids])
    assert all(torch.equal(output, whole) for (output,) in outputs)


def test_small_tables_are_whole() -> None:
    assert not regions(Graph.parse(VOCABULARY), Cutting(2))[0]


TIED = VOCABULARY.replace("%w, %b) :", "%t, %b) :")


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_tied_table_is_cut_along_its_rows(parts: int) -> None:
    """Each rank looks up its own rows; all others are zeros, so that the sum has equal bits."""
    graph, mesh = Graph.parse(TIED), f"tp={parts}"
    graph.verify()
    _, graph.weights = random_inputs(graph, 0)
    graph.weights["t"][0] = -graph.weights["t"][0].abs()
    ids = torch.arange(48).reshape(2, 24)
    ranks = rank_graphs(graph, mesh, more=", gather=1024")
    text = str(ranks[0])
    assert (text.count("coll.own_first"), text.count("coll.all_reduce"), text.count("coll.all_gather")) == (1, 1, 1)
    assert tuple(ranks[0].weights["t"].shape) == (48 // parts, 32)
    (whole,), (outputs, _) = interpret(graph, [ids]), run_ranks(ranks, mesh, [ids])
    assert all(torch.equal(output, whole) for (output,) in outputs)


def test_a_tied_table_that_cannot_be_cut() -> None:
    _, missed = regions(Graph.parse(TIED), Cutting(5, gather=1024))
    assert {str(why) for why in missed.values()} == {
        "48 elements along axis 0 cannot be cut into 5 equal parts; the nearest possible number of parts is 4 (%t)",
    }


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("%h = aten.softmax.int(%g, -1) : f32[s0, 256]", "aten.softmax.int normalizes along axis 1 (%h)"),
        ("%h, %i = aten.sort(%g) : f32[s0, 256], i64[s0, 256]", "aten.sort is not known to keep parts apart (%h)"),
        ("%h = aten.cumsum(%g, 1) : f32[s0, 256]", "aten.cumsum sums up along axis 1 (%h)"),
        (
            "%h = aten.relu(%g) : f32[s0, 256]\n  %t = aten.t(%g) : f32[256, s0]\n"
            "  %m = aten.mm(%t, %g) : f32[256, 256]",
            "aten.mm would be cut along two of its loops",
        ),
        (
            "%n = aten.sym_size.int(%g, 1) : int(256)\n  %h = aten.relu(%g) : f32[s0, 256]",
            "aten.sym_size.int reads the size of axis 1 (%g)",
        ),
        (
            "%n = core.mul(64, 4) : int(256)\n  %b = aten.sym_size.int(%x, 0) : int(s0)\n"
            "  %h = aten.view(%g, [%b, %n]) : f32[s0, 256]",
            "aten.view computes the size of axis 1 (%h)",
        ),
    ],
)
def test_refused(lines: str, why: str) -> None:
    graph = mlp(lines)
    graph.verify()
    found, missed = regions(graph, Cutting(2))
    assert not found
    assert any(str(reason).startswith(why) for reason in missed.values())
    assert not Pass.parse('shard{mesh="tp=2"}').run(graph)


def reason(mesh: str, unit: str = "[1, 1]", lines: str = "%h = aten.relu(%g) : f32[s0, 256]") -> str:
    run = run_pipeline(Pipeline.parse(f'shard{{mesh="{mesh}", unit={unit}}}'), mlp(lines))
    assert not run.steps[0].changed
    return run.skipped["shard"]["y"]


def test_cuts_through_blocks() -> None:
    blocks = "4 blocks of 64 elements along axis 1 cannot be cut into"
    assert reason("tp=3", "[64, 64]") == f"{blocks} 3 equal parts; the nearest possible number of parts is 2 (%w2)"
    assert reason("tp=8", "[64, 64]") == f"{blocks} 8 equal parts; the nearest possible number of parts is 4 (%w2)"
    assert reason("tp=2", "[64, -1]") == "one scale spans axis 1, so that a cut would go through its block (%w2)"
    assert reason("tp=2", "[-1, 64]") == "one scale spans axis 0, so that a cut would go through its block (%w1)"
    assert "no number of parts is possible" in reason("tp=2", "[256, 1]")
    assert reason("tp=2", "[192, 1]") == "256 elements along axis 0 are not whole blocks of 192 (%w1)"
    assert reason("tp=3").startswith("256 elements along axis 1 cannot be cut into 3 equal parts; the nearest")


def test_a_bias_that_is_also_used_elsewhere_is_not_a_term_of_the_sum() -> None:
    lines = "%c = aten.neg(%b2) : f32[64]\n  %h = aten.relu(%g) : f32[s0, 256]"
    assert reason("tp=2", lines=lines).startswith("it is added to a partial sum, but is not a weight of this matmul")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ('shard{mesh="dp=2"}', "the mesh has no such axis: got 'tp'"),
        ('shard{mesh="two"}', "option 'mesh' of pass 'shard' is wrong: this is not a mesh: got 'two'"),
        (
            'shard{mesh="tp=2", axis=3}',
            "option 'axis' of pass 'shard' has a wrong value: got 3; need a word or a string",
        ),
        ('shard{mesh="tp=2", unit=[0, 1]}', r"option 'unit' of pass 'shard' is wrong: got \[0, 1\]"),
        (
            'shard{mesh="tp=2", stored=-2}',
            "option 'stored' of pass 'shard' is wrong: got -2; need 0 or more, or -1 for",
        ),
        ('partition{mesh="tp=2", rank=2}', "option 'rank' of pass 'partition' is wrong: got 2; need 0 to 1"),
    ],
)
def test_wrong_options(spec: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Pass.parse(spec)


def test_options_print_and_parse() -> None:
    spec = 'shard{mesh="dp=2, tp=4", unit=[128, 128]}; collectives; partition{mesh="dp=2, tp=4", rank=3}'
    assert str(Pipeline.parse(spec)) == spec


def test_a_mesh_with_one_rank_changes_nothing() -> None:
    graph = mlp()
    before = str(graph)
    assert not Pass.parse('shard{mesh="tp=1"}').run(graph)
    assert str(graph) == before


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tp=4", "%w1 is placed on another number of ranks: got 2 along 'tp'; need 4, as in the mesh tp=4"),
        ("dp=2", "the mesh has no such axis: got 'tp'"),
    ],
)
def test_partition_needs_the_mesh_of_the_placements(mesh: str, message: str) -> None:
    with pytest.raises(QCompilerError, match=message):
        run_pipeline(Pipeline.parse(f'shard{{mesh="tp=2"}}; collectives; partition{{mesh="{mesh}"}}'), mlp())


def test_partition_needs_collectives() -> None:
    with pytest.raises(PassError, match="a reshard is not a collective yet"):
        run_pipeline(Pipeline.parse('shard{mesh="tp=2"}; partition{mesh="tp=2"}'), mlp())
