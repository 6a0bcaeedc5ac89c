"""`qcompiler export`: an artefact as MLIR, compiled by IREE for the CPU, or as a checkpoint for other engines."""

import argparse
from pathlib import Path

import qcompiler
from qcompiler.checkpoints import write
from qcompiler.checkpoints.folders import check_place
from qcompiler.cli import exported
from qcompiler.cli.models import load_model
from qcompiler.cli.parser import CHECKPOINTS, MLIR
from qcompiler.errors import InputError


def run(options: argparse.Namespace) -> int:
    """Writes it, and says where it is."""
    exported.refuse(options.artefact)
    if options.to in CHECKPOINTS:
        _checkpoint(options)
    else:
        _stage(options)
    print(f"{options.output} has it")
    return 0


def _checkpoint(options: argparse.Namespace) -> None:
    """All of the model: on the CPU, since nothing is computed."""
    if options.stage is not None:
        raise InputError("a checkpoint has no stages", got=f"--stage {options.stage}", fix="Leave --stage out.")
    if options.model is None:
        fix = "Name the folder, or the module:factory, that was given to `qcompiler compile`: --model MODEL."
        raise InputError("a checkpoint has parts of the model that an artefact lacks", got="no --model", fix=fix)
    check_place(Path(options.output))
    compiled = qcompiler.load(options.artefact, device="cpu", verify=True, trust=options.trust)  # all is copied
    write(compiled, options.output, options.to, model=load_model(options.model, "cpu").model)


def _stage(options: argparse.Namespace) -> None:
    if options.model is not None:
        need = f"--to {', '.join(CHECKPOINTS)}"
        raise InputError("only a checkpoint is written with the help of the model", got=f"--to {options.to}", need=need)
    compiled = qcompiler.load(
        options.artefact, verify=options.to not in MLIR, trust=options.trust
    )  # which copies weights
    if options.to in MLIR:
        compiled.to_mlir(options.stage, MLIR[options.to]).save(options.output)
    else:
        compiled.export(options.to, options.output, options.stage)
