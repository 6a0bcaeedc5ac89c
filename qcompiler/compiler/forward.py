"""The forward of a compiled model shows the signature and documentation of the original model's."""

import inspect
from typing import Any, TypeVar

import torch

from qcompiler.artefact.signature_text import Forward
from qcompiler.ir import Graph
from qcompiler.runtime.executable import CompiledModule

Kind = TypeVar("Kind", bound=CompiledModule)

SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)


def describe_forward(model: object) -> Forward:
    """Signature and documentation of a model's forward; None for what cannot be found out."""
    try:
        if isinstance(model, Graph):
            either = inspect.Parameter.POSITIONAL_OR_KEYWORD
            names = [inspect.Parameter(value.name, either) for value in model.inputs]
            return Forward(inspect.Signature([SELF, *names]), None)
        if isinstance(model, torch.nn.Module):
            found = inspect.signature(model.forward)
            return Forward(found.replace(parameters=[SELF, *found.parameters.values()]), model.forward.__doc__)
    except (TypeError, ValueError):  # a forward written in C, a name that is no identifier
        pass
    return Forward(None, None)


def class_with(kind: type[Kind], shown: Forward) -> type[Kind]:
    """A subclass of `kind` whose forward shows `shown`: the signature of a method belongs to its class."""
    if shown.signature is None:
        return kind

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._call(args, kwargs)

    forward.__signature__ = shown.signature  # type: ignore[attr-defined]
    forward.__doc__ = shown.doc or kind.forward.__doc__
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {"forward": forward, **names})


def forward_of(kind: type[CompiledModule]) -> Forward:
    """What `class_with` was given for this class."""
    if not hasattr(kind.forward, "__signature__"):
        return Forward(None, None)
    return Forward(inspect.signature(kind.forward), kind.forward.__doc__)
