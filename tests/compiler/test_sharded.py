"""Models on a mesh: all ranks in one process against the unsharded model, two processes with gloo, and refusals."""

import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sharded_graphs import MLP_INPUT as X
from sharded_graphs import MOVES, mlp, rank_graphs, run_ranks
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OPTConfig, Qwen3Config

import qcompiler
from qcompiler.capture import capture
from qcompiler.compiler.model import CompiledModel
from qcompiler.compiler.sharding import RankModel
from qcompiler.distributed.communicator import current
from qcompiler.distributed.simulation import Simulation
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Mesh
from qcompiler.ir.formats import FP8_BLOCK, FP8_TENSOR
from qcompiler.numerics import quantize
from qcompiler.pass_manager.instruments import relative_error
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline

AUTO: Any = AutoModelForCausalLM  # without types
IDS = torch.arange(24).reshape(2, 12) * 7 % 96
FLOAT = "canonicalize; attention; dead-code"
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 96, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}


@cache
def captured(name: str) -> Graph:
    """The graph of a tiny model in FP32, up to the passes that shard it."""
    torch.manual_seed(0)
    graph = capture(AUTO.from_config(CONFIGS[name](**SIZES)).eval(), (IDS,)).graph
    run_pipeline(Pipeline.parse(FLOAT), graph)
    return graph


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("parts", [2, 4])
def test_ranks_compute_what_one_process_computes(name: str, parts: int) -> None:
    graph, mesh = captured(name), f"tp={parts}"
    (whole,) = interpret(graph, [IDS])
    ranks = rank_graphs(graph, mesh)
    outputs, _ = run_ranks(ranks, mesh, [IDS])
    assert str(ranks[0]).count("coll.all_reduce") == 2 * SIZES["num_hidden_layers"]
    assert max(relative_error(whole, found) for (found,) in outputs) < 2e-6
    assert all(torch.equal(found, outputs[0][0]) for (found,) in outputs)


REST = str(qcompiler.pipeline("fp8_tile")).removeprefix(f"{FLOAT}; ")


