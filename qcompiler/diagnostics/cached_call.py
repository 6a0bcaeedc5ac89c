"""Calls that error attribution compares for a decoder: whole sequences, through empty caches of their size.

llm.program: ids, slots, lengths, last -> logits [B, V]      ->      ids, slots, lengths -> logits [B, S, V], unfused
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from passes.attention.kv_cache import CAUSAL, SCALES, KvCache
from qcompiler.decoding.cached import cache_passes
from qcompiler.diagnostics.measured_call import Call
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Role
from qcompiler.pass_manager.pipeline import Pass, Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.program.batches import as_call
from qcompiler.program.program import Program
from qcompiler.report.report import unfused
from qcompiler.runtime.caches import cache_types

NEED = "token ids i64[batch, length], two tokens or more per row, without padding"


def kv_cache_of(program: Program) -> KvCache:
    """Returns the pass that gave a decoder's program its caches."""
    (found,) = (step for step in program.settings.passes if isinstance(step, KvCache))
    return found


def before_cache(program: Program) -> Graph:
    """Returns the last stage before layers are fused and before attention reads a cache; without weights."""
    return [graph for graph in unfused(program.stages.values()) if not cache_types(graph)][-1]


def steps_before_cache(program: Program) -> tuple[Pass, ...]:
    """Returns the passes that a decoder runs on any graph before `kv-cache`; they change nothing if they ran before."""
    return tuple(step for step in _cache_steps(program, 1, 1) if not isinstance(step, KvCache))


def token_call(batch: Any, program: Program) -> dict[str, Tensor]:
    """Returns a call of the model of a decoder by name: token ids, and positions that count up if it takes some.

    Raises:
        InputError: The batch is something else than token ids without padding, or too long for the caches.
    """
    cached = kv_cache_of(program)
    args, kwargs = as_call(batch)
    given = dict(kwargs)
    ids = given.pop(cached.ids, args[0] if len(args) == 1 else None)
    mask = given.pop("attention_mask", None)
    if given or len(args) > 1 or not isinstance(ids, Tensor) or ids.dtype is not torch.int64 or ids.dim() != 2:
        raise InputError("the batch of a decoder is wrong", got=_described(batch), need=NEED)
    if ids.shape[0] < 1 or not 1 < ids.shape[1] <= cached.capacity:
        need = f"one row or more, of 2 to {cached.capacity} tokens"
        raise InputError("the batch of a decoder has a wrong size", got=list(ids.shape), need=need)
    if mask is not None and not bool(mask.all()):
        raise InputError("the batch of a decoder is padded", got="zeros in attention_mask", need=NEED)
    ids = ids.to(program.device)
    call = {cached.ids: ids}
    if cached.positions in [value.name for value in before_cache(program).inputs]:
        call[cached.positions] = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape).contiguous()
    return call


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"arguments {', '.join(map(str, batch)) or '(none)'}"
    return f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__


def cached_call(program: Program, call: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Call:
    """Returns the call of a decoder's unfused graph that begins one sequence per row, and gives all logits.

    Args:
        program: The program of a decoder.
        call: The result of `token_call`.
        weights: Weights that the program no longer holds, because later passes replaced them.
    """
    ids = call[kv_cache_of(program).ids]
    graph = before_cache(program).clone()
    held = program.graph.weights
    names = [str(op.attrs["name"]) for op in graph.ops() if op.role is Role.STATE]
    graph.weights = {name: held[name] if name in held else weights[name] for name in names}
    *steps, cache = _cache_steps(program, *ids.shape)
    run_pipeline(Pipeline(tuple(steps)), graph)
    _set_scales(graph, program)
    run_pipeline(Pipeline((cache,)), graph)
    slots = torch.arange(ids.shape[0], device=ids.device)
    return Call(graph, [ids, slots, torch.zeros_like(slots)])


def _cache_steps(program: Program, slots: int, capacity: int) -> tuple[Pass, ...]:
    """Returns the passes that made the caches of a program, for caches of another size and for all logits."""
    cached = kv_cache_of(program)
    every: Any = replace(cached, slots=slots, capacity=capacity, chunk=None, logits="all", start=False)
    steps = cache_passes(cached.format, slots, capacity).passes
    at = next(index for index, step in enumerate(steps) if isinstance(step, KvCache))
    return (*steps[:at], every)


def _set_scales(graph: Graph, program: Program) -> None:
    """Copies the static scales of attentions, which a pass after the fusing ones sets."""
    names = [*program.stages]
    at = next(index for index, name in enumerate(names) if name.partition("#")[0] == KvCache.name)
    for op in program.stages[names[at - 1]].ops(CAUSAL):
        scales = {name: op.attrs[name] for name in SCALES if name in op.attrs}
        same = graph[op.result.name].op
        graph.set_args(same, same.args, {**same.attrs, **scales})
