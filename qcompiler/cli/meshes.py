"""Meshes on the command line: all ranks are simulated in this process.

qcompiler compile ./llama --mesh tp=2 -o artefact      one rank after the other
qcompiler generate artefact --prompt Hello             all ranks of the artefact together
"""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

import qcompiler
from qcompiler.artefact.folder import open_folder
from qcompiler.distributed.simulation import SimulatedMesh
from qcompiler.errors import ArtefactError, InputError
from qcompiler.ir import Mesh


def mesh_of(options: argparse.Namespace) -> SimulatedMesh | None:
    """The mesh of `--mesh`, if it is given. Raises InputError for `--sharding` without it."""
    if options.mesh is not None:
        return SimulatedMesh(Mesh.parse(options.mesh))
    if options.sharding is not None:
        raise InputError("--sharding needs a mesh", got=f"--sharding {options.sharding}", need="--mesh tp=2 as well")
    return None


def load_artefact(folder: str | Path, **options: Any) -> Any:
    """What `qcompiler.load` returns, for a sharded model with all of its ranks."""
    division = None
    with suppress(ArtefactError):  # raised again by `load`, with advice
        division = open_folder(Path(folder).resolve()).manifest.division
    mesh = None if division is None else SimulatedMesh(Mesh.parse(division.mesh))
    return qcompiler.load(folder, mesh=mesh, **options)
