"""Where a traced operation comes from: the user's source line and the module path, without absolute paths."""

import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from traceback import FrameSummary
from types import TracebackType
from typing import Any, NamedTuple

import torch

from qcompiler.ir.op import Location

FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
PACKAGES = ("site-packages", "dist-packages")
TORCH = str(Path(torch.__file__).parent)
STANDARD = sysconfig.get_paths()["stdlib"]
OURS = str(Path(__file__).parents[1])


class Line(NamedTuple):
    """A line of a source file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{short_path(self.file)}:{self.line}"


def location_of(node: torch.fx.Node) -> Location:
    """Returns the innermost line outside torch that created `node`, and the path of its module."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    module = _module_path(str(list(stack.values())[-1][0])) if stack else ""
    found = list(_frames(node.meta.get("stack_trace") or ""))
    if not found:
        return Location(module=module)
    return Location(short_path(found[-1].file), found[-1].line, module)


def user_line(trace: TracebackType | None) -> Line | None:
    """Returns the innermost line of a traceback outside torch and qcompiler."""
    found = None
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if is_users(file):
            found = Line(file, trace.tb_lineno)
        trace = trace.tb_next
    return found


def short_path(file: str) -> str:
    """Returns a path that does not depend on the machine.

    `transformers/models/llama/modeling_llama.py` for an installed file, a relative path for one below the working
    directory, and the bare name otherwise.
    """
    path = Path(file)
    for package in PACKAGES:
        if package in path.parts:
            return Path(*path.parts[path.parts.index(package) + 1 :]).as_posix()
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd()).as_posix()
    return path.name


def is_model_code(frame: FrameSummary | str | None) -> bool:
    """Whether a stack frame runs Python code that decides what a model computes.

    This includes the user's code, torch.nn, and code that dynamo interprets; not qcompiler, nor torch's rules for
    shapes and strides.
    """
    if not isinstance(frame, FrameSummary):
        return True
    file = Path(frame.filename)
    if file.is_relative_to(OURS):
        return False
    return not file.is_relative_to(TORCH) or file.relative_to(TORCH).parts[0] in ("nn", "_dynamo", "functional.py")


def _frames(trace: str) -> Iterator[Line]:
    """Yields the user's frames in a printed stack, outermost first."""
    for match in FRAME.finditer(trace):
        if is_users(match["file"]):
            yield Line(match["file"], int(match["line"]))


def is_users(file: str) -> bool:
    """Whether a source file is outside torch, qcompiler and Python's standard library."""
    # Generated code has names such as <eval_with_key>.3.
    if file.startswith(("<", TORCH, OURS, "torch/")):
        return False
    return not Path(file).is_relative_to(STANDARD) or any(package in Path(file).parts for package in PACKAGES)


def _module_path(name: str) -> str:
    """Returns `model.layers.0` for torch's various spellings of a module path."""
    if name.startswith("_empty_nn_module_stack"):  # torch's mark for an operation outside all modules
        return ""
    name = re.sub(r"\['?([^'\]]+)'?\]", r".\1", name)
    return re.sub(r"^(L?__self__|L\.self|self)\.?", "", name).replace("_modules.", "").strip(".")
