"""Restores the Python attributes of modules, such as a window size, after a capture.

Some models write attributes in forward. Swin shrinks its windows for small images and keeps them small: a run at other
sizes would change what the model computes, and a trace would leave symbols in them. Between the runs of one capture the
model may change them: a model that counts its calls has no graph, and the check must see it differ.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any

import torch

PLAIN = (bool, int, float, str, NoneType, tuple, torch.dtype)
"""Attribute types that are restored, sizes among them."""

CONTAINERS = (list, dict, set)
"""Container types whose contents are restored too, one level deep."""

MISSING = object()

HOOKS = tuple(name for name, value in vars(torch.nn.Module()).items() if "hooks" in name and isinstance(value, dict))

TABLES = ("_buffers", "_parameters", "_modules", *HOOKS)
"""Entries of nn.Module that are not directly in `vars`. transformers registers hooks in the first call, and a flag."""

OWN = frozenset(vars(torch.nn.Module()))
"""torch's own entries in every module: hooks, and the tables above."""


@contextmanager
def same_attributes(model: torch.nn.Module, remove_new: bool = False) -> Iterator[None]:
    """Restores the plain attributes and the containers of all modules when the block ends.

    Args:
        model: The model.
        remove_new: Whether to remove new attributes as well. A trace leaves tensors without data in them, which a model
            that caches its mask would use from then on.
    """
    before = [
        (vars(module), {name: value for name, value in vars(module).items() if _is_restored(name, value)})
        for module in model.modules()
    ]
    contents = [(value, value.copy()) for _, known in before for value in known.values() if type(value) in CONTAINERS]
    tables = [table for attributes, _ in before for table in (attributes, *(attributes[key] for key in TABLES))]
    names = [set(table) for table in tables] if remove_new else []
    try:
        yield
    finally:
        for attributes, known in before:
            for name, value in known.items():
                if attributes.get(name, MISSING) is not value:
                    attributes[name] = value
        for container, content in contents:
            _put_back(container, content)
        for table, old in zip(tables, names, strict=False):
            for name in table.keys() - old:
                del table[name]


def _is_restored(name: str, value: object) -> bool:
    return isinstance(value, PLAIN) or (type(value) in CONTAINERS and name not in OWN)


def _put_back(container: Any, content: Any) -> None:
    """Restores the content of a list, dict or set, unless it is unchanged; elements are compared by identity."""
    if _identities(container) == _identities(content):
        return
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def _identities(container: Any) -> list[int]:
    return [*map(id, container), *(map(id, container.values()) if isinstance(container, dict) else ())]
