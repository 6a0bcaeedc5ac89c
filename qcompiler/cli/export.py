"""`qcompiler export`: an artefact as MLIR, or compiled by IREE for the CPU."""

import argparse

import qcompiler
from qcompiler.cli.parser import IREE, MLIR


def run(options: argparse.Namespace) -> int:
    """Writes it, and says where it is."""
    compiled = qcompiler.load(options.artefact, trust=options.trust)
    if options.to == IREE:
        compiled.to_iree(options.output, options.stage)
    else:
        compiled.to_mlir(options.stage, MLIR[options.to]).save(options.output)
    print(f"{options.output} has it")
    return 0
