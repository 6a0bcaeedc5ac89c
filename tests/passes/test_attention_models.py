"""The pass `attention` on tiny random models of transformers, and on attention as people write it by hand."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from causal_models import ALIBI, CHUNKS, MODELS, NO_POSITIONS, WINDOWS, captured
from element_values import At
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel

from passes.analyses.causal_masks import in_range
from passes.analyses.elements import Elements
from qcompiler.capture import capture
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Value, symbol
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import Run, run_pipeline

ONLY_EAGER = ("gemma2", "gpt_oss", "bloom", "mpt")
QUICK = (("llama", "sdpa", True), ("mistral", "eager", False), ("gpt2", "sdpa", False))
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.matrix)
    for case in product(MODELS, ("sdpa", "eager"), (False, True))
    if (case[1] == "eager" or case[0] not in ONLY_EAGER) and not (case[2] and case[0] in NO_POSITIONS)
]


def rewritten(graph: Graph, option: str = "") -> tuple[Graph, Run]:
    after = graph.clone()
    return after, run_pipeline(Pipeline.parse(f"canonicalize; dead-code; attention{option}; dead-code"), after)


def windows(graph: Graph) -> list[Any]:
    """The window of each causal attention."""
    return [op.attrs.get("window") for op in graph.ops() if op.name == "attention.causal"]


def ids(graph: Graph, rows: int, length: int) -> list[Tensor]:
    """Random tokens, and position numbers that begin anywhere, if the graph has that input."""
    torch.manual_seed(length)
    start = torch.tensor([[3], [0], [7]])[:rows]
    start = start * 0 if graph.name.startswith("Llama4") else start  # its chunks begin at multiples of these numbers
    return [torch.randint(0, 64, (rows, length)), start + torch.arange(length)][: len(graph.inputs)]


def assert_equal_outputs(before: Graph, after: Graph, inputs: Sequence[Tensor]) -> None:
    for old, new in zip(interpret(before, inputs), interpret(after, inputs), strict=True):
        assert float((old - new).norm() / old.norm()) < 1e-6


@pytest.mark.parametrize(("kind", "attention", "positions"), CASES)
def test_every_attention_of_a_model_is_recognized(kind: str, attention: str, positions: bool) -> None:
    before = captured(kind, positions=positions, attn_implementation=attention)
    after, _ = rewritten(before, f"{{consecutive=position_ids{', from_zero=true' * (kind in CHUNKS)}}}")
    causal, chunks = after.ops("attention.causal"), CHUNKS.get(kind)
    assert windows(after) == WINDOWS.get(kind, [None] * len(chunks or [None]))
    assert [op.attrs.get("chunk") for op in causal] == (chunks or [None] * len(causal))
    assert all((op.argument("slopes") is not None) == (kind in ALIBI) for op in causal)
    length = before.inputs[0].tensor.shape[1]
    left = [
        op for op in after.ops() for value in op.results if getattr(value.type, "shape", ())[-2:] == (length, length)
    ]
    assert not left, "masks and scores are gone"
    for rows, size in ((3, 11), (2, 6), (2, 2)):
        assert_equal_outputs(before, after, ids(before, rows, size))


def test_packed_positions_are_not_assumed_away() -> None:
    graph = captured("llama", attn_implementation="sdpa", positions=True)
    after, run = rewritten(graph)
    assert windows(after) == []
    (why,) = run.skipped["attention"].values()
    assert "causal only if this input counts up by 1" in why and "%position_ids" in why
    after, run = rewritten(graph, "{consecutive=position_ids}")
    assert "assumed to count up" in "".join(run.remarks.values())
    mask_equals_its_expression(graph)


def name_of(value: Value) -> str:
    return value.name


def mask_equals_its_expression(graph: Graph) -> None:
    """Compares the mask of a graph with packed sequences with its expression, element by element."""
    (mask,) = (op["attn_mask"] for op in graph.ops() if op.name == "aten.scaled_dot_product_attention")
    tensors: dict[str, Tensor] = {}
    inputs = [torch.randint(0, 64, (2, 7)), torch.tensor([[0, 1, 2, 0, 1, 2, 3], [4, 5, 6, 7, 0, 0, 1]])]
    interpret(
        graph, inputs, observe=lambda op, found: tensors.update(zip(map(name_of, op.results), found, strict=True))
    )
    tensors |= dict(zip([value.name for value in graph.inputs], inputs, strict=True))
    names = ("b", "h", "q", "k")
    at = tuple(map(symbol, names))
    element = Elements(graph).element(mask, at, in_range(at, mask.tensor.shape))
    rows, length = (str(size) for size in graph.inputs[0].tensor.shape)
    for index in product(range(2), range(1), range(7), range(7)):
        numbers = At({**dict(zip(names, index, strict=True)), rows: 2, length: 7}, tensors)
        assert numbers.element(element) == int(tensors[mask.name][index])


def test_padding_is_refused_and_named() -> None:
    after, run = rewritten(captured("llama", attn_implementation="sdpa", padded=True))
    assert windows(after) == []
    (why,) = run.skipped["attention"].values()
    assert why.startswith("its mask is causal, but this value hides further keys")


def test_bidirectional_attention_is_refused() -> None:
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model: Any = BertModel(config, add_pooling_layer=False)
    after, run = rewritten(capture(model.eval(), (torch.randint(0, 64, (2, 9)),), check=False).graph)
    assert windows(after) == []
    (why,) = run.skipped["attention"].values()
    assert why.startswith(("it reads all keys: it has no mask", "its mask hides nothing"))


class ByHand(nn.Module):
    """Attention with a triangle that is registered as a buffer, as in many small models."""

    mask: Tensor

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.qkv = form, nn.Linear(32, 96)
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (part.view(rows, length, 4, 8).transpose(1, 2) for part in self.qkv(x).split(32, 2))
        mask = self.mask[:, :, :length, :length]
        scores = q @ k.transpose(-2, -1)
        if self.form == "fill":
            weights = functional.softmax((scores / 8**0.5).masked_fill(mask == 0, float("-inf")), -1)
        elif self.form == "add":
            weights = functional.softmax(8**-0.5 * scores + (1.0 - mask) * -1e9, -1)
        else:
            weights = functional.softmax(torch.where(mask.bool(), scores, torch.finfo(x.dtype).min), -1)
        mixed: Tensor = weights @ v
        return mixed.transpose(1, 2).reshape(rows, length, 32)


@pytest.mark.parametrize("form", ["fill", "add", "where"])
def test_a_stored_triangle_is_recognized(form: str) -> None:
    torch.manual_seed(0)
    graph = capture(ByHand(form).eval(), (torch.randn(2, 9, 32),), check=False).graph
    after, _ = rewritten(graph)
    assert windows(after) == [None]
    assert_equal_outputs(graph, after, [torch.randn(3, 7, 32)])
    graph.weights = {**graph.weights, "mask": torch.triu(torch.ones(1, 1, 16, 16))}
    assert windows(rewritten(graph)[0]) == [], "what counts is the data"
