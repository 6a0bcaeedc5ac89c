"""Saves a compiled model to a folder atomically."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from codegen.host import emit_host_module
from qcompiler.artefact.derivations_text import derivations_to_json
from qcompiler.artefact.folder import check_replaceable
from qcompiler.artefact.manifest import (
    CALIBRATION,
    CONFIG,
    DERIVATIONS,
    HOST,
    NAME,
    REPORT,
    SIGNATURE,
    Division,
    Manifest,
    Stored,
    versions,
    write_manifest,
)
from qcompiler.artefact.model_config import config_to_text
from qcompiler.artefact.report_text import report_to_json
from qcompiler.artefact.signature_text import signature_to_json
from qcompiler.artefact.strict_json import render
from qcompiler.artefact.weight_files import Hashing, Plan, Written, hash_file, plan_shards, shard_name, write_shard
from qcompiler.errors import ArtefactError, QCompilerError
from qcompiler.files.replacing import replacing
from qcompiler.ir import Graph, Role
from qcompiler.program.program import Program


def write_artefact(
    folder: Path, program: Program, shard_bytes: int, beside: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Writes a program to a folder and replaces an existing artefact.

    Args:
        folder: A new folder, or an artefact to replace.
        program: The compiled model.
        shard_bytes: Weights larger than this in total are split into several files.
        beside: Further text files, such as a tokenizer's: name -> text.

    Raises:
        ArtefactError: The folder exists and is not an artefact, or cannot be written.
    """
    target = checked_target(folder, shard_bytes)
    texts = texts_of(program, beside)
    plan = plan_of(program, shard_bytes)
    size = sum(map(len, texts.values())) + plan.nbytes
    with replacing(target, failed, size) as work:
        files = write_texts(work, texts)
        names = write_weights(work, plan, files)
        write_index(work, program, files, stored_as(plan, names))
        check_replaceable(target)


def checked_target(folder: Path, shard_bytes: int) -> Path:
    """The folder to write. Raises ArtefactError if it must not be replaced, or `shard_bytes` is wrong."""
    if shard_bytes < 1:
        raise ArtefactError("shard_bytes is wrong", got=shard_bytes, need="1 or more")
    target = folder.resolve()
    check_replaceable(target)
    return target


def texts_of(program: Program, beside: Mapping[str, str]) -> dict[str, str]:
    """The texts of a program and others, by file name."""
    texts = {**_texts(program), **beside}
    if (described := config_to_text(program.original.config())) is not None:
        texts[CONFIG] = described
    return texts


def plan_of(program: Program, shard_bytes: int) -> Plan:
    """The assignment of a program's weights to files."""
    return plan_shards({name: program.graph.weights[name] for name in program.host.weights.values()}, shard_bytes)


def stored_as(plan: Plan, names: Iterable[str]) -> Stored:
    """The entry of the manifest for weights in files of these names."""
    return Stored(tuple(names), plan.aliases, plan.layouts)


def write_texts(work: Path, texts: Mapping[str, str]) -> dict[str, Written]:
    """Writes texts. Raises OSError on failure."""
    return {name: _write_text(work / name, text) for name, text in texts.items()}


def write_weights(
    work: Path, plan: Plan, files: dict[str, Written], below: str = "", save: str | None = None
) -> list[str]:  # fmt: skip
    """Writes weight files, adds them to `files`, and returns their names.

    Args:
        work: The folder.
        plan: The weights.
        files: What has been written so far.
        below: A subfolder, with a slash.
        save: The name of the save, for the headers.
    """
    names = [f"{below}{shard_name(number, len(plan.shards))}" for number in range(1, len(plan.shards) + 1)]
    for name, tensors in zip(names, plan.shards, strict=True):
        (work / name).parent.mkdir(exist_ok=True)
        files[name] = write_shard(work / name, tensors, save)
    return names


def write_index(
    work: Path, program: Program, files: dict[str, Written], weights: Stored, division: Division | None = None
) -> None:
    """Writes the calibration and, last, the manifest."""
    calibration = program.calibration()
    if calibration is not None:
        calibration.write_file(work / CALIBRATION)
        files[CALIBRATION] = hash_file(work / CALIBRATION)
    manifest = _manifest(program, None if calibration is None else calibration.digest, files, weights)
    _write_text(work / NAME, write_manifest(replace(manifest, division=division)))


def failed(error: OSError) -> ArtefactError:
    """The error for a failed write, such as a full disk."""
    return ArtefactError("the artefact cannot be saved", got=error)


def stage_files(program: Program) -> dict[str, str]:
    """Stage -> the file for its text."""
    return {name: f"stages/{index:02d}_{name}.qir" for index, name in enumerate(program.stages)}


def numerics_of(graph: Graph) -> tuple[str, ...]:
    """The numeric profiles of all quantizations in a graph."""
    return tuple(sorted({op.format().profile for op in graph if "format" in op.attrs and op.role is Role.QUANTIZE}))


def _texts(program: Program) -> dict[str, str]:
    """Every file except the weights, the calibration and the manifest."""
    stages = {file: f"{program.stages[name]}\n" for name, file in stage_files(program).items()}
    _check_round_trip(program, list(stages.values())[-1])
    return {
        SIGNATURE: render(signature_to_json(program.signature, program.original.forward)),
        REPORT: render(report_to_json(program.report, program.steps, program.skipped)),
        DERIVATIONS: render(derivations_to_json(program.graph.derivations)),
        HOST: program.host.source,
        **stages,
    }


def _check_round_trip(program: Program, text: str) -> None:
    """Checks that the text of the last stage reproduces the program, since loading reads only that."""
    if text != f"{program.graph}\n":
        raise ArtefactError(
            "the graph was changed since it was compiled",
            need="the graph as the last pass left it",
            fix="Compile the changed graph: qcompiler.compile(graph, pipeline=...).",
        )
    try:
        again = emit_host_module(Graph.parse(text), program.target)
    except QCompilerError as error:
        raise ArtefactError("the text of the graph cannot be read again", got=error, fix=REPORT_IT) from error
    if again != program.host:
        raise ArtefactError("the text of the graph gives another host module", fix=REPORT_IT)


REPORT_IT = "Please report it, with str(compiled.graph)."


def _write_text(path: Path, text: str) -> Written:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = Hashing(file)
        writer.write(text.encode())
    return writer.written


def _manifest(program: Program, calibration: str | None, files: dict[str, Written], weights: Stored) -> Manifest:
    settings = program.settings
    return Manifest(
        made_by=versions(),
        scheme=settings.scheme,
        overrides=settings.overrides,
        pipeline=str(settings.pipeline),
        numerics=numerics_of(program.graph),
        target=program.target,
        device=str(program.device),
        source=files[HOST].sha256,
        calibration=calibration,
        stages=stage_files(program),
        weights=weights,
        files=files,
    )
