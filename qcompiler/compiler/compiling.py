"""`compile`: captures a model, runs the pipeline, generates the host module, and returns a callable.

model -> capture -> Graph -> passes -> Graph -> host module -> CompiledModel
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from qcompiler import knobs
from qcompiler.calibration import Calibration
from qcompiler.capture.preflight import check_model
from qcompiler.checkpoints.loading import load_model
from qcompiler.checkpoints.reading import Checkpoint
from qcompiler.compiler.arguments import (
    AUTO,
    checked_calibration,
    checked_example,
    checked_instruments,
    checked_pipeline,
    checked_shapes,
    chosen_schemes,
    static_scheme,
    with_prescales,
)
from qcompiler.compiler.layer_names import check_layer_names
from qcompiler.compiler.model import CompiledModel, callable_of
from qcompiler.compiler.pending import PendingModel
from qcompiler.compiler.sharded_loading import loaded, read_together
from qcompiler.compiler.sharding import checked_sharding, model_on, together
from qcompiler.distributed.simulation import SimulatedMesh
from qcompiler.ir import Graph
from qcompiler.pass_manager.instruments import Instrument
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.program.batches import Batches
from qcompiler.program.original import describe
from qcompiler.program.program import Settings
from qcompiler.progress import Progress
from qcompiler.runtime.device import check_target
from qcompiler.schemes.named import with_ignored
from qcompiler.schemes.sharded import check_whole
from qcompiler.schemes.tactics import Sharding

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def compile(
    model: "torch.nn.Module | ExportedProgram | Graph | str | PathLike[str]",
    *,
    scheme: str = AUTO,
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
    mesh: "SimulatedMesh | DeviceMesh | None" = None,
    sharding: "Sharding | str | None" = None,
) -> CompiledModel:
    """Compiles a model into a quantized model with the same call signature.

    The model is not changed and its weights are not copied: those that are not quantized are shared with the model, so
    do not change them afterwards. Original weights are released one by one as they are quantized: if nothing else holds
    the model, at most one of them is in memory beside its quantized form.

    Args:
        model: A module in evaluation mode, an exported program, a graph with its weights, or the folder of a
            checkpoint (see `qcompiler.checkpoints.load_model`). Weights that are already FP8 are used as they are.
        scheme: The name of a derivation, with optional arguments in braces: `fp8_tile{k_block=64}`; `qcompiler schemes`
            lists them. "auto" is what a checkpoint in qcompiler's own format declares, with its overrides, or else
            fp8_tile.
        overrides: Another scheme for some layers, or None to skip them: `{"*.down_proj": "fp8_row", "lm_head": None}`.
            Patterns match names of weights; the last match applies. A pattern that matches nothing is an error. A
            pattern that names a layer quantizes it even if it is a router, a vocabulary projection or tiny (see
            `passes.analyses.layers`); it is an error if the layer cannot be quantized.
        ignore: Patterns for layers to keep in floating point, such as `["lm_head"]`; they apply after all overrides.
        calibration: Real calls of the model, for schemes with static scales or smoothing: an iterable of tensors,
            tuples of arguments or dicts of arguments by name; or a `Calibration` from an earlier run. Without
            `example_inputs` the model is captured on the first call. Not needed for layers whose checkpoint has a
            static activation scale, which is used as it is.
        pipeline: Passes to run instead of the scheme's, as a value or as text.
        example_inputs: Positional arguments of one real call. Without them, the first call captures the model.
        example_kwargs: Keyword arguments of that call.
        dynamic_shapes: "auto" keeps every size dynamic that the model allows, above all batch and sequence; None fixes
            all sizes to the example's; anything else is passed to `torch.export`.
        target: "auto" (by the model's device), "cpu", "sm_90a", or "cuda" for the target of the current GPU.
        strict: Whether to raise an error if nothing could be quantized.
        instruments: Called around each pass; see `qcompiler.pass_manager.instruments`.
        progress: Whether to show the current stage on standard error, if that is a terminal; QCOMPILER_PROGRESS=0 turns
            it off everywhere.
        mesh: Ranks that divide the model among them: a device mesh of `torch.distributed`, of which this process is a
            rank, or `qcompiler.simulated_mesh(tp=2)`, all of whose ranks run in this process. Ranks read their parts of
            a folder's weights only.
        sharding: How they divide it: tactics such as "tp; sp; ep", or a `qcompiler.Sharding`; by default "tp". See
            docs/sharding.md.

    Raises:
        CaptureError: The model cannot be captured, or the graph does not compute what the model computes.
        QCompilerError: The folder does not contain a valid checkpoint.
        PassError: A scheme, pass, tactic or option is unknown, calibration data is missing, or a pass failed.
        InputError: The calibration data does not fit the model.
        CodegenError: The target is unknown or cannot run the graph.
    """
    check_target(target)
    tactics = checked_sharding(sharding, mesh)
    overrides = with_ignored(overrides, ignore)
    watching = checked_instruments(instruments)
    steps = checked_pipeline(scheme, overrides, pipeline)
    given: Any = read_together(model, mesh) if isinstance(model, str | PathLike) else model
    del model  # the caller may free it: the graph will hold the weights
    who = static_scheme(scheme, overrides) if pipeline is None else "the pipeline"
    known = checked_calibration(calibration, steps, given, who)
    shown = Progress(progress and knobs.current().progress, len(steps), summary=False)
    settings = Settings(
        steps, target, checked_shapes(dynamic_shapes), strict, watching, known, progress=shown,
        scheme=scheme if pipeline is None else None,
        overrides=dict(overrides) if pipeline is None and overrides is not None else None,
    )  # fmt: skip
    call, is_traced = checked_example(example_inputs, example_kwargs), isinstance(given, Graph | ExportedProgram)
    if call is None and not is_traced and isinstance(known, Batches):
        call = known.first()
    with shown.showing(), together(mesh):
        pending = _pending(given, settings, mesh)
        del given
        if mesh is not None:
            sharded = model_on(mesh, tactics, pending)
            return sharded.compile_now(call) if call or is_traced else sharded
        return callable_of(pending.compile(call) if call or is_traced else pending, CompiledModel)


def _pending(model: Any, settings: Settings, mesh: Any) -> PendingModel:
    """Returns the model, loaded if it is a folder, after all checks that do not need a capture."""
    again = None
    if isinstance(model, Checkpoint):
        settings.progress.stage("loading")
        again, model = partial(load_model, model.folder), loaded(model, mesh)
    if settings.scheme == AUTO:
        scheme, overrides = chosen_schemes(AUTO, settings.overrides, model)
        steps = checked_pipeline(str(scheme), overrides, None)
        settings = replace(settings, pipeline=steps, scheme=scheme, overrides=overrides)
    if settings.scheme is not None:
        settings = replace(settings, pipeline=with_prescales(settings.passes, model))
    if mesh is not None and again is not None:
        check_whole(settings.passes, isinstance(settings.calibration, Batches))
    if not isinstance(model, Graph | ExportedProgram):
        check_model(model)
        check_layer_names(settings.passes, model)
    return PendingModel(model, settings, describe(model, again or weakref.ref(model)))
