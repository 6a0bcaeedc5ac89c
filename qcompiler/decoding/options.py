"""The options of `generate` and `stream`, checked, for each prompt."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler.decoding.prompts import needed
from qcompiler.decoding.sampling import Sampling
from qcompiler.errors import InputError


@dataclass(frozen=True)
class Options:
    """The options as the user gave them; `Generator.generate` documents them."""

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: "int | Sequence[int]"
    stop: "str | Sequence[str]"
    stop_tokens: Sequence[int] | None
    ignore_eos: bool

    def samplings(self, count: int) -> list[Sampling]:
        """Returns how the tokens of each of `count` prompts are chosen; InputError if a value is wrong."""
        given: dict[str, Any] = {
            "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }  # fmt: skip
        settings = {name: value for name, value in given.items() if value is not None}
        return [Sampling(**settings, seed=seed) for seed in self._seeds(count)]

    def _seeds(self, count: int) -> list[Any]:
        if not isinstance(self.seed, Sequence):
            first = Sampling(seed=self.seed).seed  # checked before it is counted up
            return [first + number for number in range(count)]
        if len(self.seed) != count:
            raise InputError("there must be one seed for each prompt", got=f"{len(self.seed)} seeds", need=count)
        return list(self.seed)

    def stop_strings(self, tokenizer: Any) -> tuple[str, ...]:
        """Returns the stop strings; InputError if one is empty, or there is no tokenizer."""
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if wrong := [each for each in found if not isinstance(each, str) or not each]:
            raise InputError("a stop string is wrong", got=repr(wrong[0]), need="a text that is not empty")
        if found:
            needed(tokenizer, "a stop string")
        return found

    def ends(self, usual: Sequence[int], vocabulary: int) -> frozenset[int]:
        """Returns the tokens that end a sequence; InputError if one is not in the vocabulary."""
        if self.stop_tokens is None:
            return frozenset() if self.ignore_eos else frozenset(usual)
        if not isinstance(self.stop_tokens, Iterable):
            raise InputError("stop_tokens is of a wrong type", got=repr(self.stop_tokens), need="a list of token ids")
        for token in self.stop_tokens:
            if not isinstance(token, int) or not 0 <= token < vocabulary:
                need = f"token ids from 0 to {vocabulary - 1}"
                raise InputError("a stop token is not in the vocabulary", got=repr(token), need=need)
        if self.ignore_eos:
            raise InputError("both stop_tokens and ignore_eos are given", need="one of them")
        return frozenset(self.stop_tokens)
