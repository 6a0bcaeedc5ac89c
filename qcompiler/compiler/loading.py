"""`load`: reads a compiled model or a decoder from an artefact."""

import os
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qcompiler.artefact.folder import Folder
from qcompiler.artefact.loading import read_program, reading
from qcompiler.artefact.strict_json import AGAIN
from qcompiler.compiler.model import CompiledModel, callable_of
from qcompiler.compiler.sharded_loading import load_on
from qcompiler.decoding.decoder import Decoder, is_decoder
from qcompiler.decoding.tokenizers import read_tokenizer
from qcompiler.distributed.simulation import SimulatedMesh
from qcompiler.errors import ArtefactError, QCompilerError
from qcompiler.program.folder_kinds import advice, checked_path
from qcompiler.program.program import Program, plain_torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def load(
    folder: str | os.PathLike[str],
    *,
    device: "torch.device | str | None" = None,
    verify: bool = False,
    regenerate: bool = False,
    trust: Collection[str] = (),
    mesh: "SimulatedMesh | DeviceMesh | None" = None,
) -> Any:
    """Loads the `CompiledModel` or the `Decoder` that `save` wrote, bit for bit.

    Verifies the hashes of all text files, and the sizes and headers of weight files. On the CPU, weights are read on
    first use: do not change the files until then.

    Args:
        folder: The folder passed to `save`.
        device: The device for the model; by default the one it was compiled for.
        verify: Whether to read all weights now and verify their hashes.
        regenerate: Whether to accept that this version of qcompiler generates a different host module for the graph
            than the version that saved it. The newly generated module runs.
        trust: Namespaces of operators that the graph may call, in addition to torch's own.
        mesh: For a sharded model, the mesh for which it was compiled. With a device mesh, all ranks make this call,
            and each reads its own weights only; `qcompiler.simulated_mesh(tp=2)` reads all of them.

    Raises:
        ArtefactError: A file is missing, damaged, edited, unknown or newer; the model cannot run here; or it is for
            another mesh.
        QCompilerError: Another rank has failed, or has read another artefact.
    """
    path = checked_path(folder, ArtefactError).resolve()
    try:
        with plain_torch():
            if mesh is not None:
                return load_on(mesh, path, device, partial(_rank, verify, regenerate, trust))
            with reading(path) as opened:
                _check_whole(opened)
                program = read_program(opened, device, verify, regenerate, trust)
                if is_decoder(program):
                    return Decoder(program, *read_tokenizer(opened))
            return callable_of(program, CompiledModel)
    except QCompilerError as error:
        if not path.exists():
            error.fix = error.fix or advice(Path(folder))
        raise
    except Exception as error:  # report any damage in the files as one error
        raise ArtefactError(
            "the artefact cannot be loaded",
            got=f"{type(error).__name__}: {error}",
            where=str(path),
            fix=f"{AGAIN} If it was not edited, please report this.",
        ) from error


def _rank(verify: bool, regenerate: bool, trust: Collection[str], folder: Folder, device: Any, rank: int) -> Program:
    return read_program(folder, device, verify, regenerate, trust, rank)


def _check_whole(folder: Folder) -> None:
    """Raises ArtefactError for a sharded model."""
    if (division := folder.manifest.division) is not None:
        names = division.mesh.replace(" ", "")
        fix = f"Load it on a mesh: load(folder, mesh=qcompiler.simulated_mesh({names})), or on a device mesh."
        got = f"a model for {len(division.ranks)} ranks"
        raise ArtefactError("the artefact needs a mesh", got=got, need=division.mesh, where=str(folder.path), fix=fix)
