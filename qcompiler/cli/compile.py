"""`qcompiler compile`: compiles a model to a folder."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

import qcompiler
from qcompiler.artefact.folder import check_replaceable
from qcompiler.checkpoints import read, write
from qcompiler.checkpoints.folders import check_place
from qcompiler.checkpoints.format import writer_called
from qcompiler.cli.huggingface import text_calls
from qcompiler.cli.inputs import SUFFIX, Call, calls_in
from qcompiler.cli.meshes import mesh_of
from qcompiler.cli.models import Loaded, load_model
from qcompiler.cli.output import print_json
from qcompiler.cli.requests import needs_data, overrides_of, pipeline_of
from qcompiler.compiler.arguments import DEFAULT_SCHEME, brings_scales
from qcompiler.compiler.model import CompiledModel
from qcompiler.errors import InputError
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.program.exporters import exporter_targets
from qcompiler.program.program import Program
from qcompiler.progress import Progress
from qcompiler.report.report import Report
from qcompiler.runtime.device import check_target, target_names


def run(options: argparse.Namespace) -> int:
    """Compiles and saves a model, and prints the report."""
    scheme = DEFAULT_SCHEME if options.scheme is None and options.pipeline is None else options.scheme
    exporters = {} if options.target in target_names() else exporter_targets()
    check_target(options.target, (*target_names(), *exporters))
    exporter = exporters.get(options.target)
    overrides = overrides_of(options.override, options.ignore)
    pipeline = pipeline_of(scheme, options.pipeline, overrides)
    checkpoint = None
    if needs_data(pipeline) and not options.calibration:
        checkpoint = read(options.model) if Path(options.model).is_dir() else None
        if checkpoint is None or not brings_scales(checkpoint):
            fix = "Give some: --calibration FILE."
            raise InputError("the passes need calibration data", got=scheme or pipeline, fix=fix)
    output, mesh = Path(options.output), mesh_of(options)
    exporter.check(output) if exporter else check_replaceable(output.resolve())  # fail before any work
    checkpoints = [_checkpoint(text) for text in options.checkpoint]
    if mesh is not None and (exporter or checkpoints):
        got = f"--target {options.target}" if exporter else f"--checkpoint {options.checkpoint[0]}"
        raise InputError("a sharded model is saved as an artefact only", got=got, need="no --mesh")
    asked = {"pipeline": pipeline} if scheme is None else {"scheme": scheme, "overrides": overrides}
    progress = Progress(shown=not options.quiet, passes=len(pipeline) * (1 if mesh is None else mesh.mesh.size))
    with progress.showing():
        progress.stage("loading")
        loaded = load_model(options.model, options.device, checkpoint, mesh)
        model = loaded.model if checkpoints else None  # kept: a checkpoint needs its other parts
        if mesh is not None:
            report = _sharded(loaded, {**asked, "mesh": mesh}, options, progress).report
        else:
            call = _arguments(loaded, options)
            compiled = _compiled(loaded, {**asked, **call}, options, "cpu" if exporter else options.target, progress)
            report = compiled.report
            progress.stage("saving")
            exporter.write(compiled.program, output) if exporter else compiled.save(output)
            for kind, folder in checkpoints:
                write(compiled, folder, kind, model=model)
    shown = "its inputs" if exporter else "what each pass did"
    _print(options, scheme, pipeline, progress, report, shown)
    return 0


def _print(
    options: argparse.Namespace, scheme: str | None, pipeline: Pipeline, progress: Progress, report: Report, shown: str
) -> None:
    if options.json:
        print_json({"artefact": str(Path(options.output)), "scheme": scheme, "pipeline": str(pipeline),
                    "seconds": progress.seconds, "report": report_document(report)})  # fmt: skip
    else:
        print(f"{report}\nsaved to {options.output}; `qcompiler inspect {options.output}` shows {shown}")


def _checkpoint(text: str) -> tuple[str, str]:
    """Format and folder from `FORMAT=DIR`, checked before any work."""
    kind, equals, folder = text.partition("=")
    if not equals or not folder:
        raise InputError("the checkpoint argument is malformed", got=repr(text), need="FORMAT=DIR, such as fp8=out")
    writer_called(kind, "float")
    check_place(Path(folder))
    return kind, folder


def _arguments(loaded: Loaded, options: argparse.Namespace) -> dict[str, Any]:
    """The calibration data and the example of `compile`."""
    batches = list(_batches(loaded, options))
    example = _example(loaded, options, known=bool(batches))
    call = {} if example is None else {"example_inputs": example.args, "example_kwargs": example.kwargs}
    return {"calibration": batches or None, **call}


def _compiled(
    loaded: Loaded, asked: dict[str, Any], options: argparse.Namespace, target: str, progress: Progress
) -> CompiledModel:
    progress.stage("capture")
    return qcompiler.compile(
        loaded.release(),
        **asked,
        dynamic_shapes=None if options.fixed_sizes else "auto",
        target=target,
        strict=not options.allow_unquantized,
        instruments=[progress],
        progress=False,  # the command shows its own progress, with the stages before and after
    )


def _sharded(loaded: Loaded, asked: dict[str, Any], options: argparse.Namespace, progress: Progress) -> Program:
    """Compiles and saves the ranks one after the other, and returns the program of the first."""
    example = _example(loaded, options, known=False)
    asked["sharding"] = options.sharding
    compiled: Any = _compiled(loaded, asked, options, options.target, progress)
    call = None if example is None else (example.args, example.kwargs)
    program: Program = compiled.compile_into(options.output, call)
    return program


def _example(loaded: Loaded, options: argparse.Namespace, known: bool) -> Call | None:
    """Example inputs for capture; None uses the calibration data or the exported program."""
    given = options.input or options.example is not None
    if not given and (known or isinstance(loaded.model, ExportedProgram)):
        return None
    example = loaded.example_for(options.input, options.example)
    if example is None:
        fix = 'Give some: --input "x=bf16[4,256]", --example FILE, or a factory that returns the model and its inputs.'
        raise InputError("capturing the model needs example inputs", got="none", fix=fix)
    return example


def _batches(loaded: Loaded, options: argparse.Namespace) -> Iterator[Any]:
    """The calls in all calibration files."""
    for path in options.calibration:
        calls = (
            iter(calls_in(path))
            if path.endswith(SUFFIX)
            else text_calls(loaded.folder, path, options.batch_size, options.max_length)
        )
        for index, call in enumerate(calls):
            yield call.on(loaded.device).as_batch(f"call {index} of {path}")


def report_document(report: Report) -> dict[str, Any]:
    """A report as a JSON document."""
    return {"summary": report.summary(), **asdict(report)}
