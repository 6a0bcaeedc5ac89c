"""Loads a program from a folder.

    manifest ──▶ texts, hashed ──▶ last stage ──▶ Graph, verified ──▶ host module, generated anew
                 weights: sizes, headers ──▶ held to the graph         │ equal to host.py?
                                                                       ▼
                                                                    Program

Loading executes nothing from the folder, and imports nothing that it names, except as `qcompiler.artefact.structures`
allows.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from codegen.host import HostModule, emit_host_module
from qcompiler.artefact.derivations_text import derivations_from_json
from qcompiler.artefact.folder import Folder, open_folder, read_bytes
from qcompiler.artefact.manifest import (
    CALIBRATION,
    CONFIG,
    DERIVATIONS,
    HOST,
    NAME,
    REPORT,
    SIGNATURE,
    is_weights,
    read_manifest,
)
from qcompiler.artefact.model_config import config_from_entries
from qcompiler.artefact.operators import check_device, check_operators
from qcompiler.artefact.report_text import Skipped, report_from_json
from qcompiler.artefact.signature_text import moved, signature_from_json
from qcompiler.artefact.strict_json import AGAIN, Node, parse
from qcompiler.artefact.weight_files import WeightFiles, open_weights
from qcompiler.calibration import Calibration
from qcompiler.capture.signature import Signature
from qcompiler.errors import ArtefactError, ParseError, VerifyError
from qcompiler.files.replacing import locked, recover
from qcompiler.ir import Derivation, Graph
from qcompiler.ir.graph import BUFFER, PARAM
from qcompiler.pass_manager.runner import Stages, Step
from qcompiler.program.original import Forward, Original
from qcompiler.program.program import Program, Settings, generate
from qcompiler.report.report import Report
from qcompiler.runtime.device import AUTO, Target, target_for
from qcompiler.runtime.weights import Weights


@contextmanager
def reading(path: Path) -> Iterator[Folder]:
    """Opens the folder under a lock against replacement; first restores it if a replacement was interrupted."""
    if not path.parent.is_dir():
        raise ArtefactError("there is no artefact", got=path, need="a folder that compiled.save wrote")
    if not path.exists():
        with locked(path.parent):
            recover(path)
    with locked(path.parent, shared=True):
        folder = open_folder(path)
        yield folder
        if read_manifest(read_bytes(path / NAME), path / NAME) != folder.manifest:
            raise ArtefactError("the artefact was replaced while it was read", got=path, fix="Load it again.")


def read_program(
    folder: Folder, device: "torch.device | str | None", verify: bool, regenerate: bool, trust: Collection[str],
    rank: int | None = None,
) -> Program:  # fmt: skip
    """Reads and verifies a folder, except weight data; `qcompiler.load` documents the arguments.

    Args:
        folder: The folder.
        device: As for `load`.
        verify: As for `load`; of a sharded model, the files of other ranks are not verified.
        regenerate: As for `load`.
        trust: As for `load`.
        rank: The rank whose weights are opened; None for a model that is not sharded.
    """
    if verify:
        own = folder.manifest.weights_of(rank).files
        for name in folder.manifest.files:
            if name in own or not is_weights(name):
                folder.verify(name)
    signature, forward = read_signature(folder)
    where = _device(folder, device)
    target = _target(folder, where)
    stages, graph = read_stages(folder, trust)
    check_against(folder, graph, signature, trust)
    graph.derivations = read_derivations(folder, graph, trust)
    check_host(folder, graph, regenerate)
    if target.name != folder.manifest.target:
        check_device(graph, where, target, str(folder.path))
    weights = read_weights(folder, graph, rank)
    names = [str(op.attrs["name"]) for kind in (PARAM, BUFFER) for op in graph.ops(kind)]
    graph.weights = Weights(weights.loaders(names, where), weights.ties())
    host, run = generate(graph, target.name)
    report, steps, skipped = read_report(folder)
    manifest = folder.manifest
    settings = Settings(
        manifest.pipeline, target.name, strict=False, scheme=manifest.scheme, overrides=manifest.overrides
    )
    return Program(
        graph, stages, steps, report, host, moved(signature, where), target.name, where, run, settings,
        Original(forward, read_config(folder)), _later(folder), skipped,
    )  # fmt: skip


# Parts


def read_signature(folder: Folder) -> tuple[Signature, Forward]:
    """Reads the signature of the model."""
    return signature_from_json(_json(folder, SIGNATURE))


def read_config(folder: Folder) -> Callable[[], Any]:
    """The original model's configuration, built lazily: importing transformers takes a second."""
    if CONFIG not in folder.manifest.files:
        return lambda: None
    entries = {name: entry.value for name, entry in _json(folder, CONFIG).members()}
    return cache(partial(config_from_entries, entries))


def read_stages(folder: Folder, trust: Collection[str] | None) -> tuple[Stages, Graph]:
    """All stages, hashed now and parsed on demand; and the graph of the last one.

    Any stage, or part of one, may be run, so each stage is checked for allowed operators. If `trust` is None, stages
    are not checked and must not be run.
    """
    stages, texts = Stages(), {name: folder.text(file) for name, file in folder.manifest.stages.items()}
    for name, file in folder.manifest.stages.items():
        stages.add_later(name, partial(_stage, texts[name], str(folder.path / file), trust))
    try:
        return stages, stages[list(stages)[-1]].clone()
    except ParseError as error:
        fix = "If an operation is unknown, import the library that defines it before the artefact is loaded."
        raise ArtefactError("the graph of the artefact cannot be read", got=error, fix=fix) from None


