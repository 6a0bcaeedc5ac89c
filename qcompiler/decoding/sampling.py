"""How the next token is chosen: greedy or sampled, on the device, independently for each row.

    logits ─penalty─▶ ─temperature─▶ ─top-k, top-p, min-p─▶ + Gumbel noise ─▶ argmax

The steps, their order and their meaning follow transformers. A row's choice depends on its logits, its settings
and its position only, so a row alone and the same row in any batch give the same token.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from codegen.direct import kernels
from codegen.operators.next_tokens import chosen
from qcompiler.decoding.noise import gumbel
from qcompiler.decoding.vocabulary import VocabularyParts
from qcompiler.errors import InputError

SEEDS = range(-(2**63), 2**63)


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one sequence are chosen.

    Attributes:
        temperature: Divides the logits; 0 chooses the most likely token.
        top_k: Keeps this many tokens, and others as likely as the last of them; None keeps all.
        top_p: Keeps the most likely tokens whose probabilities reach this sum.
        min_p: Keeps tokens at least this times as likely as the most likely one.
        repetition_penalty: Divides positive logits of tokens in the sequence so far, and multiplies negative ones.
        seed: The noise is a function of the seed and the position in the sequence.

    Raises:
        InputError: A value is out of range, or has no effect without a temperature.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        number, whole = (int, float), (int,)
        _check("temperature", self.temperature, number, 0 <= _of(self.temperature) < math.inf, "a number of 0 or more")
        _check("top_k", self.top_k, (*whole, type(None)), self.top_k is None or _of(self.top_k) > 0, "1 or more")
        _check("top_p", self.top_p, number, 0 < _of(self.top_p) <= 1, "a number above 0 and at most 1")
        _check("min_p", self.min_p, number, 0 <= _of(self.min_p) <= 1, "a number from 0 to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, number, 0 < _of(penalty) < math.inf, "a positive number")
        _check("seed", self.seed, whole, isinstance(self.seed, int) and self.seed in SEEDS, "a 64-bit integer")
        if self.temperature == 0 and self.filters:
            raise InputError(
                "top_k, top_p and min_p have no effect on greedy decoding", got="no temperature",
                fix="Give a temperature, such as temperature=1.0.",
            )  # fmt: skip

    @property
    def filters(self) -> bool:
        """Whether some tokens are excluded."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0


