"""The pass latent-attention on tiny DeepSeek models: any cut into calls, over a cache that holds the latent once."""

from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from causal_models import BASE, EXPERTS, LATENT, captured, inputs
from cut_calls import after, error, in_cuts
from decoding_models import tiny
from transformers import DeepseekV2Config, DeepseekV3Config

import qcompiler
from passes.analyses.head_sources import parts_of
from passes.attention.cache_scales import CacheScales
from qcompiler.calibration import Calibration
from qcompiler.capture import capture
from qcompiler.interpreter import interpret
from qcompiler.ir import CacheType, DType, Graph
from qcompiler.ir.formats import FP8_ROW, INT8_TENSOR
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.runtime.caches import cache_types
from qcompiler.testing import verified

FRONT = "canonicalize; attention{consecutive=position_ids}; dead-code"
OVER_LATENT = f"{FRONT}; latent-attention; dead-code"
TOKENS = torch.randint(3, 64, (3, 10), generator=torch.Generator().manual_seed(5))


@cache
def without_query_latent(kind: Any) -> Graph:
    """A model of one layer whose queries are computed by one linear."""
    settings: dict[str, Any] = {**BASE, **EXPERTS, **LATENT, "q_lora_rank": None, "topk_method": "greedy"}
    call = (torch.randint(0, 64, (2, 9)),)
    positions = {"position_ids": torch.arange(9).repeat(2, 1), "use_cache": False}
    return capture(tiny(kind(**settings)), call, positions, check=False).graph


MODELS = {
    "v2": lambda: captured("deepseek_v2", positions=True),
    "v3": lambda: captured("deepseek_v3", positions=True),
    "v2, one linear for queries": lambda: without_query_latent(DeepseekV2Config),
    "v3, one linear for queries": lambda: without_query_latent(DeepseekV3Config),
}


QUICK = ("v2, one linear for queries", "v3")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.matrix) for name in MODELS]
)
def test_any_cut_over_the_latent(name: str) -> None:
    graph = MODELS[name]()
    (want,) = interpret(graph, inputs(graph, TOKENS))
    latent = verified(after(graph, OVER_LATENT))
    (whole,) = interpret(latent, inputs(graph, TOKENS))
    assert error(whole, want) < 2e-6
    step = verified(after(latent, "kv-cache{slots=4, capacity=20, logits=all}"))
    (kind,) = cache_types(step).values()
    assert kind == CacheType(DType.f32, slots=4, heads=1, capacity=20, key=20, value=16, within=True)
    assert kind.bytes == 4 * 20 * 20 * 4
    for seed in range(2):
        assert error(in_cuts(step, TOKENS, Random(seed)), want) < 1e-5


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_quantized_latents_do_not_depend_on_the_cut(format: str) -> None:
    """The error of the format is as large as for keys and values of each head, within a factor of 2."""
    graph = MODELS["v3"]()
    (want,) = interpret(graph, inputs(graph, TOKENS))
    cached = f"kv-cache{{format={format}, slots=4, capacity=20, logits=all}}"
    one, other = (in_cuts(after(graph, f"{OVER_LATENT}; {cached}"), TOKENS, Random(seed)) for seed in (1, 2))
    assert error(one, other) < 1e-5
    of_heads = in_cuts(after(graph, f"{FRONT}; {cached}"), TOKENS, Random(1))
    assert 0.001 < error(one, want) < 2 * error(of_heads, want)


def test_bytes_of_deepseek_v3() -> None:
    """71 times fewer than those of the keys and values of 128 heads."""
    latent = CacheType(DType.bf16, 1, heads=1, capacity=1, key=512 + 64, value=512, within=True)
    heads = CacheType(DType.bf16, 1, heads=128, capacity=1, key=128 + 64, value=128)
    assert (latent.bytes, heads.bytes, heads.bytes // latent.bytes) == (1152, 81920, 71)
    assert CacheType(FP8_ROW, 1, 1, 1, 576, 512, within=True).bytes == 576 + 4
    assert CacheType(INT8_TENSOR, 1, 1, 1, 576, 512, within=True).bytes == 576


def test_where_keys_and_values_come_from() -> None:
    graph = after(MODELS["v3"](), FRONT)
    (op,) = graph.ops("attention.causal")
    (own, rope), (values,) = parts_of(graph, op["key"]), parts_of(graph, op["value"])
    assert (own.start, own.stop, own.stride, own.offset, own.source.op.name) == (0, 8, 16, 0, "aten.linear")
    assert (rope.start, rope.stop, rope.stride, rope.offset, rope.source.op.name) == (8, 12, 0, 0, "aten.cat")
    assert (values.start, values.stop, values.stride, values.offset, values.source) == (0, 8, 16, 8, own.source)


def test_a_decoder_caches_the_latent_unless_told_otherwise() -> None:
    """The report says what became of the linear, which no scheme quantizes then."""
    model = tiny(DeepseekV3Config(**{**BASE, **LATENT, "first_k_dense_replace": 1}))
    options: dict[str, Any] = {"max_batch": 2, "max_length": 32, "progress": False}
    decoder, of_heads = (qcompiler.decoder(model, latent=latent, **options) for latent in (True, False))
    assert (decoder.memory.cache, of_heads.memory.cache) == (2 * 32 * 20 * 4, 2 * 32 * 4 * (12 + 8) * 4)
    rows, others = ({row.module: row for row in each.report.rows} for each in (decoder, of_heads))
    name = "model.layers.0.self_attn.kv_b_proj"
    assert (rows[name].quantized, others[name].quantized) == (False, True)
    assert rows[name].remark == "its rows for each head multiply queries and sums over the latent instead"
    prompts = [[5, 9, 31, 4], [7, 7], [3, 8, 11, 12, 40, 22]]
    assert [len(each) for each in decoder.generate(prompts, max_new_tokens=4, ignore_eos=True)] == [4, 4, 4]


def test_static_scales_are_those_of_the_latent() -> None:
    """Scales of a checkpoint are those of keys and values of each head, so they are not used."""
    graph = after(MODELS["v3"](), OVER_LATENT)
    (op,) = graph.ops("attention.causal")
    known = f"{op.loc.module} 0.5 0.25"
    graph.calibration = Calibration([inputs(graph, TOKENS)])
    run_pipeline(Pipeline((CacheScales("fp8_static", (known,)),)), graph)
    (op,) = graph.ops("attention.causal")
    assert op.attrs["key_scale"] == op.attrs["value_scale"] != 0.5
    step = verified(after(graph, "kv-cache{format=fp8_static, slots=4, capacity=20, logits=all}"))
    (kind,) = cache_types(step).values()
    assert kind.bytes == 4 * 20 * 20 and len({value for _, value in step.ops("state.cache")[0].operands()}) == 1
    (want,) = interpret(MODELS["v3"](), inputs(graph, TOKENS))
    assert error(in_cuts(step, TOKENS, Random(3)), want) < 0.1
