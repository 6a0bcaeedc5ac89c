"""Models on a mesh whose ranks send sums as codes: the program, its bytes and errors, and two processes."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import run_on_two_ranks
from transformers import AutoModelForCausalLM, LlamaConfig

import qcompiler
from qcompiler import Sharding
from qcompiler.capture import capture
from qcompiler.distributed.simulation import Call, Simulation
from qcompiler.ir import Graph
from qcompiler.ir.formats import FP8_TILE
from qcompiler.pass_manager.instruments import relative_error
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline

AUTO: Any = AutoModelForCausalLM  # without types
LAYERS = 4
FLOAT = "canonicalize; attention; dead-code"
IDS = torch.arange(24).reshape(2, 12) * 7 % 96
HALF_UNIT = 2**-4 / 3**0.5
"""Root mean square of errors up to half a unit of the last place of an E4M3 code, relative to the code."""

SUMS = "tp; sp{tokens=8, sums=fp8_tile}"


@cache
def captured() -> Graph:
    """The graph of a tiny Llama in bf16, up to the passes that shard it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=16, num_key_value_heads=8,
        head_dim=64, vocab_size=96, tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    graph = capture(AUTO.from_config(config).eval(), (IDS,)).graph
    run_pipeline(Pipeline.parse(FLOAT), graph)
    return graph


@cache
def compiled(ranks: int, sharding: str, pipeline: str | None = None) -> Any:
    passes: Any = str(qcompiler.pipeline("fp8_tile")) if pipeline is None else pipeline
    return qcompiler.compile(
        captured(),
        pipeline=passes,
        mesh=qcompiler.simulated_mesh(tp=ranks),
        sharding=Sharding.parse(sharding),
        strict=False,
    )


def test_the_program() -> None:
    """Matmuls quantize their terms, and one kernel adds them to the residual, normalizes and quantizes the result."""
    graph = compiled(2, SUMS).graph
    text = str(graph)
    assert "all_reduce" not in text and "reduce_scatter" not in text
    terms = [op["x"].op for op in graph.ops("coll.all_to_all_tokens")]
    assert len(terms) == 2 * 2 * LAYERS and {op.name for op in terms} == {"kernel.fused_linear"}
    assert {op.format() for op in terms} == {FP8_TILE}  # scales are sent row by row
    fused = [*graph.ops("kernel.fused_sum_quantize")]
    assert len(fused) == 2 * LAYERS - 1
    assert [str(op.attrs["expression"]).partition(";")[0] for op in fused] == ["h0 = bf16(x0 + bf16(y0))"] * len(fused)
    assert len([*graph.ops("quant.sum_terms")]) == 1  # before the last norm, which only the vocabulary projection reads
    pointwise = graph.clone()
    run_pipeline(Pipeline.parse("fuse-pointwise"), pointwise)
    (last,) = [op for op in pointwise.ops("kernel.pointwise") if "x1[1, 0, i1, i2] * x2[1, 0, i1," in str(op.attrs)]
    assert "mean" in str(last.attrs["expressions"]) and "quant." not in str(pointwise)


@pytest.mark.parametrize("ranks", [2, 4])
def test_logits(ranks: int) -> None:
    """Errors of sums are independent: they add up as their squares do, as the sums themselves in the residual."""
    whole = compiled(1, "tp", FLOAT)(IDS)
    error = relative_error(whole, compiled(ranks, SUMS, FLOAT)(IDS))
    assert HALF_UNIT / 2 < error < HALF_UNIT
    others = relative_error(whole, compiled(ranks, "tp; sp{tokens=8}")(IDS))
    assert relative_error(whole, compiled(ranks, SUMS)(IDS)) < 1.05 * math.hypot(others, HALF_UNIT)


def test_few_tokens_have_the_bits_of_many() -> None:
    """Also for one token, as many as are few, and a token more on one rank than on the other."""
    cut, few = compiled(2, SUMS), compiled(2, SUMS.replace("tokens=8", "tokens=1000"))
    for shape in ((1, 1), (1, 7), (1, 8), (3, 3), (2, 12)):
        ids = torch.arange(shape[0] * shape[1]).reshape(shape) * 11 % 96
        assert torch.equal(cut(ids), few(ids))


def sent(model: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> float:
    """Bytes that rank 0 sends in a call, as the algorithm with the fewest bytes does."""
    found: list[float] = []
    exchange, ranks = Simulation.exchange, len(model.ranks)
    shares = {"all_reduce": 2.0, "reduce_scatter": 1.0, "all_to_all": 1.0, "all_gather": float(ranks)}

    def counted(self: Simulation, rank: int, call: Call) -> list[torch.Tensor]:
        found.append(shares[call.name] * call.x.nbytes * (ranks - 1) / ranks * (rank == 0))
        return exchange(self, rank, call)

    with monkeypatch.context() as patched:
        patched.setattr(Simulation, "exchange", counted)
        model(ids)
    return sum(found)


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 0.55 of the bytes of sums in bf16: codes and scales of terms, then of norms; the last norm in bf16."""
    ids = torch.arange(64).reshape(2, 32) % 96
    width, share, tokens = 256, (ranks - 1) / ranks, 64
    bf16 = sent(compiled(ranks, "tp"), ids, monkeypatch)
    assert bf16 == 2 * LAYERS * 2 * share * tokens * 2 * width
    codes = width + 4 * width / 128
    assert sent(compiled(ranks, SUMS), ids, monkeypatch) == share * tokens * ((4 * LAYERS - 1) * codes + 2 * width)
    assert 0.5 < sent(compiled(ranks, SUMS), ids, monkeypatch) / bf16 <= 0.55


def test_a_model_in_float() -> None:
    """Only what ranks send is quantized."""
    graph = compiled(2, SUMS, FLOAT).graph
    assert len([*graph.ops("quant.sum_terms")]) == 2 * LAYERS
    assert not [op for op in graph.ops() if op.name.startswith("kernel.") or op.name == "quant.linear"]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Gloo exchanges codes, and each rank adds them in the order of the ranks, as in the simulation."""
    folder = str(Path(__file__).parent)
    script = f"""
sys.path.append({folder!r})
from test_quantized_sums import IDS, SUMS, captured

model = qcompiler.compile(captured(), mesh=mesh, sharding=SUMS)
found["logits"], found["few"] = model(IDS), model(IDS[:1, :5])
"""
    expected = compiled(2, SUMS)
    for rank in run_on_two_ranks(script, tmp_path):
        assert torch.equal(rank["logits"], expected(IDS)) and torch.equal(rank["few"], expected(IDS[:1, :5]))