def _of(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _check(name: str, value: object, kinds: tuple[type, ...], good: bool, need: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not good:
        raise InputError(f"{name} is wrong", got=repr(value), need=need)


@dataclass(frozen=True)
class Features:
    """What a batch needs beyond argmax. A row that does not use a feature passes through it unchanged."""

    penalty: bool = False
    noise: bool = False
    filters: bool = False

    @classmethod
    def of(cls, rows: Iterable[Sampling]) -> "Features":
        """Returns the features that some row uses."""
        found = list(rows)
        return cls(
            any(row.repetition_penalty != 1 for row in found),
            any(row.temperature > 0 for row in found),
            any(row.filters for row in found),
        )


class SamplingTable:
    """The sampling settings of all slots as tensors, so that choosing needs no host.

    Args:
        slots: Number of slots.
        vocabulary: Number of logits.
        device: The device of the logits.
    """

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self.vocabulary = vocabulary
        self.temperature = torch.zeros(slots, device=device)
        self.top_k = torch.full((slots,), vocabulary, device=device)
        self.top_p = torch.ones(slots, device=device)
        self.log_min_p = torch.full((slots,), -math.inf, device=device)
        self.penalty = torch.ones(slots, device=device)
        self.seed = torch.zeros(slots, dtype=torch.int64, device=device)
        self.seen = torch.zeros(0, vocabulary, dtype=torch.bool, device=device)  # [slots, V] once a row needs it

    def enter(self, slots: Tensor, rows: Sequence[Sampling], prompts: Sequence[Sequence[int]]) -> None:
        """Sets the rows of new sequences: slots i64[B]."""
        device = slots.device
        self.temperature[slots] = torch.tensor([row.temperature for row in rows], device=device).float()
        top_k = [self.vocabulary if row.top_k is None else min(row.top_k, self.vocabulary) for row in rows]
        self.top_k[slots] = torch.tensor(top_k, device=device)
        self.top_p[slots] = torch.tensor([row.top_p for row in rows], device=device).float()
        floors = [math.log(row.min_p) if row.min_p > 0 else -math.inf for row in rows]
        self.log_min_p[slots] = torch.tensor(floors, device=device)
        self.penalty[slots] = torch.tensor([row.repetition_penalty for row in rows], device=device).float()
        self.seed[slots] = torch.tensor([row.seed for row in rows], device=device)
        if not Features.of(rows).penalty:
            return
        if not len(self.seen):
            self.seen = torch.zeros(len(self.seed), self.vocabulary, dtype=torch.bool, device=device)
        self.seen[slots] = False
        for slot, prompt in zip(slots, prompts, strict=True):
            self.seen[slot, torch.tensor(prompt, device=device)] = True

    def choose(self, logits: Tensor | VocabularyParts, slots: Tensor, latest: Tensor, features: Features) -> Tensor:
        """Returns the next token of each row, i64[B], and notes it; the arguments are the ones of `ranked`."""
        new = chosen(self.ranked(logits, slots, latest, features))
        self.note(slots, new, features)
        return new

    def ranked(self, logits: Tensor | VocabularyParts, slots: Tensor, latest: Tensor, features: Features) -> Tensor:
        """Returns candidates for the next token of each row, i64[N, B], as the operator `rank_parts` does.

        Args:
            logits: float[B, V], or the parts of several ranks.
            slots: i64[B].
            latest: i64[B], the index of the latest token in its sequence; the next one's noise depends on it.
            features: At least those that the rows use.
        """
        score = partial(self._scores, slots=slots, latest=latest, features=features)
        if isinstance(logits, VocabularyParts) and features.filters:
            logits = logits.whole()  # a filter needs the distribution over the vocabulary
        if isinstance(logits, VocabularyParts):
            return logits.ranked(score)
        found: Tensor = kernels.rank_parts(score(logits, 0), 0)
        return found

    def note(self, slots: Tensor, new: Tensor, features: Features) -> None:
        """Notes the new tokens of sequences, i64[B], for penalties of repetition."""
        if features.penalty:
            self.seen[slots, new] = True

    def _scores(self, logits: Tensor, first: int, slots: Tensor, latest: Tensor, features: Features) -> Tensor:
        """Scores of columns from `first` on, of which the largest is chosen: logits, with noise if a row samples."""
        size = logits.shape[-1]
        if features.penalty or features.noise:
            logits = logits.float()
        if features.penalty:
            logits = _penalized(logits, self.penalty[slots, None], self.seen[slots, first : first + size])
        if not features.noise:
            return logits
        temperature = self.temperature[slots, None]
        scaled = logits / torch.where(temperature > 0, temperature, 1.0)
        if features.filters:
            least = _least_kept(scaled, self.top_k[slots, None], self.top_p[slots, None], self.log_min_p[slots, None])
            scaled = scaled.masked_fill(scaled < least, -math.inf)
        drawn = scaled + gumbel(self.seed[slots], latest + 1, size, first)
        return torch.where(temperature > 0, drawn, logits)


def _penalized(logits: Tensor, penalty: Tensor, seen: Tensor) -> Tensor:
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, changed, logits)


def _least_kept(logits: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor) -> Tensor:
    """Returns the smallest logit that all three filters keep, f32[B, 1].

    Each filter keeps the largest logits down to some rank, so one threshold describes all of them.
    """
    ranked = logits.sort(-1, descending=True).values
    kept = torch.arange(ranked.shape[1], device=ranked.device) < top_k
    kept = ranked >= ranked.masked_fill(~kept, math.inf).amin(-1, keepdim=True)  # ties of the last one stay
    # FP64, so that the order of additions, which may depend on the batch size, does not move the border
    shares = ranked.double().masked_fill(~kept, -math.inf).softmax(-1)
    before = shares.cumsum(-1) - shares
    kept &= (top_p >= 1) | (before < top_p)
    kept &= ranked >= ranked[:, :1] + log_min_p
    return ranked.masked_fill(~kept, math.inf).amin(-1, keepdim=True)
