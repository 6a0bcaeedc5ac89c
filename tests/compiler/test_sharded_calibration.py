"""Calibrated models on a mesh: the whole model is observed and smoothed, then divided."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import run_on_two_ranks
from sharded_graphs import MLP_INPUT as X
from sharded_graphs import mlp
from transformers import AutoModelForCausalLM, LlamaConfig

import qcompiler
from qcompiler.capture import capture
from qcompiler.ir import Graph
from qcompiler.pass_manager.instruments import relative_error
from qcompiler.pass_manager.pipeline import Pass

AUTO: Any = AutoModelForCausalLM  # without types
IDS = torch.arange(24).reshape(2, 12) * 7 % 96
TWO: Any = qcompiler.simulated_mesh(tp=2)
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 128,
    "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip
PREPARED = "canonicalize; attention; dead-code; calibrate; "
LOWERED = "share-quantize; fuse-prescale; fuse-linear; fold-constants; dead-code; to-kernels"
STATIC = f"{PREPARED}quantize{{x_format=#fp8_tensor, w_format=#fp8_block, static=true}}; {LOWERED}"
SMOOTH = f"{PREPARED}smoothquant{{x_format=#fp8_tile, w_format=#fp8_block}}; fp8-tile; {LOWERED}"
OPTIONS: dict[str, dict[str, Any]] = {
    "measured": {"scheme": "fp8_tile_smooth"}, "smoothed": {"pipeline": SMOOTH}, "static": {"pipeline": STATIC},
}  # fmt: skip


@cache
def model() -> Any:
    torch.manual_seed(0)
    return AUTO.from_config(LlamaConfig(**SIZES)).eval()


@cache
def captured() -> Graph:
    return capture(model(), (IDS,)).graph


@pytest.mark.parametrize("kind", OPTIONS)
def test_ranks_compute_what_one_process_computes(kind: str) -> None:
    """The data is read once, although each rank is compiled."""
    whole: Any = qcompiler.compile(captured(), calibration=[(IDS,)], **OPTIONS[kind])
    once = iter([(IDS,)])
    compiled: Any = qcompiler.compile(
        captured(), calibration=once, mesh=TWO, sharding="tp; sp{tokens=4}", **OPTIONS[kind]
    )
    assert str(compiled.graph).count("_scatter_tokens(") == 2
    assert relative_error(whole(IDS), compiled(IDS)) < 2e-3
    assert compiled.calibration.digest == whole.calibration.digest
    assert compiled.calibration.batches is None
    smoothed = {row.name: row.remark.split("; each")[0] for row in compiled.report.quantized}
    assert smoothed == {row.name: row.remark or smoothed[row.name] for row in whole.report.quantized}


def test_static_scales_are_the_ones_of_the_whole_model() -> None:
    whole: Any = qcompiler.compile(captured(), calibration=[(IDS,)], pipeline=STATIC)
    compiled: Any = qcompiler.compile(captured(), calibration=[(IDS,)], pipeline=STATIC, mesh=TWO)
    scales = {name: tensor for name, tensor in whole.graph.weights.items() if name.endswith(".scale")}
    assert len(scales) == 4
    for rank in compiled.ranks:
        assert all(torch.equal(rank.graph.weights[name], scale) for name, scale in scales.items())


ADDED = """func @m(%x: f32[s0, 64]) -> (f32[s0, 64]) where s0 in 1..64 {
  %w1 = core.param() {name = "w1"} : f32[256, 64]
  %w2 = core.param() {name = "w2"} : f32[64, 256]
  %w3 = core.param() {name = "w3"} : f32[64, 64]
  %g = aten.linear(%x, %w1) : f32[s0, 256]
  %h = aten.relu(%g) : f32[s0, 256]
  %y = aten.linear(%h, %w2) : f32[s0, 64]
  %z = aten.linear(%y, %w3) : f32[s0, 64]
  return %z
}"""


def test_a_sum_over_ranks_has_the_statistics_of_the_whole_value() -> None:
    graph = Graph.parse(ADDED)
    graph.weights.update(mlp().weights)
    graph.weights["w3"] = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    whole: Any = qcompiler.compile(graph, calibration=[(X,)], pipeline=STATIC)
    compiled: Any = qcompiler.compile(graph, calibration=[(X,)], pipeline=STATIC, mesh=TWO)
    name = "y_sum.scale"
    assert torch.equal(compiled.graph.weights[name], whole.graph.weights["y.scale"])
    assert relative_error(whole(X), compiled(X)) < 1e-3


@pytest.mark.parametrize(
    "options", [{"scheme": None}, {}, {"scheme": "fp8_tile_smooth"}], ids=["float", "fp8", "smooth"]
)
def test_static_caches(options: dict[str, Any]) -> None:
    """The whole model is observed, then each rank's attention has its scales."""
    prompts = [[1, 2, 3, 4, 5], [7, 8, 9], [11]]
    given: dict[str, Any] = {**options, "max_batch": 2, "max_length": 32, "kv_cache": "fp8_static"}
    whole = qcompiler.decoder(model(), calibration=[IDS], **given)
    ranks = qcompiler.decoder(model(), calibration=[IDS], mesh=TWO, **given)
    observed = [each.stages["cache-scales"].ops("attention.causal") for each in (whole, ranks)]
    scales = [[(op.attrs["key_scale"], op.attrs["value_scale"]) for op in ops] for ops in observed]
    assert scales[0] == scales[1] and len(scales[0]) == 1
    assert ranks.generate(prompts, max_new_tokens=6) == whole.generate(prompts, max_new_tokens=6)


