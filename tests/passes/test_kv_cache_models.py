"""The pass kv-cache on tiny models of transformers: any cut into calls gives the logits of the whole sequence."""

from itertools import pairwise
from random import Random

import pytest
import torch
from causal_models import MODELS, captured, inputs
from torch import Tensor

from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.runtime.caches import allocate, cache_types
from qcompiler.schemes.named import pipeline
from qcompiler.testing import verified

LENGTH = 10
FRONT = "canonicalize; dead-code; attention{consecutive=position_ids}; dead-code"
QUICK = (("gemma3_text", False), ("gpt2", True), ("mixtral", False))


def kinds(*quick: tuple[str, bool]) -> list[object]:
    return [
        pytest.param(kind, positions, marks=() if (kind, positions) in quick else pytest.mark.matrix)
        for kind in MODELS
        for positions in (False, True)
    ]


def after(graph: Graph, passes: str) -> Graph:
    made = graph.clone()
    run_pipeline(Pipeline.parse(passes), made)
    return made


def in_cuts(step: Graph, tokens: Tensor, random: Random) -> Tensor:
    """The logits of all tokens: each row is cut at its own places, and shorter rows are padded on the right."""
    caches = {name: allocate(kind, "cpu") for name, kind in cache_types(step).items()}
    rows, length = tokens.shape
    logits: list[list[Tensor]] = [[] for _ in range(rows)]
    cuts = [[0, *sorted(random.sample(range(1, length), random.randint(2, length - 1))), length] for _ in range(rows)]
    parts = [list(pairwise(each)) for each in cuts]
    while any(parts):
        live = [row for row in range(rows) if parts[row]]
        spans = {row: parts[row].pop(0) for row in live}
        width = max(end - start for start, end in spans.values())
        padded = torch.zeros(len(live), width, dtype=torch.int64)
        for at, (start, end) in enumerate(spans.values()):
            padded[at, : end - start] = tokens[live[at], start:end]
        lengths = torch.tensor([start for start, _ in spans.values()])
        (out,) = interpret(step, [padded, torch.tensor(live) + 1, lengths], caches=caches)
        for at, (start, end) in enumerate(spans.values()):
            logits[live[at]].append(out[at, : end - start])
    return torch.stack([torch.cat(each) for each in logits])


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


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