def _stage(text: str, where: str, trust: Collection[str] | None) -> Graph:
    graph = Graph.parse(text, where)
    if trust is not None:
        check_operators(graph, trust, where)
    return graph


def read_derivations(folder: Folder, graph: Graph, trust: Collection[str]) -> dict[str, Derivation]:
    """Reads the derivations of weights that passes created."""
    return derivations_from_json(_json(folder, DERIVATIONS), graph, trust)


def read_weights(folder: Folder, graph: Graph, rank: int | None = None) -> WeightFiles:
    """Opens the weight files, of a rank if there are several. Raises ArtefactError if they lack a weight."""
    division, stored = folder.manifest.division, folder.manifest.weights_of(rank)
    paths = [folder.checked(name) for name in stored.files]
    save = None if division is None else division.save
    files = open_weights(paths, stored.aliases, stored.layouts, folder.path / NAME, save)
    for op in (*graph.ops(PARAM), *graph.ops(BUFFER)):
        name, need = str(op.attrs["name"]), op.result.tensor.stored
        if (got := files.type_of(name)) != need:
            raise ArtefactError(
                "a weight is missing" if got is None else "a weight does not have the type that the graph declares",
                got=f"{name}: {got}",
                need=need,
                where=", ".join(map(str, paths)),
                fix=AGAIN,
            )
    return files


def check_against(folder: Folder, graph: Graph, signature: Signature, trust: Collection[str]) -> None:
    """Raises ArtefactError if the graph is illegal, does not match the signature, or calls a forbidden operator."""
    last = str(folder.path / list(folder.manifest.stages.values())[-1])
    check_operators(graph, trust, last)
    try:
        graph.verify()
    except VerifyError as error:
        error.where = last
        raise
    inputs = tuple(value.name for value in graph.inputs)
    if inputs != signature.input_names or len(graph.outputs) != signature.out_spec.num_leaves:
        raise ArtefactError(
            "the graph is not the one that the signature calls",
            got=f"inputs {', '.join(inputs)} and {len(graph.outputs)} outputs",
            need=f"inputs {', '.join(signature.input_names)} and {signature.out_spec.num_leaves} outputs",
            where=last,
            fix=AGAIN,
        )


def check_host(folder: Folder, graph: Graph, regenerate: bool) -> HostModule:
    """Generates the host module. Raises ArtefactError if it differs from the one in the artefact."""
    text, host = folder.text(HOST), emit_host_module(graph, folder.manifest.target)
    if text != host.source and not regenerate:
        made_by = folder.manifest.made_by.get("qcompiler")
        raise ArtefactError(
            "the host module differs from what this qcompiler generates from the graph",
            got=f"one that qcompiler {made_by} wrote",
            where=str(folder.path / HOST),
            fix="Load it with that version; or regenerate it here: load(folder, regenerate=True).",
        )
    return host


def _json(folder: Folder, name: str) -> Node:
    return parse(folder.text(name).encode(), folder.path / name)


def read_report(folder: Folder) -> tuple[Report, tuple[Step, ...], Skipped]:
    """Reads the report, the passes that ran, and what each pass skipped and why."""
    return report_from_json(_json(folder, REPORT))


def read_calibration(folder: Folder) -> Calibration | None:
    """Reads the calibration statistics; None if the model was not calibrated."""
    if folder.manifest.calibration is None:
        return None
    found = Calibration.load(folder.checked(CALIBRATION))
    if found.digest != folder.manifest.calibration:
        raise ArtefactError(
            "the calibration does not match the manifest", where=str(folder.path / CALIBRATION), fix=AGAIN
        )
    return found


def _later(folder: Folder) -> Callable[[], Calibration | None]:
    """The calibration, read lazily."""
    if folder.manifest.calibration is not None:
        folder.checked(CALIBRATION)
    return cache(partial(read_calibration, folder))


# Where it runs


def _device(folder: Folder, given: "torch.device | str | None") -> torch.device:
    try:
        device = torch.device(folder.manifest.device if given is None else given)
    except (RuntimeError, TypeError) as error:
        raise ArtefactError(
            "there is no such device", got=given or folder.manifest.device, need="cpu or cuda", where=str(folder.path)
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ArtefactError(
                f"the artefact is for {device}, and torch finds no such device here",
                where=str(folder.path),
                fix='Load it on the CPU, where the kernels are simulated: load(folder, device="cpu").',
            )
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        elif device.index >= torch.cuda.device_count():
            raise ArtefactError(
                "there is no such device",
                got=device,
                need=f"one of {torch.cuda.device_count()}",
                where=str(folder.path),
                fix='Choose one: load(folder, device="cuda:0").',
            )
    return device


def _target(folder: Folder, device: torch.device) -> Target:
    """The target of the artefact if it fits the device, else the target of the device."""
    kept = torch.device(folder.manifest.device).type == device.type
    return target_for(folder.manifest.target if kept else AUTO, device)