def test_folders(tmp_path: Path) -> None:
    """Ranks read their parts only, so that they take statistics, but do not run the whole model."""
    model().save_pretrained(tmp_path / "model")
    call: dict[str, Any] = {"example_kwargs": {"input_ids": IDS, "use_cache": False}, "mesh": TWO}
    for kind in ("static", "measured"):
        with pytest.raises(
            qcompiler.PassError, match=r"cannot run the whole model: got the pass 'calibrate'.*Load the mo"
        ):
            qcompiler.compile(tmp_path / "model", calibration=[IDS], **OPTIONS[kind], **call)
    with pytest.raises(qcompiler.PassError, match="ranks that read parts of a folder's weights cannot run the whole"):
        qcompiler.decoder(tmp_path / "model", calibration=[IDS], kv_cache="fp8_static", max_batch=2, mesh=TWO)
    whole: Any = qcompiler.compile(model(), calibration=[IDS], pipeline=STATIC, example_kwargs=call["example_kwargs"])
    whole.calibration.save(tmp_path / "statistics")
    known = qcompiler.Calibration.load(tmp_path / "statistics")
    read: Any = qcompiler.compile(tmp_path / "model", calibration=known, pipeline=STATIC, **call)
    held: Any = qcompiler.compile(model(), calibration=known, pipeline=STATIC, **call)
    assert torch.equal(read(**call["example_kwargs"]).logits, held(**call["example_kwargs"]).logits)


def test_a_checkpoint_with_static_scales(tmp_path: Path) -> None:
    """Its scales are for whole weights and all activations, so no calibration is needed, and codes are cut anywhere."""
    call: dict[str, Any] = {"example_kwargs": {"input_ids": IDS, "use_cache": False}, "scheme": "fp8_tensor_static"}
    qcompiler.compile(model(), calibration=[IDS], **call).save_checkpoint(
        tmp_path / "model", "compressed-tensors", reader=None
    )
    whole: Any = qcompiler.compile(tmp_path / "model", **call)
    compiled: Any = qcompiler.compile(tmp_path / "model", mesh=TWO, **call)
    assert str(compiled.graph).count("coll.all_reduce") == 2
    assert relative_error(whole(**call["example_kwargs"]).logits, compiled(**call["example_kwargs"]).logits) < 1e-3


SCRIPT = """
from sharded_graphs import MLP_INPUT as X, mlp

quantize = "quantize{x_format=#fp8_tensor, w_format=#fp8_block, static=true}"
steps = f"canonicalize; calibrate; {quantize}; fuse-linear; fold-constants; to-kernels"
compiled = qcompiler.compile(mlp(), calibration=[(X,)], pipeline=steps, mesh=mesh)
found["output"], found["steps"] = compiled(X), steps
found["different"] = error_of(lambda: qcompiler.compile(mlp(), calibration=[(X + rank,)], pipeline=steps, mesh=mesh))
"""


def test_two_processes(tmp_path: Path) -> None:
    one, two = run_on_two_ranks(SCRIPT, tmp_path)
    simulated: Any = qcompiler.compile(mlp(), calibration=[(X,)], pipeline=one["steps"], mesh=TWO)
    assert torch.equal(one["output"], two["output"]) and torch.equal(one["output"], simulated(X))
    for rank in (one, two):
        assert rank["different"].startswith("QCompilerError: the ranks have different programs: got 2 programs on 2")


PART = """func @m(%q: f32[1, 4, s0, 8], %k: f32[1, 4, s0, 8]) -> (f32[1, 4, s0, 8]) where s0 in 1..9 {
  %o = attention.causal(%q, %k, %k) {scale = 0.5} : f32[1, 4, s0, 8]
  %s = coll.all_reduce(%o) {mesh = "tp"} : f32[1, 4, s0, 8]
  return %s
}"""


def test_refusals() -> None:
    part = Graph.parse(PART)
    part.calibration = qcompiler.Calibration([[torch.ones(1, 4, 2, 8)] * 2])
    with pytest.raises(
        qcompiler.PassError, match="keys and values of one rank's heads cannot be observed alone: got %o"
    ):
        Pass.parse("cache-scales").run(part)
    late = "canonicalize; fp8-tile; calibrate; fuse-linear"
    with pytest.raises(
        qcompiler.PassError, match="the pass 'calibrate' must observe the whole model: got it after 'fp8"
    ):
        qcompiler.compile(mlp(), calibration=[(X,)], pipeline=late, mesh=TWO)
    with pytest.raises(qcompiler.PassError, match="one scale spans axis 1"):
        qcompiler.compile(mlp(), calibration=[(X,)], scheme="int8_tensor_static", mesh=TWO)
