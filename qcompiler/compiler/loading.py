"""`load`: a compiled model from an artefact."""

import os
from collections.abc import Collection
from pathlib import Path

import torch

from qcompiler.artefact.loading import read_program, reading
from qcompiler.artefact.strict_json import AGAIN
from qcompiler.compiler.model import CompiledModel, callable_of
from qcompiler.errors import ArtefactError, QCompilerError
from qcompiler.program.folder_kinds import advice, checked_path
from qcompiler.program.program import plain_torch


def load(
    folder: str | os.PathLike[str],
    *,
    device: "torch.device | str | None" = None,
    verify: bool = False,
    regenerate: bool = False,
    trust: Collection[str] = (),
) -> CompiledModel:
    """The compiled model that `CompiledModel.save` wrote, with equal bits.

    All texts are held to their hashes, files of weights to their sizes and headers. On the CPU, weights are read when
    they are first needed: the files must stay as they are until then.

    Args:
        folder: What `save` was given.
        device: Where the model goes; left out, where it was compiled.
        verify: Whether to read all weights now, and hold them to their hashes.
        regenerate: Whether to accept that this qcompiler writes another host module for the graph than the one that
            saved it, as another version may. It runs its own.
        trust: Namespaces of operators, beside torch's own, that the graph may call.

    Raises:
        ArtefactError: A file is missing, damaged, edited, foreign or newer; or the model cannot run here.
    """
    path = checked_path(folder, ArtefactError).resolve()
    try:
        with plain_torch():
            with reading(path) as opened:
                program = read_program(opened, device, verify, regenerate, trust)
            return callable_of(program)
    except QCompilerError as error:
        if not path.exists():
            error.fix = error.fix or advice(Path(folder))
        raise
    except Exception as error:  # whatever the files hold, the answer is one sentence
        raise ArtefactError(
            "the artefact cannot be loaded", got=f"{type(error).__name__}: {error}", where=str(path),
            fix=f"{AGAIN} If it was not edited, please report this.",
        ) from error  # fmt: skip
