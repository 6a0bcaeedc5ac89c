"""Decoders of sharded models: one generation loop drives the ranks that are in this process.

In a simulation, each step runs on all ranks, each with the cache of its own heads. With torch.distributed, each process
runs its own loop. Ranks choose equal tokens: their logits are equal, and the noise of sampling depends only on seeds.
If each rank has the logits of a part of the vocabulary, they exchange one candidate for each sequence.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from torch import Tensor

from qcompiler.artefact.weight_files import SHARD_BYTES
from qcompiler.decoding.decoder import Decoder
from qcompiler.decoding.step import CompiledStep, Logits, compiled_step
from qcompiler.decoding.tokenizers import tokenizer_texts
from qcompiler.decoding.vocabulary import Runner, VocabularyParts
from qcompiler.errors import QCompilerError
from qcompiler.ir import Value
from qcompiler.program.program import Program

Writer = Callable[[str | os.PathLike[str], int, Mapping[str, str]], None]
"""Saves the programs of all ranks to a folder, with further texts by file name."""


class ShardedStep(CompiledStep):
    """One step of a sharded language model: of the first rank, and of the other ranks in this process with it."""

    def __init__(self, programs: Sequence[Program], run: Runner) -> None:
        self._ranks = [compiled_step(program) for program in programs]
        super().__init__(programs[0], self._ranks[0].caches)
        self._run_ranks = run
        (output,) = (value.op for value in programs[0].graph.outputs if isinstance(value, Value))
        self._parts = str(output.attrs["mesh"]) if output.name == "coll.own_part" else None
        if self._parts is not None:
            self.vocabulary *= int(str(output.attrs["ranks"]))

    def __call__(  # type: ignore[override]  # the loop also takes parts of logits
        self, input_ids: Tensor, slots: Tensor, lengths: Tensor, last: Tensor, start: int | None = None
    ) -> Logits:
        """Appends tokens to the caches of all ranks and returns their parts of the logits, or all: see `Step`."""
        found = self._run_ranks([partial(rank, input_ids, slots, lengths, last, start) for rank in self._ranks])
        return found[0] if self._parts is None else VocabularyParts(found, self._run_ranks, self._parts)


class ShardedDecoder(Decoder):
    """A decoder whose weights and caches are divided among the ranks of a mesh.

    Its graph, report and memory belong to the first rank in this process.

    Args:
        programs: The programs of the ranks in this process, whose last pass is `kv-cache`.
        run: Runs the ranks.
        tokenizer: As for `Decoder`.
        generation: As for `Decoder`.
        write: Saves the ranks.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        run: Runner,
        tokenizer: Any,
        generation: Mapping[str, Any] | None,
        write: Writer,
    ) -> None:
        super().__init__(programs[0], tokenizer, generation, step=ShardedStep(programs, run))
        self._write = write

    def save(self, folder: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES) -> None:
        """Writes an artefact with the weights of each rank in a subfolder; see `Decoder.save`.

        With a device mesh, all ranks make this call, and see the same folder.
        """
        self._write(folder, shard_bytes, tokenizer_texts(self.tokenizer, self._generation))

    def save_checkpoint(self, *_: Any, **__: Any) -> NoReturn:
        """Raises QCompilerError: a checkpoint holds the weights of a whole model."""
        raise whole_only("decoder", "cannot be saved as a checkpoint")

    def for_transformers(self) -> NoReturn:
        """Raises QCompilerError: transformers would call one rank only."""
        raise whole_only("decoder", "cannot become a model of transformers")


def whole_only(kind: str, what: str) -> QCompilerError:
    """The error for what only an unsharded model or decoder can do."""
    return QCompilerError(f"a sharded {kind} {what}", fix="Compile the model without a mesh for that.")
