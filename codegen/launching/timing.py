"""Compares launch times on a GPU: CUDA-graph replays exclude Python overhead and launch gaps."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

Key = TypeVar("Key")


def in_turns(
    launches: Mapping[Key, Sequence[Callable[[], object]]], *, rounds: int = 5, budget: float = 4.0, most: int = 400
) -> dict[Key, float]:
    """Microseconds of one launch of each, the median over rounds in which each replays a graph once.

    The functions take turns, because a device at its power limit gives the first one a higher clock.

    Args:
        launches: Name -> functions that only enqueue work on the current stream, such as one GEMM with several weights
            too large for two to share the cache. They must keep their operands alive: a graph does not.
        rounds: Number of rounds.
        budget: Approximate milliseconds of work in a graph.
        most: Maximum launches in a graph, unless one pass through the functions has more.
    """
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graphs = {}
    for key, turn in launches.items():
        for _ in range(2):  # the first may compile
            start.record()
            for launch in turn:
                launch()
            stop.record()
            torch.cuda.synchronize()
        repeats = max(1, min(most // len(turn), int(budget / max(start.elapsed_time(stop), 1e-3))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in list(turn) * repeats:
                launch()
        graph.replay()
        graphs[key] = graph, repeats * len(turn)
    times: dict[Key, list[float]] = {key: [] for key in graphs}
    for _ in range(rounds):
        for key, (graph, count) in graphs.items():
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times[key].append(1e3 * start.elapsed_time(stop) / count)
    return {key: statistics.median(each) for key, each in times.items()}
