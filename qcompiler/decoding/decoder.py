"""A compiled language model that generates.

llm = qcompiler.decoder(folder, scheme="fp8_tile", kv_cache="fp8", max_batch=16, max_length=8192)
llm.generate("The capital of France is")
"""

import os
from collections.abc import Mapping
from functools import cached_property, partial
from importlib import import_module
from typing import Any, NoReturn

from qcompiler.artefact.saving import write_artefact
from qcompiler.artefact.weight_files import SHARD_BYTES
from qcompiler.checkpoints.writing import write
from qcompiler.decoding.cached import chunk_of, every_logits, keeps_cache, with_cache
from qcompiler.decoding.generator import Generator
from qcompiler.decoding.lengths import text_config
from qcompiler.decoding.loop import CHUNK
from qcompiler.decoding.memory import Memory, check_fits
from qcompiler.decoding.step import CompiledStep, Step, compiled_step
from qcompiler.decoding.stop_tokens import stop_tokens_of
from qcompiler.decoding.tokenizers import check_tokenizer, tokenizer_texts
from qcompiler.errors import ArtefactError, InputError, QCompilerError
from qcompiler.ir import Graph
from qcompiler.pass_manager.runner import Stages
from qcompiler.program.folder_kinds import checked_path
from qcompiler.program.program import Program
from qcompiler.report.report import Report
from qcompiler.runtime.caches import cache_types


class Decoder(Generator):
    """A compiled causal language model with its KV cache.

    Use `qcompiler.decoder`, `CompiledModel.decoder`, or `qcompiler.load`.

    Args:
        program: A program whose last pass is `kv-cache`.
        tokenizer: One of transformers, for prompts and answers in text.
        generation: Entries of the model's generation configuration.
        chunk: Positions that one prefill call computes, padding included; by default, the largest for which the cache
            was made.
        step: Runs the program; by default, in this process alone.

    Raises:
        InputError: The cache does not fit into memory, the model does not return logits, or the tokenizer is of a
            wrong type.
    """

    def __init__(
        self,
        program: Program,
        tokenizer: Any = None,
        generation: Mapping[str, Any] | None = None,
        *,
        chunk: int | None = None,
        step: CompiledStep | None = None,
    ) -> None:
        check_tokenizer(tokenizer)
        self.program, self._generation = program, dict(generation or {})
        caches = list(cache_types(program.graph).values())
        self._cache_bytes = sum(each.bytes for each in caches)
        fixed = sum(each.bytes for each in caches if each.ring is not None)
        check_fits(self._cache_bytes, program.device, caches[0].slots, caches[0].capacity, fixed)
        config = program.original.config()
        stops = stop_tokens_of(self._generation, config, tokenizer)
        self._step = step or compiled_step(program)
        _check_vocabulary(self._step.vocabulary, config)
        super().__init__(self._step, tokenizer, stops, chunk=chunk or chunk_of(program))

    @classmethod
    def of(
        cls,
        program: Program,
        kv_cache: str | None,
        max_batch: int,
        max_length: int,
        tokenizer: Any = None,
        generation: Mapping[str, Any] | None = None,
        max_chunk: int = CHUNK,
    ) -> "Decoder":
        """Returns a decoder for a program over whole sequences; `qcompiler.decoder` documents the arguments."""
        return cls(with_cache(program, kv_cache, max_batch, max_length, max_chunk), tokenizer, generation)

    @property
    def report(self) -> Report:
        """Which layers were quantized, and why the others were not."""
        return self.program.report

    @property
    def stages(self) -> Stages:
        """The graph after capture and after each pass, by name, in order."""
        return self.program.stages

    @property
    def graph(self) -> Graph:
        """The graph of one step, with the weights."""
        return self.program.graph

    @property
    def source(self) -> str:
        """The text of the host module."""
        return self.program.host.source

    @property
    def memory(self) -> Memory:
        """Bytes by purpose; weights and cache are known before the first token."""
        weights = self.program.graph.weights
        tensors = {weights[name].data_ptr(): weights[name].nbytes for name in self.program.host.weights.values()}
        return Memory(sum(tensors.values()), self._cache_bytes, self._decode.nbytes, self._step.copies)

    def save(self, folder: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES) -> None:
        """Writes an artefact with the tokenizer, from which `qcompiler.load` makes the decoder again.

        Args:
            folder: A new folder, or an artefact to replace.
            shard_bytes: Weights larger than this in total are split into several files.

        Raises:
            ArtefactError: The folder exists and is not an artefact, or cannot be written.
        """
        texts = tokenizer_texts(self.tokenizer, self._generation)
        write_artefact(checked_path(folder, ArtefactError), self.program, shard_bytes, texts)

    def save_checkpoint(self, folder: str | os.PathLike[str], format: str, **options: Any) -> None:
        """Writes a checkpoint in a common format, with the static scales of the cache: see `checkpoints.write`.

        Raises:
            QCompilerError: The message lists layers that the format cannot store; or the folder is not a checkpoint.
        """
        write(self, folder, format, **options)

    def for_transformers(self) -> Any:
        """Returns a `PreTrainedModel` with `generate`, for pipelines and evaluation harnesses of transformers.

        It computes with this decoder and its cache, so use one of both at a time.

        Raises:
            QCompilerError: The original model has no transformers configuration.
        """
        config = self.program.original.config()
        if not hasattr(config, "to_dict"):
            raise QCompilerError(
                "the decoder cannot become a model of transformers", got="an original model without a configuration",
                need="a model of transformers, or a folder",
            )  # fmt: skip
        made = import_module("qcompiler.decoding.transformers_model")
        return made.as_transformers(config, self, partial(getattr, self, "_every_logits"), self._generation)

    @cached_property
    def _every_logits(self) -> Step:
        """The step that computes the logits of all positions, over the same caches."""
        return compiled_step(every_logits(self.program), caches=self._step.caches)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raises QCompilerError: decoders cannot be pickled, and a copy would share the cache."""
        raise QCompilerError(
            "a decoder cannot be copied or pickled", fix="Save it, and load it again: qcompiler.load(folder)."
        )

    def __repr__(self) -> str:
        step = self.step
        return f"<Decoder: {step.slots} slots of {step.capacity} positions on {step.device}, {self.report.summary()}>"


def _check_vocabulary(width: int, config: Any) -> None:
    """Raises InputError if a model returns fewer numbers per token than its configuration has tokens."""
    tokens = getattr(text_config(config), "vocab_size", None)
    if isinstance(tokens, int) and width < tokens:
        fix = "Use the model with its vocabulary projection, as AutoModelForCausalLM loads it."
        got, need = f"{width} numbers for each token", f"one for each of {tokens} tokens"
        raise InputError("the model does not return logits", got=got, need=need, fix=fix)


def is_decoder(program: Program) -> bool:
    """Whether a program was made for a decoder."""
    return keeps_cache(program.graph)
