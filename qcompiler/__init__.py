"""qcompiler: a quantization compiler for PyTorch models.

    fast = qcompiler.compile(model, scheme="fp8_tile")
    print(fast.stages["fp8-tile"], fast.report, fast.source)

Importing this package loads neither torch nor triton: each public name is loaded when it is first used.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompiler import calibration, checkpoints, html, instruments, numerics, schemes, testing
    from qcompiler.artefact.loading import load
    from qcompiler.attribution import ErrorReport, attribute_error
    from qcompiler.calibration import Calibration
    from qcompiler.compiler import CompiledModel, compile
    from qcompiler.errors import (
        ArtefactError,
        CaptureError,
        CheckpointWarning,
        CodegenError,
        InputError,
        ParseError,
        PassError,
        QCompilerError,
        VerifyError,
    )
    from qcompiler.interpreter import interpret
    from qcompiler.ir import DType, Graph, Match, Missed, Op, Rewriter, Rule, TensorType, Value, diff
    from qcompiler.nonfinite import NonFinite, find_nonfinite
    from qcompiler.pass_manager import Effect, Pass, Pipeline
    from qcompiler.report import Report
    from qcompiler.schemes import Scheme, list_schemes, pipeline

_HOME = {
    "qcompiler.artefact.loading": ("load",),
    "qcompiler.attribution": ("ErrorReport", "attribute_error"),
    "qcompiler.calibration": ("Calibration",),
    "qcompiler.compiler": ("CompiledModel", "compile"),
    "qcompiler.errors": (
        "ArtefactError", "CaptureError", "CheckpointWarning", "CodegenError", "InputError", "ParseError", "PassError",
        "QCompilerError", "VerifyError",
    ),
    "qcompiler.interpreter": ("interpret",),
    "qcompiler.ir": ("DType", "Graph", "Match", "Missed", "Op", "Rewriter", "Rule", "TensorType", "Value", "diff"),
    "qcompiler.nonfinite": ("NonFinite", "find_nonfinite"),
    "qcompiler.pass_manager": ("Effect", "Pass", "Pipeline"),
    "qcompiler.report": ("Report",),
    "qcompiler.schemes": ("Scheme", "list_schemes", "pipeline"),
}  # fmt: skip
_MODULES = {name: module for module, names in _HOME.items() for name in names}
_SUBMODULES = ("calibration", "checkpoints", "html", "instruments", "numerics", "schemes", "testing")
"""Public submodules: an attribute access imports them, so `import qcompiler` is enough to use any of them."""

_LIGHT = ("instruments",)
"""Submodules that need no table of operations."""

_SIBLINGS = ("passes", "codegen")

__all__ = [
    "ArtefactError", "Calibration", "CaptureError", "CheckpointWarning", "CodegenError", "CompiledModel", "DType",
    "Effect", "ErrorReport", "Graph", "InputError", "Match", "Missed", "NonFinite", "Op", "ParseError", "Pass",
    "PassError", "Pipeline", "QCompilerError", "Report", "Rewriter", "Rule", "Scheme", "TensorType", "Value",
    "VerifyError", "attribute_error", "calibration", "checkpoints", "compile", "diff", "find_nonfinite", "html",
    "instruments", "interpret", "list_schemes", "load", "numerics", "pipeline", "schemes", "testing",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return version("qcompiler")
        except PackageNotFoundError:
            return "0+unknown"
    if name in _LIGHT:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULES and name not in _SUBMODULES:
        raise AttributeError(f"module 'qcompiler' has no attribute {name!r}")
    _check_siblings()
    import_module("qcompiler.dialects")  # fills the table of operations
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})


def _check_siblings() -> None:
    """`passes` and `codegen` are generic names: refuses to go on when Python would find somebody else's."""
    root = Path(__file__).resolve().parent.parent
    for sibling in _SIBLINGS:
        spec = find_spec(sibling)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found is None:
            raise ImportError(
                f"qcompiler's own package '{sibling}' is missing from {root / sibling}. Reinstall qcompiler."
            )
        if found != root / sibling:
            raise ImportError(
                f"qcompiler ships its own top-level package '{sibling}' at {root / sibling}, but Python finds "
                f"{found} first. Rename or move the other '{sibling}', or start Python from another folder."
            )
