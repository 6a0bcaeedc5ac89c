"""The command line.

    qcompiler compile my_package.models:make -o artefact      compile a model to an artefact
    qcompiler inspect artefact                                show what each pass did
    qcompiler opt -p "canonicalize; fp8-tile" graph.qir       run passes over a graph's text

Results go to standard output; progress, remarks and errors go to standard error. Each command is a module of its name
with a function `run`, imported on use: help does not import torch.
"""

import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from qcompiler.cli.parser import COMMANDS, build_parser
from qcompiler.errors import QCompilerError
from qcompiler.files.replacing import FULL

GOOD, NO, USAGE, INTERNAL, INTERRUPTED, NO_READER = 0, 1, 2, 70, 130, 141
EXIT_CODES = {
    GOOD: "done",
    NO: "`check` found a fault, or an error that the message explains",
    USAGE: "the command line is wrong",
    INTERNAL: "an internal error (a bug): please report it with the output of `--debug`",
    INTERRUPTED: "interrupted, by Ctrl-C",
    NO_READER: "the output pipe was closed, as by `head`",
}
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
"""System errors about a path that the user gave."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status, one of EXIT_CODES."""
    options = build_parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that a terminal cannot show must not fail the command
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status: int = import_module(COMMANDS[options.command]).run(options)
        sys.stdout.flush()
        return status
    except QCompilerError as error:
        _explain(f"error: {error}", options.debug)
        return NO
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (Python flushes it at exit)
        return NO_READER
    except KeyboardInterrupt:
        _explain("interrupted", options.debug)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            _explain(f"error: the disk is full: {error}. Make room and run again.", options.debug)
            _flush_or_drop()
            return NO
        if isinstance(error, OSError) and error.errno in UNUSABLE:
            _explain(f"error: {error}", options.debug)
            return NO
        again = "" if options.debug else "; run again with --debug to see where"
        _explain(f"internal error: {type(error).__name__}: {error}{again}", options.debug)
        return INTERNAL


def _flush_or_drop() -> None:
    """Keeps Python from failing again at exit when output cannot be flushed."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (as above)


def _explain(message: str, debug: bool) -> None:
    """Prints an error on standard error, after the traceback if `debug`."""
    if debug:
        traceback.print_exc()
    print(message, file=sys.stderr)
