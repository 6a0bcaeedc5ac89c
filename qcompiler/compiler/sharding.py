"""Compiled models on a mesh: all ranks in this process, or this process as one rank.

compiled = qcompiler.compile(model, mesh=qcompiler.simulated_mesh(tp=2))
compiled(ids)                     # all ranks in lock-step; the result of rank 0
compiled.ranks[1].graph           # the program of one rank
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch

from qcompiler.compiler.model import CompiledModel, callable_of
from qcompiler.compiler.pending import PendingModel
from qcompiler.decoding.sharded import ShardedDecoder, whole_only
from qcompiler.distributed.agreement import check_same
from qcompiler.distributed.communicator import Communicator, communicating
from qcompiler.distributed.simulation import SimulatedMesh, Simulation
from qcompiler.errors import PassError, QCompilerError
from qcompiler.ir import Mesh
from qcompiler.pass_manager.instruments import within
from qcompiler.program.batches import Call
from qcompiler.program.program import Program, Settings
from qcompiler.runtime.executable import run_host
from qcompiler.schemes.sharded import sharded


class ShardedModel(CompiledModel):
    """A compiled model whose weights are divided among the ranks of a mesh."""

    def run_ranks(self, programs: Sequence[Callable[[], Any]]) -> list[Any]:
        """Calls one function per rank of this process, with the collectives of the ranks connected."""
        return [program() for program in programs]

    def save(self, *_: Any, **__: Any) -> NoReturn:
        """Raises QCompilerError: an artefact holds the weights of a whole model."""
        raise whole_only("model", "cannot be saved")

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
        communicator: How it reaches the other ranks; None for a rank of a simulation, which cannot be called alone.
        mesh: The mesh of the ranks; only with a communicator.
    """

    communicator: ClassVar[Communicator | None] = None
    mesh: ClassVar[Mesh]

    def run_ranks(self, programs: Sequence[Callable[[], Any]]) -> list[Any]:
        """Calls the function of this rank."""
        if self.communicator is None:
            return super().run_ranks(programs)
        with communicating(self.communicator):
            return super().run_ranks(programs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.run_ranks([partial(super()._call, args, kwargs)])[0]

    def _programs(self, pending: PendingModel, call: Call | None) -> Program:
        program = super()._programs(pending, call)
        if self.communicator is not None:
            check_same(program.graph.text(locations=False), self.communicator, self.mesh, program.device)
        return program


class SimulatedModel(ShardedModel):
    """A sharded model whose ranks all run in this process; its graph, stages and report belong to rank 0.

    Attributes:
        mesh: The mesh of the ranks.
        sharding: The tactic.
    """

    mesh: ClassVar[Mesh]
    sharding: ClassVar[str]
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
        self._ranks = tuple(RankModel(program) for program in programs)
        return programs[0]


def _copy(given: Any) -> Any:
    """An input for another rank, which may write to it."""
    return given.clone() if isinstance(given, torch.Tensor) else given


def for_rank(settings: Settings, mesh: Mesh, sharding: str, rank: int) -> Settings:
    """The settings with the pipeline of one rank."""
    return replace(settings, pipeline=sharded(settings.passes, mesh, sharding, rank))


def model_on(mesh: Any, sharding: str, pending: PendingModel) -> ShardedModel:
    """The model to be captured on a mesh: simulated, or a device mesh of torch.distributed.

    Raises:
        PassError: The mesh is of a wrong type or does not have the axis of the tactic, or the tactic is unknown.
        QCompilerError: This process is not in the mesh, or its axes have no names.
    """
    if isinstance(mesh, SimulatedMesh):
        for_rank(pending.settings, mesh.mesh, sharding, 0)  # errors before the model is captured
        return callable_of(pending, SimulatedModel, mesh=mesh.mesh, sharding=sharding)
    from qcompiler.distributed.process_groups import ProcessGroups, is_device_mesh, mesh_of

    if not is_device_mesh(mesh):
        need = "a DeviceMesh of torch.distributed, or qcompiler.simulated_mesh(tp=2)"
        raise PassError("the mesh is of a wrong type", got=type(mesh).__name__, need=need)
    grid, rank = mesh_of(mesh)
    pending.settings = for_rank(pending.settings, grid, sharding, rank)
    return callable_of(pending, RankModel, communicator=ProcessGroups(mesh), mesh=grid)


def decoder_of(compiled: ShardedModel, tokenizer: Any, generation: Mapping[str, Any]) -> ShardedDecoder:
    """The decoder of a sharded model whose last pass before the target's is `kv-cache`."""
    programs = [rank.program for rank in compiled.ranks]
    return ShardedDecoder(programs, compiled.run_ranks, tokenizer, generation)
