"""Decoders of sharded models: one generation loop drives the ranks that are in this process.

In a simulation, each step runs on all ranks, each with the cache of its own heads. With torch.distributed, each process
runs its own loop. Ranks choose equal tokens: their logits are equal, and the noise of sampling depends only on seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from torch import Tensor

from qcompiler.decoding.decoder import Decoder
from qcompiler.decoding.step import CompiledStep, compiled_step
from qcompiler.errors import QCompilerError
from qcompiler.program.program import Program

Runner = Callable[[Sequence[Callable[[], Tensor]]], Sequence[Tensor]]
"""Runs one function per rank of this process, with the collectives of the ranks connected."""


class ShardedStep(CompiledStep):
    """One step of a sharded language model: of the first rank, and of the other ranks in this process with it."""

    def __init__(self, programs: Sequence[Program], run: Runner) -> None:
        self._ranks = [compiled_step(program) for program in programs]
        super().__init__(programs[0], self._ranks[0].caches)
        self._run_ranks = run

    def __call__(
        self, input_ids: Tensor, slots: Tensor, lengths: Tensor, last: Tensor, start: int | None = None
    ) -> Tensor:
        """Appends tokens to the caches of all ranks and returns the logits of the first: see `Step`."""
        return self._run_ranks([partial(rank, input_ids, slots, lengths, last, start) for rank in self._ranks])[0]


class ShardedDecoder(Decoder):
    """A decoder whose weights and caches are divided among the ranks of a mesh.

    Its graph, report and memory belong to the first rank in this process.

    Args:
        programs: The programs of the ranks in this process, whose last pass is `kv-cache`.
        run: Runs the ranks.
        tokenizer: As for `Decoder`.
        generation: As for `Decoder`.
    """

    def __init__(
        self, programs: Sequence[Program], run: Runner, tokenizer: Any, generation: Mapping[str, Any] | None
    ) -> None:
        super().__init__(programs[0], tokenizer, generation, step=ShardedStep(programs, run))

    def save(self, *_: Any, **__: Any) -> NoReturn:
        """Raises QCompilerError: an artefact holds the weights of a whole model."""
        raise whole_only("decoder", "cannot be saved")

    def save_checkpoint(self, *_: Any, **__: Any) -> NoReturn:
        """Raises QCompilerError: a checkpoint holds the weights of a whole model."""
        raise whole_only("decoder", "cannot be saved as a checkpoint")

    def for_transformers(self) -> NoReturn:
        """Raises QCompilerError: transformers would call one rank only."""
        raise whole_only("decoder", "cannot become a model of transformers")


def whole_only(kind: str, what: str) -> QCompilerError:
    """The error for what only an unsharded model or decoder can do."""
    return QCompilerError(f"a sharded {kind} {what}", fix="Compile the model without a mesh for that.")
