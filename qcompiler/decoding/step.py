"""The interface between the generation loop and the model that it runs, and the step of a compiled model.

step = compiled_step(program)                  # the last pass of the program is kv-cache
logits = step(input_ids, slots, lengths, last)
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from codegen.cpu.gemm import kept_bytes
from qcompiler.decoding.vocabulary import VocabularyParts
from qcompiler.errors import InputError, QCompilerError
from qcompiler.ir import Value
from qcompiler.program.program import Program
from qcompiler.runtime.caches import Cache, allocate, cache_types, rings
from qcompiler.runtime.executable import HostWeights, run_host

UNKNOWN = -1
"""The graph input `start` if the host does not know the lengths."""


Logits = Tensor | VocabularyParts
"""float[B, V]; or the parts of several ranks."""


def all_logits(logits: Logits) -> Tensor:
    """The logits of the whole vocabulary."""
    return logits if isinstance(logits, Tensor) else logits.whole()


class Step(Protocol):
    """A causal language model over a KV cache with `slots` independent sequences.

    Attributes:
        vocabulary: Number of logits a token.
        slots: Number of sequences that the cache holds.
        capacity: Positions of each slot.
        chunk: Largest number of tokens per row in one call, padding included.
        device: Where inputs and logits are.
    """

    vocabulary: int
    slots: int
    capacity: int
    chunk: int
    device: torch.device

    def __call__(
        self, input_ids: Tensor, slots: Tensor, lengths: Tensor, last: Tensor, start: int | None = None
    ) -> Logits:
        """Appends tokens to the cache and returns the logits after one of them in each row, float[B, V].

        Args:
            input_ids: i64[B, S]. Rows may be padded on the right: positions after `last` are overwritten later.
            slots: i64[B], the slot of each row.
            lengths: i64[B], the positions of the slot that are already in the cache.
            last: i64[B], the index in the row of the token whose logits are returned.
            start: The length of all rows, if the caller knows it; long chunks are faster with it.
        """

    def keeps(self, start: int, written: int) -> bool:
        """Whether a slot can continue after `start` positions, although the positions before `written` were written.

        A cache of the latest positions only has overwritten earlier ones.
        """

    def reset(self) -> None:
        """Forgets all sequences."""


def step_inputs(
    slots: Sequence[int], rows: Sequence[Sequence[int]], starts: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the arguments of a step for rows of different lengths, padded on the right."""
    width = max(map(len, rows))
    ids = [[*row, *[0] * (width - len(row))] for row in rows]
    lasts = [len(row) - 1 for row in rows]
    columns = (ids, list(slots), list(starts), lasts)
    first, second, third, fourth = (torch.tensor(each, dtype=torch.int64, device=device) for each in columns)
    return first, second, third, fourth


class CompiledStep:
    """One step of a compiled language model: its host module over its weights and caches.

    A call allocates nothing that grows with the lengths of sequences, except inside one operation at a time: on a
    CPU, and on a GPU for long chunks of a prompt.

    Attributes:
        vocabulary: Number of logits per token.
        slots: Number of sequences that the caches hold.
        capacity: Positions of each slot.
        chunk: Largest number of tokens per row in one call, padding included: layers with windows may keep no more.
        device: Where inputs, caches and logits are.
        caches: Name -> cache.
    """

    def __init__(self, program: Program, caches: Mapping[str, Cache]) -> None:
        """Use `compiled_step`."""
        (output,) = (value for value in program.graph.outputs if isinstance(value, Value))
        one = next(iter(caches.values())).type
        self.vocabulary = int(str(output.tensor.shape[-1]))
        self.slots, self.capacity, self.device, self.caches = one.slots, one.capacity, program.device, caches
        self._rings = rings(program.graph)
        self.chunk = min([self.capacity, *(ring.chunk for ring in self._rings)])
        self._run, self._inputs = program.run, [value.name for value in program.graph.inputs]
        tensors = {attribute: caches[name].tensors for attribute, name in program.host.caches.items()}
        self._weights = HostWeights(program.host.weights, program.graph.weights, program.device, tensors)

    def __call__(
        self, input_ids: Tensor, slots: Tensor, lengths: Tensor, last: Tensor, start: int | None = None
    ) -> Tensor:
        """Appends tokens to the caches and returns logits: see `Step`.

        If the pass kept all logits, the result is float[B, S, V], and `last` is ignored.

        Raises:
            InputError: A row has more than `chunk` tokens. On a CPU, also: a row is outside the slots or the capacity;
                on a GPU, such tokens are not stored.
        """
        if self._rings and input_ids.shape[1] > self.chunk:
            raise InputError(
                "a call has more tokens than the caches of layers with windows allow",
                got=f"{input_ids.shape[1]} tokens per row", need=f"at most {self.chunk}",
                fix="Cut the tokens into several calls.",
            )  # fmt: skip
        given = {"slots": slots, "lengths": lengths, "last": last, "start": UNKNOWN if start is None else start}
        inputs = [given.get(name, input_ids) for name in self._inputs]
        logits: Tensor = run_host(self._run, self._weights, inputs)[0]
        return logits

    def keeps(self, start: int, written: int) -> bool:
        """Whether a slot can continue after `start` positions: see `Step`."""
        return all(ring.keeps(start, written) for ring in self._rings)

    def reset(self) -> None:
        """Does nothing: `lengths` says how much of a slot is valid."""

    @property
    def copies(self) -> int:
        """Bytes of dequantized weights that the target cpu keeps between calls, so far."""
        return kept_bytes(self._weights.buffers())


def compiled_step(program: Program, caches: Mapping[str, Cache] | None = None) -> CompiledStep:
    """Returns the step of a program whose last pass is `kv-cache`.

    Args:
        program: With slots and capacity as the pass set them.
        caches: Caches to share with another step over the same slots; by default, new ones.

    Raises:
        QCompilerError: The program reads no caches, or the given ones have other types.
    """
    need = cache_types(program.graph)
    if not need:
        raise QCompilerError("the program has no key-value cache", got=program.settings.pipeline, fix="Run kv-cache.")
    if caches is None:
        caches = {name: allocate(kind, program.device) for name, kind in need.items()}
    for name, kind in need.items():
        got = caches[name].type if name in caches else "no cache of this name"
        if got != kind:
            raise QCompilerError(f"the cache {name!r} does not fit the program", got=got, need=kind)
    return CompiledStep(program, caches)
