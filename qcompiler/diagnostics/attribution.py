"""Error attribution: the own, inherited and kernel error of each quantized operation.

    print(qcompiler.attribute_error(fast, batch))
    print(qcompiler.attribute_error(llm, ids))         a decoder: also the keys and the values of each cache

Each number is a signal-to-noise ratio in dB, 10 · log10(|y|² / |y' - y|²), over the operation's output y in the float
model. Higher is better; infinity means equal:

    own          y' is the quantized operation on the float model's input: the error of its own quantization
    inherited    y' is the float operation on the quantized model's input: the error from upstream operations
    kernel       y and y' are the reference and the kernel on equal input: the error of code generation
    outputs      y and y' are the model's outputs without and with this quantization alone; only on request
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, takewhile
from typing import Any

import torch

from passes.attention.cache_scales import CacheScales
from passes.quantizing.calibrate import Calibrate
from qcompiler.diagnostics.cache_errors import attentions, cache_errors
from qcompiler.diagnostics.cached_call import cached_call, steps_before_cache, token_call
from qcompiler.diagnostics.error_report import ErrorReport, ErrorRow
from qcompiler.diagnostics.linear_errors import linear_errors, quantized_linears
from qcompiler.diagnostics.measured_call import Call, Measured
from qcompiler.diagnostics.whole_program import whole_program
from qcompiler.errors import InputError, PassError
from qcompiler.ir import Graph
from qcompiler.ir.graph import PARAM
from qcompiler.pass_manager.pipeline import Effect, Pass, Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.program.batches import as_call
from qcompiler.program.program import HasProgram, Program, capture_model
from qcompiler.runtime.caches import cache_types


def attribute_error(compiled: HasProgram, batch: Any, model: Any = None, *, outputs: bool = False) -> ErrorReport:
    """Computes the own, inherited and kernel error of each quantized operation, on one real call.

    Captures the float model again, because a compiled model does not keep the float weights.

    Args:
        compiled: The result of `qcompiler.compile`, or a decoder, which has two more rows for each cache: one for keys,
            one for values.
        batch: A tensor, a tuple of arguments, or a dict of arguments by name; for a decoder, token ids i64[B, S]
            without padding.
        model: The float model; by default the original model, if it is still in memory.
        outputs: Whether to measure also what each row alone does to the model's outputs. This runs the whole float
            model once per row.

    Raises:
        InputError: The float model has been freed, or is another one; or the batch does not match the signature.
        PassError: The pipeline does not fuse quantized linears, and has no cache.
        QCompilerError: The model is sharded.
    """
    program = whole_program(compiled, "cannot be compared with the float model")
    model = program.original.again() if model is None else model
    if model is None:
        fix = "Keep the original model, or pass it: attribute_error(compiled, batch, model)."
        raise InputError("the float model has been freed", fix=fix)
    calls = _decoder_calls if cache_types(program.graph) else _calls
    quantized, exact = calls(program, batch, model)
    linears, caches = quantized_linears(quantized.graph), attentions(quantized.graph)
    if not linears and not caches:
        need = "a pipeline with fuse-linear in it"
        raise PassError("the graph has no fused quantized linear to attribute errors to", need=need)
    with torch.no_grad():
        found = chain(linear_errors(quantized, exact, linears), cache_errors(quantized, exact, caches))
        rows = [*(_with_outputs(found, exact) if outputs else (each.row for each in found))]
    return ErrorReport(tuple(sorted(rows, key=lambda row: row.own)))


def _with_outputs(found: Iterable[Measured], exact: Call) -> Iterator[ErrorRow]:
    for each in found:
        yield replace(each.row, outputs=exact.error_of_outputs({each.value: each.got}))


def _calls(program: Program, batch: Any, model: Any) -> tuple[Call, Call]:
    """Returns a call of the quantized graph and of the float model."""
    args, kwargs = as_call(batch)
    float_call = _float_call(program, args, kwargs, model, ())
    inputs = program.signature.flatten(args, kwargs)
    return Call(program.unfused(), inputs), Call(float_call.graph, inputs)


def _decoder_calls(program: Program, batch: Any, model: Any) -> tuple[Call, Call]:
    """Returns a call of the quantized graph over empty caches, and of the float model over whole sequences."""
    call = token_call(batch, program)
    exact = _float_call(program, (), call, model, steps_before_cache(program))
    return cached_call(program, call, exact.graph.weights), exact


def _float_call(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], model: Any, more: tuple[Pass, ...]
) -> Call:
    """Returns a call of the float model before the first quantizing pass: smoothed, but not quantized."""
    captured = capture_model(model, args, kwargs, program.settings)
    _check_same(captured.graph, program.stages["captured"])
    captured.graph.calibration = program.calibration()
    steps = takewhile(lambda step: step.effect is not Effect.LOSSY, program.settings.passes)
    # Calibration is already done; statistics of smoothed values would matter only to quantizing passes.
    passes = Pipeline((*(step for step in steps if not isinstance(step, Calibrate | CacheScales)), *more))
    run_pipeline(passes, captured.graph)
    return Call(captured.graph, captured.signature.flatten(args, kwargs))


def _check_same(given: Graph, compiled: Graph) -> None:
    """Raises InputError if weights of the same name have different shapes; their dtypes may differ."""
    found, wanted = ({str(op.attrs["name"]): op.result.tensor for op in each.ops(PARAM)} for each in (given, compiled))
    for name, want in wanted.items():
        if name in found and found[name].shape != want.shape:
            got, need = f"{name}: {found[name]}", f"{name}: {want}"
            raise InputError("the model is not the one that was compiled", got=got, need=need)
