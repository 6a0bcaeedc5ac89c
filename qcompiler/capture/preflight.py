"""Checks a model before tracing: reports each problem in one sentence, not as an error from inside torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qcompiler.errors import CaptureError
from qcompiler.runtime.executable import CompiledModule
from qcompiler.runtime.weights import named_tensors

HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
"""nn.Module's attribute for each kind of hook -> its name for users."""


def check_model(model: object, *, allow_meta: bool = False) -> torch.nn.Module:
    """Returns the model if it can be traced.

    Args:
        model: The user's argument.
        allow_meta: Whether weights may be on the meta device (structure without data).

    Raises:
        CaptureError: It is not an eager nn.Module, is already compiled, is in training mode, has hooks, or has weights
            without data, on several devices, in a tensor subclass, or in a sparse layout.
    """
    module = _check_kind(model)
    for check in (_check_compiled, _check_mode, _check_lazy, _check_hooks, _check_subclasses, _check_layouts):
        check(module)
    if not allow_meta:
        _check_data(module)
    _check_devices(module)
    return module


def check_inputs(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises CaptureError if the model does not accept the arguments, or one is on another device than the weights."""
    _check_arguments(model, args, kwargs)
    home = device_of(model)
    if home is None:
        return
    for path, leaf in pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))[0]:
        if isinstance(leaf, torch.Tensor) and leaf.device != home and (leaf.ndim or leaf.device.type != "cpu"):
            raise CaptureError(
                f"an example input is on a different device than the model: {pytree.keystr(path)}",
                got=leaf.device,
                need=home,
                fix="Move the input, or the model, with .to(device).",
            )


def _check_arguments(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    try:
        takes = signature(model.forward)
    except (TypeError, ValueError):  # a forward not written in Python has no signature
        return
    try:
        takes.bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([f"{len(args)} by position"] * bool(args) + [repr(name) for name in kwargs]) or "none"
        raise CaptureError(
            "the example inputs do not match the signature of the model's forward",
            got=f"{given}: {error}",
            need=", ".join(map(str, takes.parameters.values())) or "none",
        ) from error


def device_of(model: torch.nn.Module) -> torch.device | None:
    """Returns the device of the weights; None for a model without weights."""
    return next((tensor.device for _, tensor in _placed(model)), None)


def _check_kind(model: object) -> torch.nn.Module:
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "a TorchScript module cannot be captured",
            got=type(model).__name__,
            need="the eager nn.Module it was made from",
        )
    if isinstance(model, type):
        raise CaptureError("a class cannot be captured", got=model.__name__, need="an instance of it")
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(
            "only a torch.nn.Module or an ExportedProgram can be captured",
            got=type(model).__name__,
            fix="Wrap a function in a module whose forward calls it.",
        )
    if hasattr(model, "_orig_mod"):
        raise CaptureError(
            "a model wrapped by torch.compile cannot be captured",
            got=type(model).__name__,
            fix="Pass the model itself; torch.compile may wrap the result.",
        )
    return model


def _check_compiled(model: torch.nn.Module) -> None:
    """Rejects a compiled model, and a model that contains one: it has no layers left to quantize."""
    found = next((name for name, module in model.named_modules() if isinstance(module, CompiledModule)), None)
    if found is not None:
        raise CaptureError(
            f"{_called(found)} is already compiled",
            need="a floating-point model",
            fix="Compile the original model: compiled.origin, if it is still in memory or came from a folder.",
        )


def _check_mode(model: torch.nn.Module) -> None:
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise CaptureError(
            "the model is in training mode",
            got=f"{_called(training)}.training is True",
            fix="Call model.eval() first: compiled models are for inference only.",
        )


def _check_lazy(model: torch.nn.Module) -> None:
    lazy = next((name for name, tensor in named_tensors(model).items() if is_lazy(tensor)), None)
    if lazy is not None:
        raise CaptureError(
            f"the weight {lazy!r} is uninitialized", fix="Call the model once with real inputs to initialize it."
        )


def _check_hooks(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise CaptureError(
                f"accelerate has put a hook on {_called(name)} that moves weights while the model runs",
                got=type(module._hf_hook).__name__,
                fix="Load it on one device without device_map, or call accelerate.hooks.remove_hook_from_submodules.",
            )
        for attribute, words in HOOKS.items():
            hooks = [hook for hook in getattr(module, attribute, {}).values() if not _is_recorder(hook)]
            if hooks:
                raise CaptureError(
                    f"{_called(name)} has a {words}, which a graph cannot call",
                    got=getattr(hooks[0], "__qualname__", type(hooks[0]).__name__),
                    fix="Remove it (handle.remove()); for weight norm, call torch.nn.utils.remove_weight_norm.",
                )


def _is_recorder(hook: Callable[..., Any]) -> bool:
    # transformers leaves its output recorders on the layers after a call with output_hidden_states; they are traceable.
    return str(getattr(hook, "__module__", "")).startswith("transformers.utils.")


def _check_subclasses(model: torch.nn.Module) -> None:
    for name, tensor in named_tensors(model).items():
        if is_traceable_wrapper_subclass(tensor.data if isinstance(tensor, torch.nn.Parameter) else tensor):
            raise CaptureError(
                f"the weight {name!r} is a tensor subclass, which hides several tensors",
                got=type(tensor).__name__,
                need="a plain torch.Tensor",
                fix="Capture the model before another tool quantizes or shards it.",
            )


def _check_layouts(model: torch.nn.Module) -> None:
    for name, tensor in named_tensors(model).items():
        if tensor.layout is not torch.strided:
            raise CaptureError(
                f"the weight {name!r} does not store all of its elements in order", got=tensor.layout,
                need="torch.strided", fix="Convert it with .to_dense().",
            )  # fmt: skip


def _check_data(model: torch.nn.Module) -> None:
    empty = next((name for name, tensor in named_tensors(model).items() if tensor.is_meta), None)
    if empty is not None:
        raise CaptureError(
            f"the weight {empty!r} is on the meta device and has no data",
            fix="Load the weights first, or pass allow_meta=True to capture the structure alone.",
        )


def _check_devices(model: torch.nn.Module) -> None:
    first: dict[torch.device, str] = {}
    for name, tensor in _placed(model):
        first.setdefault(tensor.device, name)
    if len(first) > 1:
        places = ", ".join(f"{name!r} on {device}" for device, name in first.items())
        raise CaptureError(
            "the weights are on several devices", got=places, fix="Move the model with model.to(device)."
        )


def _placed(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    # torch combines CPU scalars with tensors of any device, so such a buffer does not show the device of the model.
    tensors = list(named_tensors(model).items())
    return ((name, t) for name, t in tensors if t.ndim or t.device.type != "cpu" or len(tensors) == 1)


def _called(name: str) -> str:
    return f"model.{name}" if name else "model"
