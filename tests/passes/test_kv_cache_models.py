"""The pass kv-cache on tiny models of transformers: any cut into calls gives the logits of the whole sequence."""

from random import Random

import pytest
import torch
from causal_models import MODELS, NO_POSITIONS, captured, inputs
from cut_calls import after, error, in_cuts

from qcompiler.interpreter import interpret
from qcompiler.schemes.named import pipeline
from qcompiler.testing import verified

LENGTH = 10
FRONT = "canonicalize; dead-code; attention{consecutive=position_ids, from_zero=true}; dead-code"
QUICK = (("gemma3_text", False), ("gpt2", True), ("mixtral", False))


def kinds(*quick: tuple[str, bool]) -> list[object]:
    return [
        pytest.param(kind, positions, marks=() if (kind, positions) in quick else pytest.mark.matrix)
        for kind in MODELS
        for positions in ((False,) if kind in NO_POSITIONS else (False, True))
    ]


@pytest.mark.parametrize(("kind", "positions"), kinds(*QUICK))
def test_any_cut_of_any_model(kind: str, positions: bool) -> None:
    graph, random = captured(kind, positions=positions), Random(kind)
    tokens = torch.randint(3, 64, (3, LENGTH), generator=torch.Generator().manual_seed(5))
    (want,) = interpret(graph, inputs(graph, tokens))
    every = verified(after(graph, f"{FRONT}; kv-cache{{slots=4, capacity={2 * LENGTH}, logits=all}}"))
    for _ in range(2):
        assert error(in_cuts(every, tokens, random), want) < 1e-5
    last = verified(after(graph, f"{FRONT}; kv-cache{{slots=4, capacity={2 * LENGTH}}}"))
    zero, ends = torch.zeros(3, dtype=torch.int64), torch.tensor([2, 9, 6])
    (got,) = interpret(last, [tokens, torch.arange(3), zero, ends])
    assert error(got, want[torch.arange(3), ends]) < 1e-5


@pytest.mark.parametrize(("kind", "positions"), kinds(("llama", True)))
def test_any_cut_of_a_quantized_model(kind: str, positions: bool) -> None:
    """Rounding of attention may change single codes, so a few codes make the error, not quantization."""
    graph = captured(kind, positions=positions)
    tokens = torch.randint(3, 64, (2, LENGTH), generator=torch.Generator().manual_seed(6))
    quantized = after(graph, f"{FRONT}; {pipeline('fp8_tile')}")
    (want,), (exact,) = interpret(quantized, inputs(graph, tokens)), interpret(graph, inputs(graph, tokens))
    every = verified(after(quantized, f"kv-cache{{slots=4, capacity={2 * LENGTH}, logits=all}}"))
    found = error(in_cuts(every, tokens, Random(1)), want)
    assert found < 0.3 * error(want, exact)
