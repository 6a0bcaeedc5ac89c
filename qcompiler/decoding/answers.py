"""The answer to one prompt while it arrives."""

from collections.abc import Collection, Generator
from typing import Any

from qcompiler.decoding.texts import TextStream


class Answer:
    """Collects the tokens of one sequence, and their text if one is needed.

    Args:
        ends: Tokens that end the sequence.
        text: Decodes the tokens; None if neither a text nor stop strings are needed.

    Attributes:
        ids: All new tokens, including the one that ends the sequence.
        text: The final text so far.
    """

    def __init__(self, ends: Collection[int], text: TextStream | None) -> None:
        self._ends, self._stream = ends, text
        self.ids: list[int] = []
        self.text = ""

    def take(self, token: int) -> bool:
        """Adds a token and returns whether the sequence ends with it; its text does not show a stop token."""
        self.ids.append(token)
        if token in self._ends:
            return True
        if self._stream is None:
            return False
        self.text += self._stream.add(token)
        return self._stream.stopped

    def finish(self) -> None:
        """Adds the text that was held back; no token follows."""
        if self._stream is not None:
            self.text += self._stream.finish()


class Stream:
    """An iterator over an answer while it is generated: pieces of text, or ids.

    Attributes:
        answer: The answer so far, with its ids.
    """

    def __init__(self, answer: Answer, pieces: Generator[Any, None, None]) -> None:
        self.answer, self._pieces = answer, pieces

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Any:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the answer now, so that the decoder can be used otherwise."""
        self._pieces.close()
