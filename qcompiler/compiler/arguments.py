"""Checks the arguments of `compile` before any work is done."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram

from passes.fusing.fuse_prescale import FusePrescale
from passes.quantizing.calibrate import Calibrate
from passes.quantizing.share_quantize import ShareQuantize
from qcompiler import knobs
from qcompiler.calibration import Calibration
from qcompiler.capture.stored_weights import knows_prescales, knows_x_scales
from qcompiler.checkpoints.loading import schemes_of
from qcompiler.checkpoints.reading import Checkpoint
from qcompiler.dialects.quant import x_scale_of
from qcompiler.errors import CaptureError, PassError
from qcompiler.ir import Graph
from qcompiler.pass_manager.instruments import Dump, Instrument, PrintAfter, TimePasses
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.program.batches import Batches, Call
from qcompiler.schemes.named import pipeline as scheme_pipeline

AUTO = "auto"
"""The scheme and overrides that a model's checkpoint declares, or else `DEFAULT_SCHEME`."""

DEFAULT_SCHEME = "fp8_tile"


def checked_pipeline(scheme: str, overrides: Any, pipeline: "Pipeline | str | None") -> Pipeline:
    """Returns the passes to run: the given ones, or the scheme's."""
    if pipeline is None:
        return scheme_pipeline(DEFAULT_SCHEME if scheme == AUTO else scheme, overrides)
    if overrides is not None:
        name = DEFAULT_SCHEME if scheme == AUTO else scheme
        fix = f'Put them into the pipeline: qcompiler.pipeline("{name}", overrides).'
        raise PassError("both overrides and a pipeline are given", got=overrides, need="one of them", fix=fix)
    if scheme != AUTO:
        fix = f'Edit the scheme\'s own: qcompiler.pipeline("{scheme}").insert_after(...).'
        raise PassError(
            "both a scheme and a pipeline are given", got=f"{scheme!r} and '{pipeline}'", need="one of them", fix=fix
        )
    if isinstance(pipeline, str):
        return Pipeline.parse(pipeline)
    if not isinstance(pipeline, Pipeline):
        raise PassError("the pipeline is of a wrong type", got=type(pipeline).__name__, need="a Pipeline, or its text")
    return pipeline


def chosen_schemes(
    scheme: str | None, overrides: "Mapping[str, str | None] | None", model: Any
) -> "tuple[str | None, Mapping[str, str | None] | None]":
    """Returns the scheme and the overrides, and the model's checkpoint's in place of "auto".

    Args:
        scheme: A scheme, "auto", or None.
        overrides: The caller's overrides, which apply after the checkpoint's.
        model: The model, loaded.
    """
    if scheme != AUTO:
        return scheme, overrides
    declared = schemes_of(model) if isinstance(model, torch.nn.Module) else None
    if declared is None:
        return DEFAULT_SCHEME, overrides
    return declared.scheme, {**declared.overrides, **(overrides or {})} or None


def with_prescales(steps: Pipeline, model: Any) -> Pipeline:
    """Returns a scheme's passes, with those that a checkpoint of a smoothed model needs to multiply as it says."""
    needs = isinstance(model, torch.nn.Module) and knows_prescales(model)
    if not needs or FusePrescale.name in steps or ShareQuantize.name not in steps:
        return steps
    return steps.insert_after(ShareQuantize.name, FusePrescale(), ShareQuantize())


def checked_calibration(given: Any, steps: Pipeline, model: Any, who: str) -> "Batches | Calibration | None":
    """Returns the calibration data; PassError if a pass needs it and neither caller nor model provides scales."""
    if given is None and any(isinstance(step, Calibrate) for step in steps) and not brings_scales(model):
        fix = "Give some: compile(..., calibration=batches), a list of real calls of the model."
        raise PassError(f"{who} needs calibration data, and there is none", fix=fix)
    return given if given is None or isinstance(given, Calibration) else Batches(given)


def static_scheme(scheme: str, overrides: "Mapping[str, str | None] | None") -> str:
    """Returns the first scheme that needs calibration data, for a message."""
    schemes = [scheme, *(each for each in (overrides or {}).values() if each is not None)]
    schemes = [DEFAULT_SCHEME if each == AUTO else each for each in schemes]
    static = (each for each in schemes if any(isinstance(step, Calibrate) for step in scheme_pipeline(each)))
    return f"the scheme '{next(static, scheme)}'"


def brings_scales(model: Any) -> bool:
    """Whether a model has static activation scales, as many checkpoints do."""
    if isinstance(model, Checkpoint):
        return any(how.x_scale is not None for how in model.stored.values())
    if isinstance(model, torch.nn.Module):
        return knows_x_scales(model)
    if isinstance(model, ExportedProgram):
        traced = (node for node in model.graph.nodes if node.target is torch.ops.qcompiler.stored_weight.default)
        return any(len(node.args) > 4 and node.args[4] is not None for node in traced)
    graph = model if isinstance(model, Graph) else None
    return graph is not None and any(x_scale_of(op.result) is not None for op in graph.ops("quant.dequantize"))


def checked_example(args: Any, kwargs: Any) -> Call | None:
    """Returns the arguments of one call; None if neither is given."""
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
    return None if args is None and kwargs is None else (tuple(args or ()), dict(kwargs or {}))


def checked_shapes(dynamic_shapes: Any) -> Any:
    """Returns `dynamic_shapes`; rejects numbers, and any word other than "auto"."""
    if isinstance(dynamic_shapes, str | int | float) and dynamic_shapes != "auto":
        raise CaptureError(
            "dynamic_shapes is wrong", got=repr(dynamic_shapes), need='"auto", None, or what torch.export takes'
        )
    return dynamic_shapes


def checked_instruments(instruments: Any) -> tuple[Instrument, ...]:
    """Returns the given instruments, then those that environment variables request."""
    found = tuple(instruments) if isinstance(instruments, tuple | list) else (instruments,)
    if wrong := [item for item in found if not isinstance(item, Instrument)]:
        raise PassError(
            "this is not an instrument", got=repr(wrong[0]), need="objects of qcompiler.pass_manager.instruments"
        )
    return (*found, *_instruments_from_environment())


def _instruments_from_environment() -> Iterator[Instrument]:
    now = knobs.current()
    if now.print_after:
        yield PrintAfter(*now.print_after)
    if now.dump_dir:
        yield Dump(now.dump_dir)
    if now.time_passes:
        yield TimePasses(file=sys.stderr)
