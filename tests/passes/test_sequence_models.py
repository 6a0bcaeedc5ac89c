"""Causality of tiny random models of transformers: proven, and equal in every bit when a later token changes."""

from functools import cache
from typing import Any

import pytest
import torch
from causal_models import ALIBI, BASE, MODELS, captured
from token_lanes import values_of, wrong_values
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from passes.analyses.sequence import Refused, Sequence, analyze
from qcompiler.capture import capture
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.schemes.named import pipeline

QUICK = ("llama", "gpt2", "qwen3_moe")
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.matrix) for name in MODELS]

ATTENTION = "canonicalize; dead-code; attention; dead-code"
TOKENS = ((0, 8), (1, 4), (0, 1))
"""Rows and positions of tokens that change."""


@cache
def recognized(kind: str) -> Graph:
    # Other routes to experts would change the shapes of their matmuls, and the rounding.
    graph = captured(kind, spread=False).clone()
    run_pipeline(Pipeline.parse(ATTENTION), graph)
    return graph


def quantized(kind: str, scheme: str) -> Graph:
    graph = recognized(kind).clone()
    run_pipeline(pipeline(scheme), graph)
    return graph


def check_causal(graph: Graph) -> Sequence:
    """Checks that no element of an earlier position or of another row changes in any bit with a token."""
    found = analyze(graph)
    assert isinstance(found, Sequence), str(found)
    ids = torch.randint(0, 64, (2, 9))
    for row, place in TOKENS:
        assert not wrong_values(graph, found, ids, row, place, causal=True)
    return found


@pytest.mark.parametrize("kind", ALL)
def test_a_decoder_is_causal(kind: str) -> None:
    graph = recognized(kind)
    found = check_causal(graph)
    assert str(found.labels[graph[str(graph.outputs[0]).strip("%")]]) == "[batch, positions, 64]"
    (last,) = found.tokens
    assert [str(size) for size in last.tensor.shape] == ["s0", "s1", "32"]
    values = values_of(graph, [torch.randint(0, 64, (2, 9))])
    assert bool(found.positions) == (kind not in ALIBI)
    for value, offset in found.positions.items():
        axis = [bool(axis) and axis[0].kind == "positions" for axis in found.labels[value].axes].index(True)
        want = torch.arange(offset, 9 + offset).reshape([-1, *[1] * (values[value].dim() - axis - 1)])
        assert torch.equal(values[value], want.to(values[value].dtype).expand_as(values[value])), value


@pytest.mark.parametrize("kind", ALL)
def test_a_decoder_with_tiles_is_causal(kind: str) -> None:
    check_causal(quantized(kind, "fp8_tile"))


@pytest.mark.parametrize("scheme", ["fp8_tensor", "int8_tensor"])
def test_one_dynamic_scale_for_all_tokens_is_not_causal(scheme: str) -> None:
    found = analyze(quantized("llama", scheme))
    assert isinstance(found, Refused)
    assert "is computed from all tokens, so later tokens change earlier results" in found.why
    assert found.op.loc.file and found.op.loc.line


def test_an_encoder_that_slices_its_position_table_is_refused() -> None:
    torch.manual_seed(0)
    model: Any = BertModel(BertConfig(**{**BASE, "num_key_value_heads": 4}))
    graph = capture(model.eval(), (torch.randint(0, 64, (2, 9)),), {}, check=False).graph
    run_pipeline(Pipeline.parse(ATTENTION), graph)
    found = analyze(graph)
    assert isinstance(found, Refused) and found.op.loc.file.endswith("modeling_bert.py")
    assert "keeps s1 of 64 elements of a table: its result depends on the number of positions" in found.why


@pytest.mark.matrix
def test_a_convolution_over_positions_is_refused() -> None:
    found = analyze(recognized("lfm2"))
    assert isinstance(found, Refused) and found.why == "aten.conv1d convolves over the positions"
    assert found.op.loc.file.endswith("modeling_lfm2.py")


@pytest.mark.matrix
def test_an_encoder_is_refused() -> None:
    sizes: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model: Any = T5ForConditionalGeneration(T5Config(**sizes))
    ids = torch.randint(0, 64, (2, 9))
    graph = capture(model.eval(), (ids,), {"decoder_input_ids": ids, "use_cache": False}, check=False).graph
    run_pipeline(Pipeline.parse(ATTENTION), graph)
    assert isinstance(analyze(graph), Refused)
