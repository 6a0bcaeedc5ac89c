"""Traces of whole models by torch.export, shared by the tests of a process: most models are traced by many tests.

A trace sees no values of tensors, so it is shared by models of the same class and configuration whose modules and
tensors have the same attributes. Models with hooks, patches or modules of other packages are always traced, and so is
every model of `tests/capture`.
"""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

Export = Callable[..., ExportedProgram]
PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
IGNORED = ("_name_or_path", "_is_hf_initialized", "name_or_path")
"""Attributes of models and configurations that no trace depends on."""
KNOWN = ("torch.nn.modules.", "transformers.models.", "transformers.activations", "transformers.pytorch_utils")


_programs: dict[Any, ExportedProgram] = {}


def shared(export: Export) -> Export:
    """Wraps `qcompiler.capture.exporting.export_program`."""

    def find_or_export(
        model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any = "auto"
    ) -> ExportedProgram:
        if dynamic_shapes not in ("auto", None) or (key := _key(model, args, kwargs)) is None:
            return export(model, args, kwargs, dynamic_shapes)
        if (found := _programs.get((key, dynamic_shapes))) is None:
            found = _programs[key, dynamic_shapes] = export(model, args, kwargs, dynamic_shapes)
        return _with_constants(found, dict(model.named_buffers(remove_duplicate=False)))

    return find_or_export


def _with_constants(program: ExportedProgram, buffers: Mapping[str, torch.Tensor]) -> ExportedProgram:
    """The program with the model's own buffers instead of the buffers of the traced model."""
    made = copy.copy(program)
    made._constants = {name: buffers.get(name, value) for name, value in program.constants.items()}
    return made


def _key(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Everything that a trace of the call depends on; None if that is unknown."""
    config = getattr(model, "config", None)
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    if not type(model).__module__.startswith("transformers.models.") or config is None:
        return None
    if not all(type(leaf) is torch.Tensor or isinstance(leaf, PLAIN) for leaf in leaves):
        return None
    modules = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not _is_known(type(module)) or _is_changed(module):
            return None
        plain = {key: value for key, value in vars(module).items() if isinstance(value, PLAIN) and key not in IGNORED}
        modules.append((name, type(module), repr(plain)))
    tensors: dict[int, str] = {}  # the first name of each tensor: tied ones have one
    named = [
        (name, tensors.setdefault(id(tensor), name), _attributes(tensor))
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    ]
    call = tuple(_attributes(leaf) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf) for leaf in leaves)
    same = [
        next(index for index, other in enumerate(leaves) if other is leaf)
        for leaf in leaves
        if isinstance(leaf, torch.Tensor)
    ]
    settings = sorted((name, repr(value)) for name, value in vars(config).items() if name not in IGNORED)
    return repr((torch.get_default_dtype(), modules, settings, named, spec, call, same))


def _is_known(kind: type) -> bool:
    """Whether a class is one of torch or transformers; classes made at run time may only have the name of one."""
    home = sys.modules.get(kind.__module__)
    return kind.__module__.startswith(KNOWN) and getattr(home, kind.__qualname__, None) is kind


def _is_changed(module: torch.nn.Module) -> bool:
    """Whether a module has hooks, or attributes that hide methods of its class."""
    hooks = any(value for name, value in vars(module).items() if name.endswith("_hooks") and value)
    return hooks or any(callable(value) and hasattr(type(module), name) for name, value in vars(module).items())


def _attributes(tensor: torch.Tensor) -> Any:
    return type(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.requires_grad
