"""Loads the model named on the command line: an exported program, a Hugging Face folder, or a factory.

model.pt2              torch.export.load, which unpickles: use only trusted files
folder/                config.json and .safetensors; no code in it is executed, and nothing is downloaded
package.module:make    imports the module, from the current folder too, and calls make(): the user's own code
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from qcompiler.capture.quiet import quiet_failure, third_party_silence
from qcompiler.checkpoints import Checkpoint
from qcompiler.cli import huggingface
from qcompiler.cli.inputs import Call, example_in, random_call
from qcompiler.distributed.simulation import SimulatedMesh
from qcompiler.errors import InputError
from qcompiler.program.folder_kinds import advice
from qcompiler.runtime.device import check_device

NEED = "a .pt2 file, a folder with a config.json, or module:factory"


@dataclass
class Loaded:
    """A loaded model.

    Attributes:
        model: The model, until `release` is called.
        example: The arguments of one call, if the model's source provides them.
        folder: The folder of a Hugging Face model.
    """

    model: Any
    example: Call | None = None
    folder: Path | None = None

    @property
    def device(self) -> torch.device:
        """The device of the first parameter; the CPU if there is none."""
        first = next(iter(self.model.parameters()), None)
        return torch.device("cpu") if first is None else first.device

    def example_for(self, specs: Sequence[str], file: str | None) -> Call | None:
        """The call from the command line, by types or as a file; else the model's own example, if any."""
        call = random_call(specs) if specs else example_in(file) if file is not None else self.example
        return None if call is None else call.on(self.device)

    def release(self) -> Any:
        """Transfers the model to the caller, who can then free its weights one by one."""
        model, self.model = self.model, None
        return model


def load_model(
    name: str, device: str | None = None, checkpoint: Checkpoint | None = None, mesh: SimulatedMesh | None = None
) -> Loaded:
    """Loads the model that `name` refers to, in eval mode, on `device` if given.

    Args:
        name: The model argument of the command line.
        device: "cpu" or "cuda"; None leaves the model where it is.
        checkpoint: The folder's checkpoint, if it was already read.
        mesh: A mesh on which the model will be compiled; ranks read their parts of a folder later.

    Raises:
        InputError: The model does not exist or cannot be loaded.
    """
    check_device(device)
    path = Path(name)
    if name.endswith(".pt2"):
        loaded = _exported(path, device)
    elif path.is_dir():
        loaded = Loaded(huggingface.load_folder(path, checkpoint, mesh), folder=path)
        loaded.example = huggingface.example_for(loaded.model, path)
    elif ":" in name:
        loaded = _made(name)
    else:
        raise InputError("there is no such model", got=repr(name), need=NEED, fix=advice(path))
    if isinstance(loaded.model, torch.nn.Module):
        loaded.model = loaded.model.eval().to(device)
    return loaded


def _exported(path: Path, device: str | None) -> Loaded:
    if not path.is_file():
        raise InputError("there is no such exported program", got=str(path), need="a file that torch.export.save wrote")
    if device not in (None, "cpu"):
        fix = "Export the model on that device."
        raise InputError("an exported program stays on its device", got=f"--device {device}", fix=fix)
    try:
        with third_party_silence(), quiet_failure():
            program = torch.export.load(path)
    except Exception as error:  # a damaged archive may raise anything
        got = f"{path}: {type(error).__name__}: {error}"
        raise InputError(
            "the exported program cannot be loaded", got=got, need="what torch.export.save wrote"
        ) from error
    return Loaded(program)


def _made(name: str) -> Loaded:
    """The result of a factory."""
    factory = _factory(name)
    try:
        made = factory()
    except Exception as error:  # user code may raise anything
        raise InputError(
            f"the factory {name} failed",
            got=f"{type(error).__name__}: {error}",
            fix="Run again with --debug to see where.",
        ) from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, torch.nn.Module | ExportedProgram):
        need = "a model (torch.nn.Module or ExportedProgram), or a model and its example inputs"
        raise InputError(f"the factory {name} does not return a model", got=type(model).__name__, need=need)
    if isinstance(inputs, torch.Tensor):
        return Loaded(model, Call((inputs,)))
    if isinstance(inputs, dict):
        return Loaded(model, Call(kwargs=inputs))
    if inputs is None or isinstance(inputs, tuple | list):
        return Loaded(model, None if inputs is None else Call(tuple(inputs)))
    need = "a tensor, a tuple of arguments, or a dict of arguments by name"
    raise InputError(f"the factory {name} returns invalid example inputs", got=type(inputs).__name__, need=need)


def _factory(name: str) -> Callable[[], Any]:
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = import_module(module_name)
    except Exception as error:  # user code may raise anything
        got = f"{module_name!r}: {type(error).__name__}: {error}"
        need = "a module in the current folder, or one that is installed"
        raise InputError("the module of the factory cannot be imported", got=got, need=need) from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise InputError(
            f"module {module_name} has no such factory", got=repr(attribute), need="a function without arguments"
        )
    return found  # type: ignore[no-any-return]  # a callable's type is known only when called
