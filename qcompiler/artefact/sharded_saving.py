"""Saves a sharded model: the texts of rank 0, and the weights of each rank in its own subfolder.

    manifest.json   report.json   host.py   stages/…
    rank-00000/weights.safetensors
    rank-00001/weights.safetensors

One process writes all ranks, one after the other, or each rank writes its own weights into a folder that rank 0 made.
The folder gets its name when all ranks are done, so that a save that was interrupted is never loaded.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

from qcompiler.artefact.folder import check_replaceable
from qcompiler.artefact.manifest import Division, Stored
from qcompiler.artefact.saving import (
    checked_target,
    failed,
    plan_of,
    stored_as,
    texts_of,
    write_index,
    write_texts,
    write_weights,
)
from qcompiler.artefact.weight_files import Written
from qcompiler.distributed.agreement import Ranks
from qcompiler.errors import ArtefactError
from qcompiler.files.replacing import replacing
from qcompiler.ir import Mesh
from qcompiler.program.program import Program
from qcompiler.runtime.weights import Weights

NONE: Mapping[str, str] = MappingProxyType({})


def write_each(
    folder: Path, programs: Iterable[Program], mesh: Mesh, sharding: str, shard_bytes: int,
    beside: Mapping[str, str] = NONE,
) -> Program:  # fmt: skip
    """Writes the programs of all ranks, in order, and returns the first, without its weights.

    Args:
        folder: A new folder, or an artefact to replace.
        programs: The programs; each is released before the next is requested.
        mesh: The mesh.
        sharding: How the model is divided.
        shard_bytes: As for `save`.
        beside: Further text files: name -> text.

    Raises:
        ArtefactError: The folder exists and is not an artefact, or cannot be written.
    """
    target, save = checked_target(folder, shard_bytes), uuid4().hex
    shared: Program | None = None
    files: dict[str, Written] = {}
    ranks: list[Stored] = []
    with replacing(target, failed) as work:
        for program in programs:
            if shared is None:
                files |= write_texts(work, texts_of(program, beside))
            plan = plan_of(program, shard_bytes)
            ranks.append(stored_as(plan, write_weights(work, plan, files, _below(len(ranks)), save)))
            shared = shared or _without_weights(program)
            del program, plan
        if shared is None:
            raise ArtefactError("there are no ranks to save", got=mesh)
        write_index(work, shared, files, Stored(), Division(str(mesh), sharding, save, tuple(ranks)))
        check_replaceable(target)
    return shared


def write_together(
    folder: Path, program: Program, ranks: Ranks, sharding: str, shard_bytes: int, beside: Mapping[str, str] = NONE
) -> None:
    """Writes the program of this rank, while the other ranks write theirs to the same folder.

    Args:
        folder: As for `write_each`; a folder that all ranks see.
        program: The program of this rank.
        ranks: All ranks, which must make this call.
        sharding: How the model is divided.
        shard_bytes: As for `save`.
        beside: Further text files, which rank 0 writes.

    Raises:
        ArtefactError: On rank 0 as for `write_each`, and on any rank that cannot write.
        QCompilerError: Another rank has failed.
    """
    files: dict[str, Written] = {}
    with ExitStack() as stack:

        def begin() -> str:
            work = stack.enter_context(replacing(checked_target(folder, shard_bytes), failed))
            files.update(write_texts(work, texts_of(program, beside)))
            return json.dumps([str(work), uuid4().hex])

        def own_weights() -> str:
            plan, own = plan_of(program, shard_bytes), dict[str, Written]()
            try:
                names = write_weights(work, plan, own, _below(ranks.rank), save)
            except OSError as error:
                fix = "All ranks must see the folder."
                raise ArtefactError("the artefact cannot be saved", got=error, where=str(work), fix=fix) from error
            return json.dumps([asdict(stored_as(plan, names)), {name: asdict(each) for name, each in own.items()}])

        def finish() -> str:
            division = Division(str(ranks.mesh), sharding, save, tuple(_stored(each) for each, _ in parts))
            for _, own in parts:
                files.update({name: Written(**each) for name, each in own.items()})
            write_index(work, program, files, Stored(), division)
            check_replaceable(folder.resolve())
            stack.close()  # the folder takes its place
            return ""

        where, save = json.loads(ranks.first(begin))
        work = Path(where)
        parts = [json.loads(text) for text in ranks.each(own_weights)]
        ranks.first(finish)


def _below(rank: int) -> str:
    return f"rank-{rank:05d}/"


def _stored(value: Mapping[str, Any]) -> Stored:
    return Stored(tuple(value["files"]), value["aliases"], value["layouts"])


def _without_weights(program: Program) -> Program:
    graph = program.graph.clone()
    graph.weights = Weights()
    return replace(program, graph=graph)
