"""The pass `position-tables` on BERT as a decoder, whose positions and token types are slices of stored rows."""

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from passes.analyses.sequence import Refused, Sequence, analyze
from qcompiler.capture import capture
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.runtime.caches import allocate, cache_types

FRONT = "canonicalize; attention{consecutive=position_ids}; dead-code"


@pytest.fixture(scope="module", params=[False, True], ids=["computed", "given"])
def bert(request: pytest.FixtureRequest) -> Graph:
    torch.manual_seed(0)
    config: Any = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, is_decoder=True,
    )  # fmt: skip
    keywords: dict[str, Any] = {"use_cache": False}
    if request.param:
        keywords["position_ids"] = torch.arange(9).repeat(2, 1)
    model: Any = BertLMHeadModel(config)
    graph = capture(model.eval(), (torch.randint(1, 64, (2, 9)),), keywords, check=False).graph
    run_pipeline(Pipeline.parse(FRONT), graph)
    return graph


def given(graph: Graph, tokens: torch.Tensor) -> list[torch.Tensor]:
    return [tokens, torch.arange(tokens.shape[1]).expand_as(tokens)][: len(graph.inputs)]


def test_stored_rows_become_position_numbers(bert: Graph) -> None:
    assert isinstance(analyze(bert), Refused)
    after = bert.clone()
    run_pipeline(Pipeline.parse("position-tables; dead-code"), after)
    assert isinstance(analyze(after), Sequence)
    tokens = torch.randint(1, 64, (3, 7))
    (want,), (got,) = (interpret(graph, given(graph, tokens)) for graph in (bert, after))
    assert torch.equal(got, want)


def test_token_by_token_equals_whole_sequences(bert: Graph) -> None:
    step = bert.clone()
    run_pipeline(Pipeline.parse("position-tables; dead-code; kv-cache{slots=2, capacity=8}; dead-code"), step)
    tokens, slots = torch.randint(1, 64, (2, 8)), torch.arange(2)
    (want,) = interpret(bert, given(bert, tokens))
    caches = {name: allocate(kind, torch.device("cpu")) for name, kind in cache_types(step).items()}
    for at in range(8):
        inputs = [tokens[:, at : at + 1], slots, torch.full((2,), at), torch.zeros(2, dtype=torch.int64)]
        (got,) = interpret(step, inputs, caches=caches)
        torch.testing.assert_close(got, want[:, at], rtol=1e-5, atol=1e-5)


def test_other_stored_numbers_are_not_positions(bert: Graph) -> None:
    """What counts is the data."""
    graph = bert.clone()
    types = next(name for name in bert.weights if name.endswith("token_type_ids"))
    graph.weights = {**bert.weights, types: torch.arange(32)[None] % 2}
    run_pipeline(Pipeline.parse("position-tables; dead-code"), graph)
    assert isinstance(analyze(graph), Refused)
