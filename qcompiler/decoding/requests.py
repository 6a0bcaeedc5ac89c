"""One sequence to generate: prompt, limit, sampling, and when it ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qcompiler.decoding.sampling import Sampling
from qcompiler.errors import InputError


def never(token: int) -> bool:
    """Ends no sequence."""
    return False


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    Attributes:
        prompt: Token ids.
        limit: Maximum number of new tokens.
        sampling: How tokens are chosen.
        ends: Called with each new token in order; returns whether the sequence ends with it.
    """

    prompt: Sequence[int]
    limit: int
    sampling: Sampling = field(default_factory=Sampling)
    ends: Callable[[int], bool] = never


DEFAULT_LIMIT = 256
"""New tokens if the caller gives no limit, or fewer if the cache ends before."""


def checked_prompt(prompt: Sequence[int], vocabulary: int, capacity: int, where: str) -> list[int]:
    """Returns the ids of a prompt that leaves room for a new token.

    Raises:
        InputError: The prompt is empty or too long, or an id is not in the vocabulary.
    """
    ids = list(prompt)
    if not ids:
        raise InputError("a prompt is empty", need="at least one token", where=where)
    for position, token in enumerate(ids):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
            need = f"token ids from 0 to {vocabulary - 1}"
            raise InputError(
                "a token id is not in the vocabulary", got=f"{token!r} at position {position}", need=need, where=where
            )
    if len(ids) >= capacity:
        raise InputError(
            "a prompt is too long", got=f"{len(ids)} tokens", where=where,
            need=f"fewer than max_length={capacity}, so that one token can follow",
            fix="Shorten it, or make the decoder with a larger max_length.",
        )  # fmt: skip
    return ids


def checked_limit(given: int | None, length: int, capacity: int, where: str) -> int:
    """Returns how many tokens may follow a prompt of `length` tokens; InputError if fewer fit than requested."""
    if given is None:
        return min(DEFAULT_LIMIT, capacity - length)
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise InputError("max_new_tokens is wrong", got=repr(given), need="1 or more")
    if length + given > capacity:
        raise InputError(
            "the prompt and its new tokens are longer than the cache", got=f"{length} + {given} tokens",
            need=f"at most max_length={capacity}", where=where,
            fix="Lower max_new_tokens, or make the decoder with a larger max_length.",
        )  # fmt: skip
    return given
