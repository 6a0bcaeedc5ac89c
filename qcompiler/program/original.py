"""What a compiled model remembers of the original model without holding it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from qcompiler.ir import Graph

SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)


class Forward(NamedTuple):
    """The user-visible properties of `forward`."""

    signature: inspect.Signature | None = None
    doc: str | None = None


def _none() -> None:
    return None


@dataclass(frozen=True)
class Original:
    """Facts about the original model.

    Attributes:
        forward: Signature and documentation of its `forward`.
        config: Returns its configuration, as in transformers models; None if it has none.
        again: Returns the model: read again if it came from a folder, None if it has been freed.
    """

    forward: Forward = field(default_factory=Forward)
    config: Callable[[], Any] = _none
    again: Callable[[], Any] = _none


def describe(model: Any, again: Callable[[], Any]) -> Original:
    """Collects the facts about `model`; `again` returns the model later, without holding it."""
    config = getattr(model, "config", None)
    return Original(_describe_forward(model), lambda: config, again)


def _describe_forward(model: object) -> Forward:
    """Returns signature and documentation of a model's forward; None if unknown."""
    try:
        if isinstance(model, Graph):
            either = inspect.Parameter.POSITIONAL_OR_KEYWORD
            names = [inspect.Parameter(value.name, either) for value in model.inputs]
            return Forward(inspect.Signature([SELF, *names]), None)
        if isinstance(model, torch.nn.Module):
            found = inspect.signature(model.forward)
            return Forward(found.replace(parameters=[SELF, *found.parameters.values()]), model.forward.__doc__)
    except (TypeError, ValueError):  # a forward written in C, or an invalid parameter name
        pass
    return Forward()
