"""`compile`: capture, run the pipeline, generate the host module; and the callable that comes of it.

model -> capture -> Graph -> passes -> Graph -> host module -> CompiledModel
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from passes.calibrate import Calibrate
from qcompiler import knobs
from qcompiler.calibration import Calibration
from qcompiler.capture.preflight import check_model
from qcompiler.capture.stored_weights import knows_x_scales
from qcompiler.checkpoints.loading import load_model
from qcompiler.checkpoints.reading import read as read_checkpoint
from qcompiler.compiler.batches import Batches
from qcompiler.compiler.forward import class_with, describe_forward
from qcompiler.compiler.layer_names import check_layer_names
from qcompiler.compiler.model import CompiledModel
from qcompiler.compiler.program import Program, Settings, build_program, capture_model
from qcompiler.dialects.quant import x_scale_of
from qcompiler.errors import CaptureError, PassError
from qcompiler.instruments import Dump, Instrument, PrintAfter, TimePasses
from qcompiler.ir import Graph
from qcompiler.pass_manager import Pipeline
from qcompiler.progress import Progress
from qcompiler.runtime.device import check_target
from qcompiler.schemes import pipeline as scheme_pipeline
from qcompiler.schemes import with_ignored

__all__ = ["CompiledModel", "Program", "Settings", "brings_scales", "compile"]

DEFAULT_SCHEME = "fp8_tile"


def compile(
    model: "torch.nn.Module | ExportedProgram | Graph | str | PathLike[str]",
    *,
    scheme: str = DEFAULT_SCHEME,
    overrides: Mapping[str, str | None] | None = None,
    ignore: Sequence[str] = (),
    calibration: "Iterable[Any] | Calibration | None" = None,
    pipeline: "Pipeline | str | None" = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = "auto",
    target: str = "auto",
    strict: bool = True,
    instruments: Sequence[Instrument] = (),
    progress: bool = True,
) -> "CompiledModel":
    """A quantized model that is called as the model is.

    The model is not changed. Its weights are not copied either: those that are quantized are let go one by one, so
    when nobody else holds the model, no more than one of them is in memory beside its quantized form.

    Args:
        model: A module in evaluation mode, an exported program, a graph with its weights, or the folder of a
            checkpoint (see `qcompiler.checkpoints.load_model`). Weights that are FP8 already are taken as they are.
        scheme: The name of a recipe, with options in braces if need be: `fp8_tile{k_block=64}`; `qcompiler schemes`
            lists them.
        overrides: Another scheme for some layers, or None to leave them alone: `{"*.down_proj": "fp8_row", "lm_head":
            None}`. Patterns for the names of weights, of which the last one that matches counts; one that matches
            nothing is an error. A pattern that names a layer has it quantized even if it is a router, a vocabulary
            projection or tiny (see `passes.layers`), and it is an error if it cannot be.
        ignore: Patterns for layers to leave in float, such as `["lm_head"]`; they count after all overrides.
        calibration: Real calls of the model, for schemes with static scales or smoothing: an iterable of tensors,
            tuples of arguments or dicts of arguments by name; or a `Calibration` from an earlier time. Without
            `example_inputs` the model is captured on the first of the calls. Not needed for layers whose checkpoint
            has a static activation scale: that scale is used as it is.
        pipeline: Passes to run in place of the scheme's, as a value or as text.
        example_inputs: Positional arguments of one real call. Without them the model is captured at its first call.
        example_kwargs: Keyword arguments of that call.
        dynamic_shapes: "auto" leaves every size open that the model leaves open, batch and sequence above all; None
            fixes all sizes to those of the example; anything else goes to `torch.export`.
        target: "auto" (by the model's device), "cpu", "sm_90a", or "cuda", the target of the GPU at hand.
        strict: Whether it is an error when nothing at all could be quantized.
        instruments: Called around each pass; see `qcompiler.instruments`.
        progress: Whether to show the current stage on standard error, if that is a terminal; QCOMPILER_PROGRESS=0 turns
            it off everywhere.

    Raises:
        CaptureError: The model cannot be captured, or the graph does not compute what the model computes.
        QCompilerError: The folder holds no checkpoint, or a broken one.
        PassError: A scheme, pass or option is unknown, calibration data is missing, or a pass failed.
        InputError: The calibration data does not fit the model.
        CodegenError: The target is unknown or cannot run the graph.
    """
    check_target(target)
    overrides = with_ignored(overrides, ignore)
    watching = (*_checked_instruments(instruments), *_instruments_from_environment())
    steps, known = _pipeline(scheme, overrides, pipeline), _calibration(calibration)
    _check_calibration(steps, known, model, f"the scheme '{scheme}'" if pipeline is None else "the pipeline")
    shown = Progress(progress and knobs.current().progress, len(steps), summary=False)
    settings = Settings(
        steps, target, _checked_shapes(dynamic_shapes), strict, watching, known, progress=shown,
        scheme=scheme if pipeline is None else None,
        overrides=dict(overrides) if pipeline is None and overrides is not None else None,
    )  # fmt: skip
    args, kwargs = _checked_example(example_inputs, example_kwargs)
    given = example_inputs is not None or example_kwargs is not None
    if not given and isinstance(known, Batches) and not isinstance(model, Graph | ExportedProgram):
        (args, kwargs), given = known.first(), True
    again: Callable[[], Any] | None = None
    with shown.showing():
        if isinstance(model, str | PathLike):
            shown.stage("loading")
            again = partial(load_model, Path(model))
            model = again()
        if not isinstance(model, Graph | ExportedProgram):
            check_model(model)
            check_layer_names(steps, model)
        kind, config = class_with(CompiledModel, describe_forward(model)), getattr(model, "config", None)
        if not given and not isinstance(model, Graph | ExportedProgram):
            return kind(settings, pending=model, origin=again, config=config)
        captured = capture_model(model, args, kwargs, settings)
        origin = again or weakref.ref(model)
        del model  # whoever else holds it may let it go now: the graph has the weights
        program = build_program(captured, settings, captured.signature.flatten(args, kwargs) if given else None)
    compiled = kind(settings, origin=origin, config=config)
    compiled.accept(program)
    return compiled


# What the caller gave


def _pipeline(scheme: str, overrides: Any, pipeline: "Pipeline | str | None") -> Pipeline:
    if pipeline is None:
        return scheme_pipeline(scheme, overrides)
    if overrides is not None:
        fix = f'Put them into the pipeline: qcompiler.pipeline("{scheme}", overrides).'
        raise PassError("both overrides and a pipeline are given", got=overrides, need="one of them", fix=fix)
    if scheme != DEFAULT_SCHEME:
        fix = f'Edit the scheme\'s own: qcompiler.pipeline("{scheme}").insert_after(...).'
        raise PassError(
            "both a scheme and a pipeline are given", got=f"{scheme!r} and '{pipeline}'", need="one of them", fix=fix
        )
    if isinstance(pipeline, str):
        return Pipeline.parse(pipeline)
    if not isinstance(pipeline, Pipeline):
        raise PassError("the pipeline is of a wrong type", got=type(pipeline).__name__, need="a Pipeline, or its text")
    return pipeline


def _calibration(given: Any) -> "Batches | Calibration | None":
    return given if given is None or isinstance(given, Calibration) else Batches(given)


def _check_calibration(steps: Pipeline, known: "Batches | Calibration | None", model: Any, who: str) -> None:
    """Says at once what the first of the passes would say after the capture."""
    if known is None and any(isinstance(step, Calibrate) for step in steps) and not brings_scales(model):
        fix = "Give some: compile(..., calibration=batches), a list of real calls of the model."
        raise PassError(f"{who} needs calibration data, and there is none", fix=fix)


def brings_scales(model: Any) -> bool:
    """Whether a model comes with static activation scales, as many checkpoints do."""
    if isinstance(model, str | PathLike):
        return any(how.x_scale is not None for how in read_checkpoint(model).stored.values())
    if isinstance(model, torch.nn.Module):
        return knows_x_scales(model)
    if isinstance(model, ExportedProgram):
        traced = (node for node in model.graph.nodes if node.target is torch.ops.qcompiler.stored_weight.default)
        return any(len(node.args) > 4 and node.args[4] is not None for node in traced)
    graph = model if isinstance(model, Graph) else None
    return graph is not None and any(x_scale_of(op.result) is not None for op in graph.ops("quant.dequantize"))


def _checked_example(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args is not None and not isinstance(args, tuple | list):
        named = isinstance(args, Mapping)
        fix = "Write example_kwargs=batch." if named else "For a single argument, write example_inputs=(x,)."
        raise CaptureError(
            "example_inputs is of a wrong type", got=type(args).__name__, need="a tuple of arguments", fix=fix
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise CaptureError(
            "example_kwargs is of a wrong type", got=type(kwargs).__name__, need="a dict of arguments by name"
        )
    return tuple(args or ()), dict(kwargs or {})


def _checked_shapes(dynamic_shapes: Any) -> Any:
    if isinstance(dynamic_shapes, str) and dynamic_shapes != "auto":
        raise CaptureError(
            "dynamic_shapes is wrong", got=repr(dynamic_shapes), need='"auto", None, or what torch.export takes'
        )
    return dynamic_shapes


def _checked_instruments(instruments: Any) -> tuple[Instrument, ...]:
    found = tuple(instruments) if isinstance(instruments, tuple | list) else (instruments,)
    if wrong := [item for item in found if not isinstance(item, Instrument)]:
        raise PassError("this is no instrument", got=repr(wrong[0]), need="objects of qcompiler.instruments")
    return found


def _instruments_from_environment() -> Iterator[Instrument]:
    now = knobs.current()
    if now.print_after:
        yield PrintAfter(*now.print_after)
    if now.dump_dir:
        yield Dump(now.dump_dir)
    if now.time_passes:
        yield TimePasses(file=sys.stderr)
