"""Generates texts and lists of ids from prompts, with a model that is seen only as a `Step`."""

from collections.abc import Generator as Pieces
from collections.abc import Sequence
from typing import Any

from qcompiler.decoding.answers import Answer, Stream
from qcompiler.decoding.graphs import CudaRecorder, Decode, DirectDecode, RecordedDecode
from qcompiler.decoding.loop import CHUNK, Loop
from qcompiler.decoding.options import Options
from qcompiler.decoding.prompts import Prompt, prompts_of
from qcompiler.decoding.requests import Request, checked_limit, checked_prompt
from qcompiler.decoding.slot_table import SlotTable
from qcompiler.decoding.step import Step
from qcompiler.decoding.texts import TextStream
from qcompiler.errors import InputError


class Generator:
    """Generates with a step.

    Args:
        step: The model over its cache.
        tokenizer: One of transformers; None if prompts and answers are ids.
        stop_tokens: Tokens that end a sequence.
        chunk: Positions that one prefill call computes, padding included.
    """

    def __init__(
        self, step: Step, tokenizer: Any = None, stop_tokens: Sequence[int] = (), *, chunk: int = CHUNK
    ) -> None:
        self.step, self.tokenizer, self.stop_tokens = step, tokenizer, tuple(stop_tokens)
        table = SlotTable(step)
        recorded = step.device.type == "cuda"
        self._decode: Decode = RecordedDecode(table, CudaRecorder(step.device)) if recorded else DirectDecode(table)
        self._loop = Loop(table, self._decode, chunk=chunk)

    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
        ignore_eos: bool = False,
    ) -> Any:
        """Returns the continuation of each prompt: a text for a text or a chat, a list of new ids for ids.

        Args:
            prompts: A text, a list of chat messages `{"role": …, "content": …}`, a list of token ids, or any number of
                these in a list: prompts beyond `max_batch` wait for a free slot.
            max_new_tokens: Maximum number of new tokens; by default 256, or fewer if `max_length` is reached.
            temperature: Divides the logits. Without it, or with 0, the most likely token is chosen.
            top_k: Samples from this many most likely tokens.
            top_p: Samples from the most likely tokens whose probabilities reach this sum.
            min_p: Samples from tokens at least this times as likely as the most likely one.
            repetition_penalty: Makes tokens of the sequence so far less likely, if larger than 1.
            seed: Prompt i uses seed + i; or one seed for each prompt. A prompt with the same seed has the same answer
                in any batch, up to rounding of the logits.
            stop: Strings that end the answer; its text is cut before them. Needs a tokenizer.
            stop_tokens: Tokens that end the answer, as its last id; by default the model's end-of-text tokens.
            ignore_eos: Whether to continue after the model's end-of-text tokens, as for benchmarks.

        Raises:
            InputError: A prompt is empty, too long, or has an id outside the vocabulary; or an option is wrong.
        """
        options = Options(
            max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, stop_tokens, ignore_eos
        )
        found, several = prompts_of(prompts, self.tokenizer)
        answers, requests = self._prepared(found, options, several)
        for produced in self._loop.run(requests):
            if produced.ended:
                answers[produced.request].finish()
        made = [answer.text if prompt.is_text else answer.ids for prompt, answer in zip(found, answers, strict=True)]
        return made if several else made[0]

    def stream(
        self,
        prompt: Any,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
        ignore_eos: bool = False,
    ) -> Stream:
        """Returns an iterator over the answer to one prompt as it is generated: pieces of text, or ids.

        Takes the arguments of `generate`. Pieces of text together are the text that `generate` returns; text that
        a stop string may begin in is held back until that is decided.

        Raises:
            InputError: As for `generate`, or several prompts are given.
        """
        options = Options(
            max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, stop_tokens, ignore_eos
        )
        found, several = prompts_of(prompt, self.tokenizer)
        if several:
            raise InputError("only one prompt can be streamed", got=f"a list of {len(found)}", fix="Call generate().")
        answers, requests = self._prepared(found, options, several)
        return Stream(answers[0], self._pieces(answers[0], requests, found[0].is_text))

    @property
    def runs(self) -> int:
        """Number of times that the cache was overwritten."""
        return self._loop.runs

    def warmup(self) -> None:
        """Compiles kernels and records CUDA graphs now, not when they are first needed; does nothing on a CPU."""
        self._decode.warm_up()

    def _pieces(self, answer: Answer, requests: Sequence[Request], is_text: bool) -> Pieces[Any, None, None]:
        shown = 0
        for produced in self._loop.run(requests):
            if produced.ended:
                answer.finish()
            if not is_text:
                yield produced.token
            elif len(answer.text) > shown:
                yield answer.text[shown:]
                shown = len(answer.text)

    def _prepared(
        self, prompts: Sequence[Prompt], options: Options, several: bool
    ) -> tuple[list[Answer], list[Request]]:
        """Returns the answers to fill and the requests that fill them; InputError before anything runs."""
        strings, ends = options.stop_strings(self.tokenizer), options.ends(self.stop_tokens, self.step.vocabulary)
        samplings, capacity = options.samplings(len(prompts)), self.step.capacity
        answers, requests = [], []
        for place, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            where = f"prompt {place}" if several else "the prompt"
            ids = checked_prompt(prompt.ids, self.step.vocabulary, capacity, where)
            limit = checked_limit(options.max_new_tokens, len(ids), capacity, where)
            text = TextStream(self.tokenizer, strings) if prompt.is_text or strings else None
            answers.append(Answer(ends, text))
            requests.append(Request(ids, limit, sampling, answers[-1].take))
        return answers, requests
