"""The result of `to_mlir`: the text of a verified module, and the parameters and results of its function."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from codegen.mlir.extras import load
from codegen.mlir.importing import context_with_torch
from codegen.mlir.interface import Parameter, Result
from codegen.mlir.lowering import load_dialects
from qcompiler.errors import CodegenError, InputError
from qcompiler.files.replacing import not_replaced, replacing_file


@dataclass(frozen=True)
class MlirModule:
    """A module of MLIR with one function.

    Attributes:
        text: The module.
        name: The function's name.
        dialect: "torch" or "linalg".
        arguments: Parameters of the function, in order, including weights if requested as arguments.
        results: Results of the function, in order.
    """

    text: str
    name: str
    dialect: str
    arguments: tuple[Parameter, ...]
    results: tuple[Result, ...]

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        kinds = [argument.kind for argument in self.arguments]
        counts = ", ".join(f"{kinds.count(kind)} {kind}s" for kind in dict.fromkeys(kinds))
        return f"<MlirModule @{self.name} in {self.dialect}: {counts}; {len(self.results)} results>"

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes the text to a file atomically, and returns its path."""
        target = Path(path)
        try:
            with replacing_file(target) as part:
                part.write_text(self.text + "\n", encoding="utf-8")
        except OSError as error:
            need = "a path in a folder that exists"
            said = InputError("the module cannot be written", got=f"{target}: {error}", need=need)
            raise not_replaced(said, error, target, len(self.text)) from error
        return target


def verified_text(module: Any) -> str:
    """The text of a module that MLIR's verifier accepts, and that its parser reads back as the same module."""
    ir = load("torch_mlir.ir", "mlir")
    try:
        module.operation.verify()
        text = str(module).rstrip("\n")
        context = context_with_torch()  # a new one, as a user has: in this one the resource names are taken
        load_dialects(context)
        again = str(ir.Module.parse(text, context)).rstrip("\n")
    except ir.MLIRError as error:
        raise CodegenError("MLIR does not accept the module", got=str(error).partition("\n")[0]) from error
    if again != text:
        raise CodegenError("MLIR's parser reads the module back differently")
    return text