@pytest.mark.parametrize(("name", "parts"), [("llama", 4), ("qwen3", 2)])
def test_quantized_columns_and_heads_have_equal_bits(name: str, parts: int) -> None:
    graph, mesh = captured(name).clone(), f"tp={parts}"
    ranks = rank_graphs(graph, mesh, REST, "[128, 128]")
    run_pipeline(Pipeline.parse(REST), graph)
    whole: dict[str, torch.Tensor] = {}
    interpret(graph, [IDS], observe=lambda op, found: whole.update(zip(map(str, op.results), found, strict=True)))
    _, values = run_ranks(ranks, mesh, [IDS])
    heads = "scaled_dot_product_attention"
    assert torch.equal(torch.cat([each[heads] for each in values], 1), whole[f"%{heads}"])
    codes = "view_default_1_q"
    assert torch.equal(
        *(x.view(torch.uint8) for x in (torch.cat([each[codes] for each in values], 2), whole[f"%{codes}"]))
    )
    assert all(relative_error(whole["%linear_3"], each["linear_3_sum"]) < 1e-6 for each in values)
    stored = [sum(graph.weights[str(op.attrs["name"])].nbytes for op in graph.ops("core.param")) for graph in ranks]
    quantized = sum(graph.weights[str(op.attrs["name"])].nbytes for op in graph.ops("core.param"))
    kept = 2 * 96 * 128 * 4 + 3 * 128 * 4  # the embedding, the head and norms are on each rank
    assert all(size < (quantized - kept) // parts + kept + 2048 for size in stored)


def test_compile_on_a_simulated_mesh() -> None:
    graph = captured("llama")
    whole = qcompiler.compile(graph, scheme="fp8_tile")(IDS)
    compiled = qcompiler.compile(graph, scheme="fp8_tile", mesh=qcompiler.simulated_mesh(tp=2), sharding="tp")
    outputs = compiled(IDS)
    assert relative_error(whole, outputs) < 5e-3  # a code may round the other way after a sum in another order
    one, two = compiled.ranks
    assert str(one.graph) == str(two.graph)
    assert "merged_q = core.param() {name = " in str(two.graph)
    assert str(two.pipeline).count('partition{mesh="tp=2", rank=1}') == 1
    assert "linear_7" in compiled.skipped["shard"]
    assert len(compiled.report.quantized) == len(whole_report(graph).quantized)
    with pytest.raises(qcompiler.InputError, match="this is the program of one rank"):
        two(IDS)
    with pytest.raises(qcompiler.QCompilerError, match="Compile the model without a mesh for that"):
        compiled.save_checkpoint("x", "fp8")
    with pytest.raises(qcompiler.QCompilerError, match="a sharded model cannot become a decoder"):
        compiled.decoder()


def test_a_rank_is_connected_while_its_kernels_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program of a rank asks for its communicator also where only shapes matter."""
    connection = SimpleNamespace(communicator=object())
    compiled: Any = qcompiler.compile(mlp(), mesh=qcompiler.simulated_mesh(tp=2))
    monkeypatch.setattr(RankModel, "connected", connection)
    monkeypatch.setattr(CompiledModel, "warmup", lambda _, **options: (current(), options))
    assert compiled.ranks[1].warmup(rows=[1]) == (connection.communicator, {"rows": [1]})


def test_ranks_tune_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank is connected while its GEMMs are listed, and measures as a step of all ranks."""
    connection = SimpleNamespace(communicator=object(), each=lambda step: [step(), "of rank 1"])
    compiled: Any = qcompiler.compile(mlp(), mesh=qcompiler.simulated_mesh(tp=2))
    rank = compiled.ranks[1]
    monkeypatch.setattr(RankModel, "connected", connection)
    monkeypatch.setattr(CompiledModel, "tune", lambda self, **sizes: (current(), sizes, self._each(lambda: "own")))
    assert rank.tune(rows=[1]) == (connection.communicator, {"rows": [1]}, ["own", "of rank 1"])
    monkeypatch.setattr(RankModel, "connected", None)
    assert rank._each(lambda: "alone") == ["alone"]


def test_sequence_parallel_norms_have_equal_bits() -> None:
    """Also for one token, for more tokens than are few, and with a token more on one rank than on the other."""
    graph, mesh = captured("llama"), qcompiler.simulated_mesh(tp=2)
    plain: Any = qcompiler.compile(graph, scheme="fp8_tile", mesh=mesh)
    sharding = qcompiler.Sharding.parse("tp; sp{tokens=8}")
    compiled: Any = qcompiler.compile(graph, scheme="fp8_tile", mesh=mesh, sharding=sharding)
    text = str(compiled.graph)
    assert (text.count("coll.all_reduce"), text.count("_scatter_tokens(")) == (0, 2)
    assert text.count("kernel.fused_quantize(%embedding_part, %linear_3_sum_part") == 1  # residual sum, norm, codes
    assert "= coll.all_gather_tokens(%mul_18_part_q" in text
    for shape in ((1, 1), (1, 7), (1, 8), (3, 3), (2, 12)):
        ids = torch.arange(shape[0] * shape[1]).reshape(shape) * 11 % 96
        assert torch.equal(compiled(ids), plain(ids))


def test_norms_after_views_of_the_tokens() -> None:
    """OPT flattens batches before its second norm, and adds the residual there."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(**sizes, vocab_size=96, max_position_embeddings=64, word_embed_proj_dim=256)
    graph = capture(AUTO.from_config(config).eval(), (IDS,)).graph
    mesh: Any = qcompiler.simulated_mesh(tp=2)
    plain: Any = qcompiler.compile(graph, scheme="fp8_tile", mesh=mesh)
    compiled: Any = qcompiler.compile(graph, scheme="fp8_tile", mesh=mesh, sharding="tp; sp{tokens=8}")
    text = str(compiled.graph)
    assert "%layer_norm_3_q = coll.all_gather_tokens(%layer_norm_3_part_q, [%mul_2])" in text  # codes are gathered
    assert (text.count("coll.all_reduce"), text.count("_scatter_tokens(")) == (0, 4)
    for shape in ((1, 1), (1, 7), (3, 3), (2, 12)):
        ids = torch.arange(shape[0] * shape[1]).reshape(shape) * 11 % 96
        assert torch.equal(compiled(ids), plain(ids))


def test_experts_are_divided() -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 128, "num_local_experts": 6, "num_experts_per_tok": 2}
    graph = capture(AUTO.from_config(MixtralConfig(**sizes)).eval(), (IDS,)).graph
    whole: Any = qcompiler.compile(graph, scheme="fp8_tile")
    mesh: Any = qcompiler.simulated_mesh(tp=3)
    with pytest.raises(qcompiler.PassError, match="nothing can be sharded"):  # 16 heads among 3 ranks
        qcompiler.compile(graph, scheme="fp8_tile", mesh=mesh, sharding="tp")
    for sharding in ("ep", "tp; ep; sp{tokens=4}"):
        compiled: Any = qcompiler.compile(graph, scheme="fp8_tile", mesh=mesh, sharding=sharding)
        idle = [note for note in compiled.report.notes if note.startswith("tactic 'tp' divides nothing: %linear_3: ")]
        assert len(idle) == sharding.startswith("tp")
        assert "own_rows" not in str(compiled.graph)  # the kernel writes zeros
        stored = compiled.ranks[2].graph
        names = [name for op in stored.ops("core.param") if "experts" in (name := str(op.attrs["name"]))]
        assert [stored.weights[name].shape[0] for name in names] == [2] * 4  # codes and scales of two linears
        for shape in ((1, 1), (2, 12)):
            ids = torch.arange(shape[0] * shape[1]).reshape(shape) * 11 % 96
            assert relative_error(whole(ids), compiled(ids)) < 2e-3


def whole_report(graph: Graph) -> qcompiler.Report:
    return qcompiler.compile(graph, scheme="fp8_tile").report


STORED = """func @m(%x: f32[s0, 64]) -> (f32[s0, 64]) where s0 in 1..64 {
  %q1 = core.param() {name = "q1"} : f8e4m3fn[256, 64]
  %s1 = core.param() {name = "s1"} : f32[2, 1]
  %w1 = quant.dequantize(%q1, %s1) {format = #fp8_block, out_dtype = f32} : f32[256, 64]
  %q2 = core.param() {name = "q2"} : f8e4m3fn[64, 256]
  %s2 = core.param() {name = "s2"} : f32[1, 2]
  %w2 = quant.dequantize(%q2, %s2) {format = #fp8_block, out_dtype = f32} : f32[64, 256]
  %g = aten.linear(%x, %w1) : f32[s0, 256]
  %h = aten.relu(%g) : f32[s0, 256]
  %y = aten.linear(%h, %w2) : f32[s0, 64]
  return %y
}"""


def test_codes_and_scales_of_a_checkpoint_are_cut_together() -> None:
    graph = Graph.parse(STORED)
    for number, weight in zip("12", mlp().weights.values(), strict=True):
        graph.weights[f"q{number}"], graph.weights[f"s{number}"], *_ = quantize(weight, format=FP8_BLOCK)
    compiled = qcompiler.compile(graph, mesh=qcompiler.simulated_mesh(tp=2))
    assert relative_error(qcompiler.compile(graph)(X), compiled(X)) < 1e-6
    stored = {name: compiled.ranks[1].graph.weights[name] for name in ("s1", "s2")}
    assert torch.equal(stored["s1"], graph.weights["s1"][1:]) and torch.equal(stored["s2"], graph.weights["s2"][:, 1:])


def test_static_scales_of_a_checkpoint() -> None:
    """One scale for a whole weight and one for all activations, which all ranks have: the codes are cut anywhere."""
    text = (
        STORED.replace("f32[2, 1]", "f32[1, 1]").replace("f32[1, 2]", "f32[1, 1]").replace("#fp8_block", "#fp8_tensor")
    )
    text = text.replace("out_dtype = f32", "out_dtype = f32, x_scale = 0.02")
    graph = Graph.parse(text)
    graph.verify()
    for number, weight in zip("12", mlp().weights.values(), strict=True):
        graph.weights[f"q{number}"], graph.weights[f"s{number}"], *_ = quantize(weight, format=FP8_TENSOR)
    whole: Any = qcompiler.compile(graph, scheme="fp8_tensor_static")
    compiled: Any = qcompiler.compile(graph, scheme="fp8_tensor_static", mesh=qcompiler.simulated_mesh(tp=4))
    assert relative_error(whole(X), compiled(X)) < 1e-6
    for at, rank in enumerate(compiled.ranks):
        assert torch.equal(rank.graph.weights["q2"], graph.weights["q2"][:, 64 * at : 64 * (at + 1)])
        assert torch.equal(rank.graph.weights["s2"], graph.weights["s2"])
    assert "unit=[-1, -1], stored=1}" in str(compiled.pipeline)
    with pytest.raises(qcompiler.PassError, match="one scale spans axis 1"):  # scales of each call, for all activations
        qcompiler.compile(graph, scheme="fp8_tensor", mesh=qcompiler.simulated_mesh(tp=4))


@pytest.mark.parametrize("scheme", ["fp8_tile", "fp8_tile{k_block=64}"])
def test_a_second_axis_of_the_mesh_repeats_the_model(scheme: str) -> None:
    compiled = qcompiler.compile(mlp(), scheme=scheme, mesh=qcompiler.simulated_mesh(dp=2, tp=2))
    assert relative_error(qcompiler.compile(mlp(), scheme=scheme)(X), compiled(X)) < 1e-6
    assert len(compiled.ranks) == 4


def test_a_model_is_captured_at_its_first_call() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.SiLU(), torch.nn.Linear(256, 64)).eval()
    compiled: Any = qcompiler.compile(module, mesh=qcompiler.simulated_mesh(tp=2))
    with pytest.raises(qcompiler.CaptureError, match="the model is not captured yet"):
        _ = compiled.ranks
    assert relative_error(qcompiler.compile(module)(X), compiled(X)) < 1e-6
    assert qcompiler.compile(mlp()).ranks[0].graph is not compiled.graph
    assert list(compiled.forward.__signature__.parameters) == ["self", "input"]


@pytest.mark.parametrize(
    ("scheme", "mesh", "sharding", "message"),
    [
        ("fp8_row", "tp=2", "tp", "one scale spans axis 1, so that a cut would go through its block"),
        ("int8_tensor", "tp=2", "tp", "one scale spans axis 1, so that a cut would go through its block"),
        (
            "fp8_tile",
            "tp=4",
            "tp",
            "2 blocks of 128 elements along axis 1 cannot be cut into 4 equal parts; the nearest",
        ),
        ("fp8_tensor_static", "tp=2", "tp", "needs calibration data"),
        ("fp8_tile", "dp=2", "tp", "tactic 'tp' uses an axis that the mesh does not have: got 'tp'; need one of dp"),
        ("fp8_tile", "tp=2", "ep", "nothing can be sharded: got the mesh tp=2"),
        ("fp8_tile", "tp=2", "sp", "there is no sum over ranks to cut by tokens: put tp or ep before it"),
    ],
)
def test_refusals(scheme: str, mesh: str, sharding: str, message: str) -> None:
    name, _, size = mesh.partition("=")
    with pytest.raises(qcompiler.PassError) as error:
        qcompiler.compile(mlp(), scheme=scheme, mesh=qcompiler.simulated_mesh(**{name: int(size)}), sharding=sharding)
    assert message in str(error.value)


def test_tactics_that_divide_nothing() -> None:
    """A note if another tactic divides something, an error with all reasons if none does."""
    mesh: Any = qcompiler.simulated_mesh(tp=2)
    compiled = qcompiler.compile(mlp(), mesh=mesh, sharding="tp; ep; sp")
    assert compiled.report.notes == (
        "tactic 'ep' divides nothing: there are no grouped matmuls",
        "tactic 'sp' divides nothing: %y_sum: no operation after it treats tokens independently",
    )
    assert compiled.report.notes == compiled.ranks[1].report.notes
    with pytest.raises(qcompiler.PassError) as error:
        qcompiler.compile(mlp(), mesh=mesh, sharding='tp{layers=["w1"]}; ep; sp')
    assert str(error.value).splitlines()[0] == (
        """nothing can be sharded: got the mesh tp=2. Tactic 'tp{layers=["w1"]}':"""
    )
    assert str(error.value).splitlines()[1:] == [
        "%y: no pattern selects it: w1 (%y)", "Tactic 'ep':", "there are no grouped matmuls", "Tactic 'sp':",
        'there is no sum over ranks to cut by tokens: put tp or ep before it, as in "tp; sp"',
    ]  # fmt: skip
    alone: Any = qcompiler.simulated_mesh(tp=1)
    assert qcompiler.compile(mlp(), mesh=alone, sharding="tp; ep").report.notes == ()


def test_wrong_meshes() -> None:
    with pytest.raises(qcompiler.PassError, match="the mesh is of a wrong type: got str; need a DeviceMesh"):
        qcompiler.compile(mlp(), mesh="tp=2")  # type: ignore[arg-type]


PROCESS = """
import sys
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
import qcompiler

rank, folder = int(sys.argv[1]), sys.argv[2]
sys.path.append(sys.argv[3])
from sharded_graphs import MLP_INPUT, MOVES, mlp

distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
compiled = qcompiler.compile(mlp(), mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
output = compiled(MLP_INPUT)
moved = [call(compiled.connected.communicator, MLP_INPUT + rank) for call in MOVES]
torch.save((output, dict(compiled.weights.named_buffers()), str(compiled.graph), moved), f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


def moved_by(rank: int) -> list[torch.Tensor]:
    return [call(current(), X + rank) for call in MOVES]


def test_two_processes(tmp_path: Path) -> None:
    """Gloo adds two terms; their order does not change the sum, so that the simulation has equal bits."""
    command = [sys.executable, "-c", PROCESS]
    rest = [str(tmp_path), str(Path(__file__).parents[1])]
    ranks = [subprocess.Popen([*command, str(rank), *rest], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    simulated: Any = qcompiler.compile(mlp(), mesh=qcompiler.simulated_mesh(tp=2))
    expected = simulated(X)
    moves = Simulation(Mesh.parse("tp=2")).run([partial(moved_by, rank) for rank in range(2)])
    for at, rank in enumerate(simulated.ranks):
        output, weights, text, moved = torch.load(tmp_path / f"{at}.pt")
        assert torch.equal(output, expected)
        assert text == str(rank.graph)
        assert [torch.equal(*pair) for pair in zip(moved, moves[at], strict=True)] == [True] * len(MOVES)
        for name, tensor in rank.weights.named_buffers():
            assert torch.equal(weights[name].view(torch.uint8), tensor.view(torch.uint8))
