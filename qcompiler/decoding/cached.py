"""From a program of whole sequences to one that appends to a KV cache.

ids [B, S] -> logits [B, S, V]     ->     ids, slots, lengths, last -> logits [B, V], over caches
"""

from dataclasses import replace
from functools import partial
from typing import Any, get_args, get_type_hints

from passes.attention.attention import Attention
from passes.attention.kv_cache import KvCache
from passes.attention.position_tables import PositionTables
from passes.cleanup.dead_code import DeadCode
from qcompiler.decoding.loop import CHUNK
from qcompiler.errors import InputError, PassError, did_you_mean
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pipeline, numbered
from qcompiler.pass_manager.runner import Stages, run_pipeline
from qcompiler.program.program import Program, generate, graph_as_captured, plain_torch
from qcompiler.runtime.caches import cache_types
from qcompiler.runtime.device import target_named

POSITIONS = "position_ids"
"""The input that the cache replaces by positions that count up."""

FORMATS: tuple[str, ...] = tuple(
    name for kind in get_args(get_type_hints(KvCache)["format"]) for name in get_args(kind)
)
"""Formats of cached keys and values, besides the model's dtype."""


def keeps_cache(graph: Graph) -> bool:
    """Whether a graph reads KV caches."""
    return bool(cache_types(graph))


def with_cache(program: Program, kv_cache: str | None, slots: int, capacity: int, chunk: int = CHUNK) -> Program:
    """Returns a program of one step, which returns the logits of one token per row; `program` is not changed.

    Args:
        program: A causal language model over whole sequences.
        kv_cache: The format of cached keys and values; None for the model's own dtype.
        slots: Sequences that the cache holds.
        capacity: Positions of each sequence.
        chunk: Largest number of tokens of a row in one call.

    Raises:
        PassError: The model is not causal, or its attention was not recognized; the message names the operation.
    """
    program = _before_target(program)
    return _after(program, _built(program.graph, cache_passes(kv_cache, slots, capacity, chunk), program))


def _before_target(program: Program) -> Program:
    """Returns a program before the passes of its target, which run again after `kv-cache`; the host module remains."""
    of_target = {step.name for step in Pipeline.parse(target_named(program.target).passes)}
    names = list(program.stages)
    kept = names[: next(at for at in range(len(names), 0, -1) if names[at - 1].partition("#")[0] not in of_target)]
    if kept == names:
        return program
    stages = Stages()
    for name in kept:
        stages.add_later(name, partial(program.stages.__getitem__, name))
    graph = stages[kept[-1]].clone()
    graph.weights = program.graph.weights
    steps = tuple(step for step in program.steps if step.stage in kept)
    passes = "; ".join(step.spec for step in steps)
    return replace(
        program, graph=graph, stages=stages, steps=steps, settings=replace(program.settings, pipeline=passes)
    )


def cache_passes(kv_cache: str | None, slots: int, capacity: int, chunk: int = CHUNK) -> Pipeline:
    """Returns the passes that `with_cache` runs.

    Raises:
        PassError: The format is unknown.
        InputError: A size is not positive.
    """
    for name, value in (("max_batch", slots), ("max_length", capacity), ("max_chunk", chunk)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is wrong", got=repr(value), need="1 or more")
    if kv_cache is not None and kv_cache not in FORMATS:
        raise PassError(
            "there is no such format of a cache", got=repr(kv_cache), fix=did_you_mean(str(kv_cache), FORMATS)
        )
    form: Any = kv_cache  # one of them, as the type of the option says
    cached = KvCache(form, slots, capacity, chunk, start=True)
    return Pipeline(
        (Attention(consecutive=POSITIONS, from_zero=True), PositionTables(), DeadCode(), cached, DeadCode())
    )


def chunk_of(program: Program) -> int:
    """Returns the `chunk` of `with_cache`."""
    chunk = getattr(_cache_pass(program)[1], "chunk", None)
    return chunk if isinstance(chunk, int) else CHUNK


def every_logits(program: Program) -> Program:
    """Returns the program of a step which returns the logits of all tokens; for a program of `with_cache`."""
    stage, cached = _cache_pass(program)
    names = list(program.stages)
    graph = program.stages[names[names.index(stage) - 1]].clone()
    graph.weights = program.graph.weights
    every: Any = replace(cached, **{"logits": "all"})
    return _built(graph, Pipeline((every,)).append("dead-code"), program)


def _cache_pass(program: Program) -> tuple[str, Any]:
    """The stage of the pass `kv-cache`, and the pass with its options."""
    step = next(step for step in reversed(program.steps) if step.stage.partition("#")[0] == KvCache.name)
    return step.stage, Pipeline.parse(step.spec).passes[0]


def _built(graph: Graph, passes: Pipeline, program: Program) -> Program:
    """Runs passes, then the passes of the target, over a copy of a graph, and generates the host module.

    The result is called with the inputs of its graph, which the passes changed. It has the report of `program`, since
    the passes quantize no weights.
    """
    new, passes = graph.clone(), passes.append(target_named(program.target).passes)
    with plain_torch():
        done = run_pipeline(passes, new)
    host, run = generate(new, program.target)
    return replace(
        program, graph=new, stages=done.stages, steps=done.steps, skipped=done.skipped, host=host, run=run,
        signature=graph_as_captured(new).signature, settings=replace(program.settings, pipeline=passes),
    )  # fmt: skip


def _after(program: Program, made: Program) -> Program:
    """Returns `made` with the stages of `program`, from whose last graph it was made, before its own."""
    stages, renamed = Stages(), {}
    for name in program.stages:
        stages.add_later(name, partial(program.stages.__getitem__, name))
    for step in made.steps:
        renamed[step.stage] = numbered(step.stage.partition("#")[0], stages)
        stages.add_later(renamed[step.stage], partial(made.stages.__getitem__, step.stage))
    steps = tuple(replace(step, stage=renamed[step.stage]) for step in made.steps)
    skipped = {renamed.get(stage, stage): reasons for stage, reasons in made.skipped.items()}
    return replace(
        made, stages=stages, steps=(*program.steps, *steps), skipped={**program.skipped, **skipped},
        settings=replace(program.settings, pipeline=f"{program.settings.pipeline}; {made.settings.pipeline}"),
    )  # fmt: skip
