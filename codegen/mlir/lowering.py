"""Runs torch-mlir's pipelines on a module, and captures diagnostics instead of printing them."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from codegen.mlir.extras import load
from qcompiler.errors import CodegenError

KEPT = ("aten.flatten.using_ints", "aten.unflatten.int")
"""Views that must not be decomposed: they show which symbolic sizes belong together. See `reshaping`."""

TO_LINALG = (
    "builtin.module(func.func(torch-match-quantized-custom-ops),"
    f"torchdynamo-export-to-torch-backend-pipeline{{backend-legal-ops={','.join(KEPT)}}},"
    "torch-backend-to-linalg-on-tensors-backend-pipeline{allow-non-finites=true})"
)
"""From the torch dialect to linalg on tensors."""


def run(module: Any, pipeline: str) -> None:
    """Runs a pipeline on a module, in place; raises CodegenError with the diagnostics if a pass fails."""
    passes = load("torch_mlir.passmanager", "mlir")
    with heard(module.context) as said:
        try:
            passes.PassManager.parse(pipeline, module.context).run(module.operation)
        except Exception as error:  # exception types of the bindings differ between versions
            raise CodegenError("the module cannot be lowered", got="; ".join(said) or error) from error


def load_dialects(context: Any) -> None:
    """Loads dialects that lowering may leave in a module: `tm_tensor` can be registered in no other way."""
    ir = load("torch_mlir.ir", "mlir")
    run(ir.Module.create(ir.Location.unknown(context)), "builtin.module(func.func(convert-torch-to-tmtensor))")


@contextmanager
def heard(context: Any) -> Iterator[Sequence[str]]:
    """Captures the first lines of a context's diagnostics, which are then no longer printed."""
    said: list[str] = []

    def listen(diagnostic: Any) -> bool:
        said.append(re.split(r"\n|: %", str(diagnostic.message))[0])  # without the operation itself
        return True

    context.emit_error_diagnostics = True  # otherwise an error diagnostic without a failure would end the process
    handler = context.attach_diagnostic_handler(listen)
    try:
        yield said
    finally:
        handler.detach()
