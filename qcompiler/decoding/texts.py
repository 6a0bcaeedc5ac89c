"""Text from tokens as they arrive, cut before stop strings.

Pieces of text come out as soon as nothing can change them:

    stream = TextStream(tokenizer, stop=("END",))
    stream.add(5) -> "Par"
    stream.add(9) -> "", since "is E" may end in the beginning of a stop string
"""

from collections.abc import Sequence
from typing import Any

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""The end of a decoded text whose last character is not complete."""

SPAN, CONTEXT = 16, 4
"""Tokens that are decoded together, and how many of them stay when older ones are dropped: tokenizers treat the first
token of a text differently."""


class TextStream:
    """Decodes the tokens of one sequence incrementally.

    Text that may still change is held back: incomplete characters, and what may be the beginning of a stop string.

    Args:
        tokenizer: One of transformers.
        stop: Strings that end the text; they are not part of it.

    Attributes:
        stopped: Whether a stop string was found.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._start = 0
        self._decoded = self._held = ""  # the text of the tokens from `start` that is final; the end that is held back
        self.stopped = False

    def add(self, token: int) -> str:
        """Returns the new text that is final."""
        self._ids.append(token)
        now = self._decode(self._start)
        if now.endswith(BROKEN):
            return ""
        new, self._decoded = now[len(self._decoded) :], now
        if len(self._ids) - self._start > SPAN:
            self._start = len(self._ids) - CONTEXT
            self._decoded = self._decode(self._start)
        return self._final(new)

    def finish(self) -> str:
        """Returns the text that was held back; no token follows."""
        new = self._decode(self._start)[len(self._decoded) :]
        text = self._final(new) + self._held
        self._held = ""
        return text

    def _decode(self, start: int) -> str:
        """The text of the tokens from `start`."""
        if start == len(self._ids):
            return ""
        text = self._tokenizer.decode(self._ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _final(self, new: str) -> str:
        """Returns the part of the held and the new text that no stop string can begin in."""
        text, self._held = self._held + new, ""
        if self.stopped:
            return ""
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)
