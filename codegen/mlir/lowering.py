"""torch-mlir's own pipelines, run on a module, with what they say in place of what they print."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from codegen.mlir.extras import load
from qcompiler.errors import CodegenError

KEPT = ("aten.flatten.using_ints", "aten.unflatten.int")
"""Not to be taken apart: they say which symbolic sizes belong together, and views do not. See `reshaping`."""

TO_LINALG = (
    "builtin.module(func.func(torch-match-quantized-custom-ops),"
    f"torchdynamo-export-to-torch-backend-pipeline{{backend-legal-ops={','.join(KEPT)}}},"
    "torch-backend-to-linalg-on-tensors-backend-pipeline{allow-non-finites=true})"
)
"""From the torch dialect to linalg on tensors."""


def run(module: Any, pipeline: str) -> None:
    """Runs a pipeline on a module, in place; CodegenError, with what the passes say, when one of them fails."""
    passes = load("torch_mlir.passmanager", "mlir")
    with heard(module.context) as said:
        try:
            passes.PassManager.parse(pipeline, module.context).run(module.operation)
        except Exception as error:  # the bindings have errors of their own, which differ between versions
            raise CodegenError("the module cannot be lowered", got="; ".join(said) or error) from error


def load_dialects(context: Any) -> None:
    """Makes a context know what lowering may leave in a module: `tm_tensor` is registered in no other way."""
    ir = load("torch_mlir.ir", "mlir")
    run(ir.Module.create(ir.Location.unknown(context)), "builtin.module(func.func(convert-torch-to-tmtensor))")


@contextmanager
def heard(context: Any) -> Iterator[Sequence[str]]:
    """The first lines of what is diagnosed under a context, which is then printed no more."""
    said: list[str] = []

    def listen(diagnostic: Any) -> bool:
        said.append(re.split(r"\n|: %", str(diagnostic.message))[0])  # without the operation itself
        return True

    context.emit_error_diagnostics = True  # a pass that complains without failing would end the process otherwise
    handler = context.attach_diagnostic_handler(listen)
    try:
        yield said
    finally:
        handler.detach()
