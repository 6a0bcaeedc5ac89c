"""Plain attributes of modules, such as a window size, are after a capture what they were before it.

Some models write them in forward. Swin makes its windows smaller when an image is, and keeps them so: a run at other
sizes than the user's would change what the model computes, and a trace would leave symbols behind. Between the runs of
one capture they change as the model wants: a model that counts its calls has no graph, and must be seen to differ.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import NoneType

import torch

PLAIN = (bool, int, float, str, NoneType, tuple, torch.dtype)
"""Types of attributes that are restored; sizes are among them. Containers that can change in place are not."""

MISSING = object()


@contextmanager
def same_attributes(model: torch.nn.Module) -> Iterator[None]:
    """Restores the plain attributes of all modules when the block ends; attributes that are new stay."""
    before = [
        (vars(module), {name: value for name, value in vars(module).items() if isinstance(value, PLAIN)})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for attributes, known in before:
            for name, value in known.items():
                if attributes.get(name, MISSING) is not value:
                    attributes[name] = value
