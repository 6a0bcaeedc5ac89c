"""Reads what the ranks of a mesh need: parts of a checkpoint's weights, or their own files of an artefact."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from qcompiler.artefact.folder import Folder
from qcompiler.artefact.loading import reading
from qcompiler.artefact.manifest import Division
from qcompiler.checkpoints.loading import load_in_slices, load_model
from qcompiler.checkpoints.reading import Checkpoint, read
from qcompiler.compiler.sharding import ShardedModel, connection, decoder_of, model_of, together
from qcompiler.decoding.decoder import Decoder, is_decoder
from qcompiler.decoding.tokenizers import read_tokenizer
from qcompiler.errors import ArtefactError
from qcompiler.ir import Mesh
from qcompiler.program.program import Program


def loaded(checkpoint: Checkpoint, mesh: Any, device: "torch.device | str | None" = None) -> torch.nn.Module:
    """The model of a checkpoint; on a mesh, the ranks read their parts of its matrices later.

    Args:
        checkpoint: The checkpoint.
        mesh: As for `qcompiler.compile`.
        device: Where the model runs; by default the device of the mesh, or else the CPU.
    """
    if mesh is None:
        model = load_model(checkpoint)
        return model if device is None else model.to(device)
    with together(mesh):
        place = getattr(mesh, "device_type", "cpu") if device is None else device
        return load_in_slices(checkpoint, torch.device(place))


def read_together(folder: "str | PathLike[str]", mesh: Any) -> Checkpoint:
    """Reads a checkpoint folder; if this rank of a device mesh cannot, the others do not wait for it."""
    with together(mesh):
        return read(folder)


def load_on(
    mesh: Any, path: Path, device: "torch.device | str | None", read_rank: Callable[[Folder, Any, int], Program]
) -> ShardedModel | Decoder:
    """The sharded model or decoder in an artefact, of which this process reads its own ranks.

    Args:
        mesh: As for `qcompiler.load`.
        path: The folder.
        device: As for `qcompiler.load`.
        read_rank: Reads the program of a rank for a device.

    Raises:
        ArtefactError: The artefact is for another mesh, or cannot be read, or ranks have read different ones.
        QCompilerError: Another rank has failed.
    """
    grid, connected = connection(mesh)
    programs: list[Program] = []
    rest: list[Any] = []

    def own() -> str:
        with reading(path) as opened:
            sharding = _checked(opened, grid).sharding
            for rank in range(grid.size) if connected is None else (connected.rank,):
                programs.append(read_rank(opened, device if connected is None else device or connected.device, rank))
            rest.extend((sharding, read_tokenizer(opened) if is_decoder(programs[0]) else None))
            return opened.manifest.digest

    found = {own()} if connected is None else {*connected.each(own)}
    if len(found) > 1:
        fix = "Give all ranks the same folder, or equal copies of it."
        raise ArtefactError("the ranks have read different artefacts", got=f"{len(found)} of them", fix=fix)
    sharding, tokenizer = rest
    model = model_of(programs, grid, connected, sharding)
    return model if tokenizer is None else decoder_of(model, *tokenizer)


def _checked(folder: Folder, mesh: Mesh) -> Division:
    """The ranks of an artefact. Raises ArtefactError unless they are the ranks of a mesh."""
    division, where = folder.manifest.division, str(folder.path)
    if division is None:
        fix = "Load it without a mesh, or compile the model with one."
        raise ArtefactError("the artefact is not for a mesh", got=f"the mesh {mesh}", where=where, fix=fix)
    if str(mesh) != division.mesh:
        fix = "Start one process for each of its ranks, or compile the model for this mesh."
        raise ArtefactError("the artefact is for another mesh", got=mesh, need=division.mesh, where=where, fix=fix)
    return division
