"""Runs a graph with key-value caches over sequences that are cut into calls, each row at its own places."""

from itertools import pairwise
from random import Random

import torch
from torch import Tensor

from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.runtime.caches import allocate, cache_types


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
