"""Layers with windows keep the latest positions in rings: equal bits as with all positions, and fewer bytes."""

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from causal_models import CHUNKS, WINDOWS, captured, inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler.errors import InputError, QCompilerError
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.runtime.caches import allocate, cache_types, rings
from qcompiler.testing import verified

FRONT = "canonicalize; dead-code; attention; dead-code"
LENGTH, CHUNK, SLOTS = 45, 5, 2
FORMATS = ("", "format=fp8, ", "format=int8, ")
Pieces = Sequence[Sequence[int]]
"""Sequence -> sizes of its calls."""


@cache
def with_caches(kind: str, options: str, sizes: str = f"slots={SLOTS}, capacity={LENGTH + CHUNK}") -> Graph:
    made = captured(kind).clone()
    run_pipeline(Pipeline.parse(f"{FRONT}; kv-cache{{{options}{sizes}, logits=all}}"), made)
    return verified(made)


def run(step: Graph, tokens: Tensor, plan: Pieces) -> tuple[list[Tensor], list[Tensor]]:
    """All logits of each call, and those of each sequence; sequence i is the next one in slot i % SLOTS."""
    caches = {name: allocate(kind, "cpu") for name, kind in cache_types(step).items()}
    waiting = [
        [
            (row, sum(plan[row][:at]), count)
            for row in range(slot, len(plan), SLOTS)
            for at, count in enumerate(plan[row])
        ]
        for slot in range(SLOTS)
    ]
    calls, found = [], [list[Tensor]() for _ in plan]
    while any(waiting):
        slots = [slot for slot in range(SLOTS) if waiting[slot]]
        now = [waiting[slot].pop(0) for slot in slots]
        padded = torch.full((len(now), max(count for _, _, count in now)), 9)
        for at, (row, start, count) in enumerate(now):
            padded[at, :count] = tokens[row, start : start + count]
        starts = torch.tensor([start for _, start, _ in now])
        (out,) = interpret(step, [padded, torch.tensor(slots), starts], caches=caches)
        calls.append(out)
        for at, (row, _, count) in enumerate(now):
            found[row].append(out[at, :count])
    return calls, [torch.cat(each) for each in found]


PLANS = st.lists(st.lists(st.integers(1, CHUNK), min_size=1, max_size=LENGTH // CHUNK), min_size=1, max_size=4)
LONG: Pieces = [[1] * LENGTH, [CHUNK] * 9, [3, 1, 5, 2] * 2, [2] * 20]
"""Token by token, whole chunks, others; the second sequences of both slots begin at different calls."""


def compare(kind: str, options: str, plan: Pieces) -> float:
    """The error against the whole sequence, after both kinds of caches gave equal bits."""
    tokens = torch.randint(3, 64, (len(plan), LENGTH), generator=torch.Generator().manual_seed(len(plan)))
    full, ring = with_caches(kind, options), with_caches(kind, f"{options}chunk={CHUNK}, ")
    calls, rows = run(ring, tokens, plan)
    assert all(torch.equal(got, want) for got, want in zip(calls, run(full, tokens, plan)[0], strict=True))
    graph = captured(kind)
    (want,) = interpret(graph, inputs(graph, tokens))
    return max(
        float((got - every[: len(got)]).norm() / every[: len(got)].norm())
        for got, every in zip(rows, want, strict=True)
    )


KINDS = [*(kind for kind, windows in WINDOWS.items() if any(windows)), *CHUNKS]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "mistral" else pytest.mark.matrix) for kind in KINDS]
)
def test_token_by_token_and_in_chunks(kind: str) -> None:
    """Sequences that are several times as long as the ring, in slots that are used twice."""
    assert compare(kind, "", LONG) < 1e-5


@given(plan=PLANS, format=st.sampled_from(FORMATS))
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_cut(plan: Pieces, format: str) -> None:
    assert compare("mistral", format, plan) < (0.1 if format else 1e-5)


def test_only_layers_with_windows_have_rings() -> None:
    kinds = cache_types(with_caches("gemma3_text", "", f"slots=3, capacity=1024, chunk={CHUNK}")).values()
    assert [kind.ring for kind in kinds] == [16, None]  # 4 - 1 + 5, rounded up
    row = 3 * 2 * (8 + 8) * 4  # slots, heads, key and value of 8 numbers in FP32
    assert [kind.bytes for kind in kinds] == [16 * row, 1024 * row]
    (ring,) = rings(with_caches("mistral", f"chunk={CHUNK}, "))
    assert (ring.held, ring.window, ring.chunk) == (16, 4, 13)


def test_calls_longer_than_the_ring_allows_are_refused() -> None:
    step = with_caches("mistral", f"chunk={CHUNK}, ")
    zero = torch.zeros(1, dtype=torch.int64)
    interpret(step, [torch.ones(1, 13, dtype=torch.int64), zero, zero])
    problem = "a call has more tokens than the ring of a cache allows: got 14 tokens per row; need at most 13"
    with pytest.raises(QCompilerError, match=problem) as raised:
        interpret(step, [torch.ones(1, 14, dtype=torch.int64), zero, zero])
    assert isinstance(raised.value.__cause__, InputError)
