"""The model that a program was compiled from, as far as a compiled model remembers it without holding it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from qcompiler.ir import Graph

SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)


class Forward(NamedTuple):
    """What a user sees of `forward`."""

    signature: inspect.Signature | None = None
    doc: str | None = None


def _none() -> None:
    return None


@dataclass(frozen=True)
class Original:
    """What is known of the model that was compiled.

    Attributes:
        forward: Signature and documentation of its `forward`.
        config: Gives its configuration, as transformers' models have one; None if it has none.
        again: Gives the model itself: read again if it came from a folder, None if it is no longer in memory.
    """

    forward: Forward = field(default_factory=Forward)
    config: Callable[[], Any] = _none
    again: Callable[[], Any] = _none


def describe(model: Any, again: Callable[[], Any]) -> Original:
    """What a compiled model remembers of `model`; `again` gives the model later, without holding it."""
    config = getattr(model, "config", None)
    return Original(_describe_forward(model), lambda: config, again)


def _describe_forward(model: object) -> Forward:
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
    return Forward()
