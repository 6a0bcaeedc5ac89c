"""The one exception family: every message says what is wrong, what was got, what is needed, where, and what to do."""

import difflib
from collections.abc import Iterable


class QCompilerError(Exception):
    """Base of every error that qcompiler raises on purpose.

    Args:
        problem: One sentence, without a final stop, that says what is wrong.
        got: The offending value, as the user would recognise it.
        need: What would have been accepted.
        where: Pass, op, source line or text position.
        fix: What to do about it.

    Attributes:
        excerpt: The row of a text that the error is about, with a caret below, and where it is; empty without a text.
    """

    excerpt = ""

    def __init__(
        self,
        problem: str,
        *,
        got: object = None,
        need: object = None,
        where: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.got, self.need, self.where, self.fix = problem, got, need, where, fix
        super().__init__(problem)

    def __str__(self) -> str:
        facts = [f"got {self.got}"] if self.got is not None else []
        facts += [f"need {self.need}"] if self.need is not None else []
        text = self.problem + (": " + "; ".join(facts) if facts else "")
        text += f" (in {self.where})" if self.where else ""
        text = f"{text}. {self.fix}" if self.fix else text
        return f"{text}\n{self.excerpt}" if self.excerpt else text


class ParseError(QCompilerError):
    """Malformed text; the message starts with file:line:column and shows the row with a caret."""


class VerifyError(QCompilerError):
    """A graph breaks one of the numbered rules of the IR."""


class CaptureError(QCompilerError):
    """A model cannot be turned into a graph, or the graph does not compute what the model computes."""


class PassError(QCompilerError):
    """A pass is unknown, has a wrong option, failed, or did not keep its declared effect."""


class CodegenError(QCompilerError):
    """A graph cannot be lowered to, or run on, the target that was asked for."""


class InputError(QCompilerError):
    """A compiled model was called with arguments that it was not captured for."""


class ArtefactError(QCompilerError):
    """A saved model cannot be written or read: a file is missing, damaged, edited, foreign or newer."""


class CheckpointWarning(UserWarning):
    """A checkpoint was written that transformers or vLLM cannot read, although the format allows it."""


class CaptureWarning(UserWarning):
    """A captured graph fixes sizes that the model leaves open."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The sentence that helps after a misspelt name: the nearest known one, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    return f"{guess}Known: {', '.join(names) or 'none'}."
