"""The program that diagnostics run: of a whole model, because they run one graph, operation by operation."""

from passes.sharding.partition import Partition
from qcompiler.decoding.sharded import whole_only
from qcompiler.errors import InputError
from qcompiler.ir import Mesh
from qcompiler.program.program import HasProgram, Program


def whole_program(compiled: HasProgram, what: str) -> Program:
    """Returns the program of a compiled model or decoder.

    Args:
        compiled: The user's argument.
        what: What cannot be done with a sharded model, for a message.

    Raises:
        InputError: This is something else.
        QCompilerError: It is sharded.
        CaptureError: It is not captured yet.
    """
    if not hasattr(compiled, "program"):
        need = "the result of qcompiler.compile, load or decoder"
        raise InputError("this is not a compiled model", got=type(compiled).__name__, need=need)
    program = compiled.program
    if any(isinstance(step, Partition) and Mesh.parse(step.mesh).size > 1 for step in program.settings.passes):
        raise whole_only("model", what)
    return program
