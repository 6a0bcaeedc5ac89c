"""Packages that only this part needs, loaded when it is used."""

from importlib import import_module
from typing import Any

from qcompiler.errors import QCompilerError

PACKAGES = {"mlir": "torch-mlir", "iree": "iree-base-compiler and iree-base-runtime"}
"""Extra of this distribution -> what it installs."""


def load(module: str, extra: str) -> Any:
    """A module of an optional package; QCompilerError, with what to install, when it is not there."""
    try:
        return import_module(module)
    except ImportError as error:
        raise QCompilerError(
            f"{PACKAGES[extra]} cannot be imported", got=error, fix=f'pip install "qcompiler[{extra}]"'
        ) from error
