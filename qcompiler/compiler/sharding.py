"""Compiled models on a mesh: all ranks in this process, or this process as one rank.

compiled = qcompiler.compile(model, mesh=qcompiler.simulated_mesh(tp=2))
compiled(ids)                     # all ranks in lock-step; the result of rank 0
compiled.ranks[1].graph           # the program of one rank
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch

from codegen.gemm.tuner import Tuning
from codegen.launching.warmup import Warmup
from qcompiler import knobs
from qcompiler.artefact.sharded_saving import write_each, write_together
from qcompiler.artefact.weight_files import SHARD_BYTES
from qcompiler.compiler.model import CompiledModel, callable_of
from qcompiler.compiler.pending import PendingModel
from qcompiler.decoding.sharded import ShardedDecoder, whole_only
from qcompiler.distributed.agreement import Ranks, hash_of
from qcompiler.distributed.communicator import communicating
from qcompiler.distributed.simulation import SimulatedMesh, Simulation
from qcompiler.errors import ArtefactError, PassError, QCompilerError
from qcompiler.ir import Mesh
from qcompiler.pass_manager.instruments import within
from qcompiler.program.batches import Call
from qcompiler.program.folder_kinds import checked_path
from qcompiler.program.program import Program, Settings, capturing, plain_torch
from qcompiler.runtime.executable import run_host
from qcompiler.schemes.sharded import divided, sharded
from qcompiler.schemes.tactics import Sharding

TACTIC = "tp"
"""How models are divided by default."""


class ShardedModel(CompiledModel):
    """A compiled model whose weights are divided among the ranks of a mesh."""

    def run_ranks(self, programs: Sequence[Callable[[], Any]]) -> list[Any]:
        """Calls one function per rank of this process, with the collectives of the ranks connected."""
        return [program() for program in programs]

    def save(self, folder: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES) -> None:
        """Writes the model to a folder that `qcompiler.load` reads, with the weights of each rank in a subfolder.

        With a device mesh, all ranks make this call, and see the same folder.

        Args:
            folder: As for an unsharded model.
            shard_bytes: Weights of a rank larger than this in total are split into several files.

        Raises:
            ArtefactError: As for an unsharded model.
            QCompilerError: Another rank has failed.
        """
        self.write(folder, shard_bytes, {})

    def write(self, folder: str | os.PathLike[str], shard_bytes: int, beside: Mapping[str, str]) -> None:
        """Saves the model, with further text files. Raises QCompilerError for one rank of a simulation."""
        raise QCompilerError(
            "one rank of a simulation cannot be saved", fix="Save the compiled model, with all of its ranks."
        )

    def save_checkpoint(self, *_: Any, **__: Any) -> NoReturn:
        """Raises QCompilerError: a checkpoint holds the weights of a whole model."""
        raise whole_only("model", "cannot be saved as a checkpoint")

    def decoder(self, *_: Any, **__: Any) -> NoReturn:
        """Raises QCompilerError: the passes for a cache run before the target's."""
        raise QCompilerError(
            "a sharded model cannot become a decoder",
            fix="Make one from the original: qcompiler.decoder(…, mesh=mesh).",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Raises QCompilerError: the ranks would no longer be connected."""
        raise whole_only("model", "cannot be copied")


class RankModel(ShardedModel):
    """The program of one rank, with its own parts of the weights.

    Attributes:
        connected: All ranks; None for a rank of a simulation, which cannot be called alone.
        sharding: The tactics.
    """

    connected: ClassVar[Ranks | None] = None
    sharding: ClassVar[Sharding]

    def run_ranks(self, programs: Sequence[Callable[[], Any]]) -> list[Any]:
        """Calls the function of this rank."""
        if self.connected is None:
            return super().run_ranks(programs)
        with communicating(self.connected.communicator):
            return super().run_ranks(programs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.run_ranks([partial(super()._call, args, kwargs)])[0]

    def warmup(self, *calls: Any, **options: Any) -> Warmup:
        """See `CompiledModel.warmup`. Nothing is sent, so a rank can call it alone."""
        found: Warmup = self.run_ranks([partial(super().warmup, *calls, **options)])[0]
        return found

    def tune(self, *calls: Any, **options: Any) -> Tuning:
        """See `CompiledModel.tune`. All ranks make this call, with arguments of the same sizes.

        A configuration takes as long as on the slowest rank, and all ranks use the same configurations.

        Raises:
            QCompilerError: Another rank has failed.
            CodegenError: The calls of the ranks have other sizes.
        """
        found: Tuning = self.run_ranks([partial(super().tune, *calls, **options)])[0]
        return found

    def _each(self, step: Callable[[], str]) -> Sequence[str]:
        return super()._each(step) if self.connected is None else self.connected.each(step)

    def _programs(self, pending: PendingModel, call: Call | None) -> Program:
        if self.connected is None:
            return super()._programs(pending, call)
        found: list[Program] = []

        def own() -> str:
            found.append(super(RankModel, self)._programs(pending, call))
            observed = found[0].calibration()
            return hash_of(found[0].graph.text(locations=False) + (observed.digest if observed is not None else ""))

        self.connected.check_same_hash(self.connected.each(own))
        return found[0]

    def write(self, folder: str | os.PathLike[str], shard_bytes: int, beside: Mapping[str, str]) -> None:
        """Saves the model together with the other ranks."""
        if self.connected is None:
            super().write(folder, shard_bytes, beside)
            return
        path = checked_path(folder, ArtefactError)
        write_together(path, self.program, self.connected, str(self.sharding), shard_bytes, beside)


class SimulatedModel(ShardedModel):
    """A sharded model whose ranks all run in this process; its graph, stages and report belong to rank 0.

    Attributes:
        mesh: The mesh of the ranks.
        sharding: The tactics.
    """

    mesh: ClassVar[Mesh]
    sharding: ClassVar[Sharding]
    _ranks: tuple[RankModel, ...] = ()

    @property
    def ranks(self) -> tuple[CompiledModel, ...]:
        """The compiled models of all ranks; CaptureError if the model is not captured yet."""
        _ = self.program
        return self._ranks

    def run_ranks(self, programs: Sequence[Callable[[], Any]]) -> list[Any]:
        """Calls one function per rank, each in a thread."""
        return Simulation(self.mesh).run(programs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        program = self._state
        if isinstance(program, PendingModel):
            program = self._compile_now(program, (args, kwargs))
        inputs, without = program.signature.bind(args, kwargs)
        given = [inputs, *(list(map(_copy, inputs)) for _ in self.ranks[1:])]
        ranks = zip(self.ranks, given, strict=True)
        outputs = self.run_ranks([partial(run_host, rank.program.run, rank.weights, own) for rank, own in ranks])
        for rank, found in enumerate(outputs):
            if not all(within(old, new, None) for old, new in zip(outputs[0], found, strict=True)):
                raise QCompilerError("the ranks return different results", got=f"ranks 0 and {rank}")
        return program.signature.unflatten(outputs[0], without)

    def _programs(self, pending: PendingModel, call: Call | None) -> Program:
        settings = [for_rank(pending.settings, self.mesh, self.sharding, rank) for rank in range(self.mesh.size)]
        programs = pending.compile_each(call, settings)
        self.take(programs)
        return programs[0]

    def take(self, programs: Sequence[Program]) -> None:
        """Keeps the programs of all ranks."""
        self._ranks = tuple(RankModel(program) for program in programs)

    def write(self, folder: str | os.PathLike[str], shard_bytes: int, beside: Mapping[str, str]) -> None:
        """Saves all ranks."""
        programs = [rank.program for rank in self.ranks]
        write_each(checked_path(folder, ArtefactError), programs, self.mesh, str(self.sharding), shard_bytes, beside)

    def compile_into(self, folder: str | os.PathLike[str], call: Call | None) -> Program:
        """Captures the model, and compiles and saves one rank after the other, of which one is in memory at a time.

        Args:
            folder: As for `save`.
            call: The arguments of one real call; None for a graph or an exported program.

        Returns:
            The program of rank 0, without its weights.
        """
        pending, path = self._state, checked_path(folder, ArtefactError)
        if not isinstance(pending, PendingModel):
            self.save(folder)
            return pending
        settings = [for_rank(pending.settings, self.mesh, self.sharding, rank) for rank in range(self.mesh.size)]
        with capturing, plain_torch():
            return write_each(path, pending.in_turn(call, settings), self.mesh, str(self.sharding), SHARD_BYTES)


def _copy(given: Any) -> Any:
    """An input for another rank, which may write to it."""
    return given.clone() if isinstance(given, torch.Tensor) else given


def for_rank(settings: Settings, mesh: Mesh, sharding: Sharding, rank: int) -> Settings:
    """The settings with the pipeline of one rank, which fails if the tactics divide nothing."""
    given = (settings.passes, mesh, sharding, rank)
    return replace(settings, pipeline=sharded(*given), instruments=(*settings.instruments, divided(*given)))


def checked_sharding(given: Any, mesh: Any) -> Sharding:
    """The tactics, by default `TACTIC`. Raises PassError if they are malformed, or given without a mesh."""
    if given is not None and mesh is None:
        fix = "Give a mesh, such as mesh=qcompiler.simulated_mesh(tp=2)."
        raise PassError("a sharding needs a mesh", got=f"sharding={str(given)!r} and no mesh", fix=fix)
    if not isinstance(given, Sharding | str | None):
        need = 'a text such as "tp; sp", or a qcompiler.Sharding'
        raise PassError("the sharding is of a wrong type", got=type(given).__name__, need=need)
    return given if isinstance(given, Sharding) else Sharding.parse(TACTIC if given is None else given)


def model_on(mesh: Any, sharding: Sharding, pending: PendingModel) -> ShardedModel:
    """The model to be captured on a mesh: simulated, or a device mesh of torch.distributed.

    Raises:
        PassError: The mesh is of a wrong type or does not have the axis of a tactic.
        QCompilerError: This process is not in the mesh, or its axes have no names.
    """
    grid, connected = connection(mesh)
    if connected is None:
        for_rank(pending.settings, grid, sharding, 0)  # errors before the model is captured
        return callable_of(pending, SimulatedModel, mesh=grid, sharding=sharding)
    pending.settings = for_rank(pending.settings, grid, sharding, connected.rank)
    return callable_of(pending, RankModel, connected=connected, sharding=sharding)


def connection(mesh: Any) -> tuple[Mesh, Ranks | None]:
    """A mesh, and its ranks as this process sees them; None for a simulation.

    Raises:
        PassError: The mesh is of a wrong type.
        QCompilerError: This process is not in the mesh, or its axes have no names.
    """
    if isinstance(mesh, SimulatedMesh):
        return mesh.mesh, None
    from codegen.peer_memory import PeerMemory
    from qcompiler.distributed.process_groups import NoPeers, ProcessGroups, is_device_mesh, mesh_of

    if not is_device_mesh(mesh):
        need = "a DeviceMesh of torch.distributed, or qcompiler.simulated_mesh(tp=2)"
        raise PassError("the mesh is of a wrong type", got=type(mesh).__name__, need=need)
    grid, rank = mesh_of(mesh)
    peers = PeerMemory() if knobs.current().peer_memory else NoPeers()
    return grid, Ranks(ProcessGroups(mesh, peers), grid, rank, torch.device(mesh.device_type))


def model_of(programs: Sequence[Program], mesh: Mesh, connected: Ranks | None, sharding: str) -> ShardedModel:
    """The compiled model of the programs of this process: of all ranks of a simulation, or of one rank."""
    tactics = Sharding.parse(sharding)
    if connected is not None:
        return callable_of(programs[0], RankModel, connected=connected, sharding=tactics)
    model = callable_of(programs[0], SimulatedModel, mesh=mesh, sharding=tactics)
    model.take(programs)
    return model


def together(mesh: Any) -> AbstractContextManager[None]:
    """A block in which an error of this rank of a device mesh is one of all ranks: they do not wait for it."""
    connected = None if mesh is None else connection(mesh)[1]
    return nullcontext() if connected is None else connected.together()


def decoder_of(compiled: ShardedModel, tokenizer: Any, generation: Mapping[str, Any]) -> ShardedDecoder:
    """The decoder of a sharded model whose last pass before the target's is `kv-cache`."""
    programs = [rank.program for rank in compiled.ranks]
    return ShardedDecoder(programs, compiled.run_ranks, tokenizer, generation, compiled.write)
