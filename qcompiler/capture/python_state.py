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


TABLES = ("_buffers", "_parameters", "_modules")
"""Where a module keeps the attributes that are not plain entries of its `vars`."""


@contextmanager
def same_attributes(model: torch.nn.Module, remove_new: bool = False) -> Iterator[None]:
    """Restores the plain attributes of all modules when the block ends.

    Args:
        model: The model.
        remove_new: Whether attributes that are new are removed, too. A trace leaves tensors without data in them, which
            a model that computes a mask once and keeps it would use from then on.
    """
    before = [
        (vars(module), {name: value for name, value in vars(module).items() if isinstance(value, PLAIN)})
        for module in model.modules()
    ]
    tables = [table for attributes, _ in before for table in (attributes, *(attributes[key] for key in TABLES))]
    names = [set(table) for table in tables] if remove_new else []
    try:
        yield
    finally:
        for attributes, known in before:
            for name, value in known.items():
                if attributes.get(name, MISSING) is not value:
                    attributes[name] = value
        for table, old in zip(tables, names, strict=False):
            for name in table.keys() - old:
                del table[name]
