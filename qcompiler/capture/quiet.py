"""Silences deprecation warnings of torch and transformers that users cannot act on."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

MODULES = r"(torch|copyreg|transformers|torchao|sympy)(\.|$)"
"""Modules whose warnings are silenced. copyreg appears when export deep-copies its tree specs.
transformers imports torchao if it is installed, and torchao's import warns about its own names."""

ABOUT_TORCH = r"The tensor attributes? self\."
"""Prefix of a warning that export raises from contextlib: recurrent layers look up their weights again."""

ABOUT_PYTHON = r"Guards may run slower on Python 3\.13\.0"
"""Prefix of a warning that torch raises while tracing and that does not concern a captured graph."""

CHATTY = (
    "torch.export",
    "torch.export._trace",
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
)
"""Loggers that report a failed trace or load before it raises."""


@contextmanager
def third_party_silence() -> Iterator[None]:
    """Ignores warnings of torch and transformers about their own code; the model's own warnings pass."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=MODULES)
        warnings.filterwarnings("ignore", category=UserWarning, message=ABOUT_TORCH)
        warnings.filterwarnings("ignore", category=RuntimeWarning, message=ABOUT_PYTHON)
        yield


@contextmanager
def quiet_failure() -> Iterator[None]:
    """Keeps torch from logging and printing before a trace or load fails; the exception contains everything.

    Output to stderr is kept on success.
    """
    loggers = [logging.getLogger(name) for name in CHATTY]
    before = [logger.disabled for logger in loggers]
    printed = io.StringIO()
    for logger in loggers:
        logger.disabled = True
    try:
        with redirect_stderr(printed):
            yield
        sys.stderr.write(printed.getvalue())
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
