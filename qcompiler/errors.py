"""Exception types; every message says what is wrong, got, needed, where, and what to do."""

import difflib
from collections.abc import Iterable


class QCompilerError(Exception):
    """Base class of all qcompiler errors.

    Args:
        problem: One sentence that says what is wrong, without a final period.
        got: The offending value, as the user would recognize it.
        need: The accepted values.
        where: Pass, op, source line, or position in a text.
        fix: What the user should do.

    Attributes:
        excerpt: The source line at fault with a caret below it and its position; empty if there is no source text.
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
    """Malformed text; the message starts with file:line:column and shows the line with a caret."""


class VerifyError(QCompilerError):
    """A graph violates one of the numbered IR rules."""


class CaptureError(QCompilerError):
    """A model cannot be captured, or the captured graph computes different results."""


class PassError(QCompilerError):
    """A pass is unknown, has an invalid option, failed, or violated its declared effect."""


class CodegenError(QCompilerError):
    """A graph cannot be lowered to or run on the requested target."""


class InputError(QCompilerError):
    """A compiled model was called with arguments that do not match its captured inputs."""


class ArtefactError(QCompilerError):
    """A saved model cannot be written or read: a file is missing, corrupt, edited, foreign, or too new."""


class CaptureWarning(UserWarning):
    """A captured graph fixes sizes that are dynamic in the model."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The hint for a misspelled name: the closest known name, then all known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    return f"{guess}Known: {', '.join(names) or 'none'}."
