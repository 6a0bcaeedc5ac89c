"""Keeps the deprecation noise of torch and transformers away from people who can do nothing about it."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

MODULES = r"(torch|copyreg|transformers|torchao|sympy)(\.|$)"
"""Whose warnings are silenced. copyreg stands for torch: it shows up when export deep-copies its own tree specs.
transformers imports torchao where it is installed, and torchao's import warns about its own names."""

ABOUT_TORCH = r"The tensor attributes? self\."
"""How a warning begins that export raises in the name of contextlib: recurrent layers look their weights up anew."""

ABOUT_PYTHON = r"Guards may run slower on Python 3\.13\.0"
"""How a warning begins that torch raises while it traces, and that has nothing to do with a captured graph."""

CHATTY = (
    "torch.export",
    "torch.export._trace",
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
)
"""Loggers that report a trace or a loading that fails before it raises."""


@contextmanager
def third_party_silence() -> Iterator[None]:
    """Ignores warnings that torch and transformers raise about their own code; a model's own warnings pass."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=MODULES)
        warnings.filterwarnings("ignore", category=UserWarning, message=ABOUT_TORCH)
        warnings.filterwarnings("ignore", category=RuntimeWarning, message=ABOUT_PYTHON)
        yield


@contextmanager
def quiet_failure() -> Iterator[None]:
    """Lets a trace, or the loading of one, fail without torch logging and printing first; its exception says it all.

    What is printed to stderr when it succeeds is kept.
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
