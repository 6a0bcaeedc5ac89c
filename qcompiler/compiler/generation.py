"""Text generation from a compiled model: its decoder, and what to call instead of `generate`."""

from typing import Any, NoReturn

from qcompiler.compiler.views import ProgramViews
from qcompiler.decoding.decoder import Decoder
from qcompiler.decoding.lengths import checked_length
from qcompiler.decoding.loop import CHUNK
from qcompiler.errors import QCompilerError


class Generation(ProgramViews):
    """Makes decoders from compiled causal language models."""

    def decoder(
        self,
        *,
        kv_cache: str | None = None,
        max_batch: int = 16,
        max_length: int | None = None,
        max_chunk: int = CHUNK,
        tokenizer: Any = None,
    ) -> Decoder:
        """Returns a decoder that shares this model's weights: see `qcompiler.decoder` for the arguments.

        Capture the model with token ids only, or with `position_ids` that count up: an attention mask hides whether
        attention is causal.

        Raises:
            PassError: The model is not causal, which the message explains.
            CaptureError: The model is not captured yet.
            InputError: The cache does not fit into memory, or the model has fewer positions than `max_length`.
        """
        length = checked_length(max_length, self.program.original.config())
        return Decoder.of(self.program, kv_cache, max_batch, length, tokenizer, max_chunk=max_chunk)

    def generate(self, *_: Any, **__: Any) -> NoReturn:
        """Raises QCompilerError: a compiled model is one forward pass; its decoder generates."""
        raise QCompilerError(
            "a compiled model computes one forward pass and does not generate",
            fix="Make a decoder from it: compiled.decoder(max_batch=…, max_length=…).generate(prompts), or from the "
            "original model: qcompiler.decoder(model).",
        )
