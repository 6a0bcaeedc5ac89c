"""Optional packages that only this folder needs, loaded on first use."""

from importlib import import_module
from typing import Any

from qcompiler.errors import QCompilerError

PACKAGES = {"mlir": "torch-mlir", "iree": "iree-base-compiler and iree-base-runtime"}
"""Extra of this distribution -> the packages it installs."""


def load(module: str, extra: str) -> Any:
    """A module of an optional package; raises QCompilerError with the install command if it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise QCompilerError(
            f"{PACKAGES[extra]} cannot be imported", got=error, fix=f'pip install "qcompiler[{extra}]"'
        ) from error
