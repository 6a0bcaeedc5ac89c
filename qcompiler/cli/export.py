"""`qcompiler export`: writes an artefact as MLIR, an IREE folder, or a checkpoint for other engines."""

import argparse
from pathlib import Path

from qcompiler.checkpoints.folders import check_place
from qcompiler.checkpoints.readers import ANY
from qcompiler.cli import exported
from qcompiler.cli.meshes import load_artefact
from qcompiler.cli.models import load_model
from qcompiler.cli.parser import MLIR, NO_READER, checkpoint_formats
from qcompiler.errors import InputError


def run(options: argparse.Namespace) -> int:
    """Writes the export and prints its path."""
    exported.refuse(options.artefact)
    if options.to in checkpoint_formats():
        _checkpoint(options)
    else:
        _stage(options)
    print(f"wrote {options.output}")
    return 0


def _checkpoint(options: argparse.Namespace) -> None:
    """Writes the whole model as a checkpoint, on the CPU, since nothing is computed."""
    if options.stage is not None:
        raise InputError("a checkpoint has no stages", got=f"--stage {options.stage}", fix="Leave --stage out.")
    if options.model is None:
        fix = "Pass the folder or module:factory that `qcompiler compile` got: --model MODEL."
        raise InputError("a checkpoint needs parts of the model that an artefact lacks", got="no --model", fix=fix)
    check_place(Path(options.output))
    compiled = load_artefact(options.artefact, device="cpu", verify=True, trust=options.trust)  # copies all weights
    reader = None if options.reader == NO_READER else options.reader or ANY
    model = load_model(options.model, "cpu").model
    compiled.save_checkpoint(options.output, options.to, model=model, reader=reader)


def _stage(options: argparse.Namespace) -> None:
    for option in ("model", "reader"):
        if getattr(options, option) is not None:
            need = f"--to {', '.join(checkpoint_formats())}"
            raise InputError(f"--{option} is only for checkpoints", got=f"--to {options.to}", need=need)
    compiled = load_artefact(options.artefact, verify=options.to not in MLIR, trust=options.trust)  # copies weights
    if options.to in MLIR:
        compiled.to_mlir(options.stage, MLIR[options.to]).save(options.output)
    else:
        compiled.export(options.to, options.output, options.stage)
