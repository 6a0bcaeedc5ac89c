"""transformers' key-value caches as example inputs: allocates static caches, and rejects unsupported ones.

A `StaticCache` allocates its tensors in its first call, but only tensors can be inputs. Capture runs a copy of the
model once to allocate them.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompiler.capture.examples import Call
from qcompiler.capture.huggingface import cache_layers, lacks_memory
from qcompiler.capture.runs import run_aside
from qcompiler.errors import CaptureError


def prepare_caches(model: torch.nn.Module, call: Call) -> None:
    """Allocates the static caches of a call, in place; their contents stay empty.

    Raises:
        CaptureError: A cache counts its tokens in Python, which a graph would record as a constant.
    """
    for path, layer in _layers(call):
        _check_counter(path, layer)
    if not any(lacks_memory(layer) for _, layer in _layers(call)):
        return
    filled = copy.deepcopy(call)
    run_aside(model, filled)
    for (_, layer), (_, used) in zip(_layers(call), _layers(filled), strict=True):
        if lacks_memory(layer) and used.is_initialized:
            layer.lazy_initialization(used.keys[:, :, :0], used.values[:, :, :0])


def has_cache(call: Call) -> bool:
    """Whether the arguments of a call include a cache."""
    return any(True for _ in _layers(call))


def static_caches(call: Call) -> list[str]:
    """Returns the names of the arguments that are caches of fixed maximum length."""
    return [path for path, layer in _layers(call) if hasattr(layer, "max_cache_len")]


def _layers(call: Call) -> Iterator[tuple[str, Any]]:
    """Yields each layer of each cache among the arguments, with the name of the argument."""
    args, kwargs = call
    named = [*((f"args[{index}]", value) for index, value in enumerate(args)), *kwargs.items()]
    for name, value in named:
        for leaf in pytree.tree_leaves(value, is_leaf=lambda x: bool(cache_layers(x))):
            for layer in cache_layers(leaf):
                yield name, layer


def _check_counter(path: str, layer: Any) -> None:
    static = hasattr(layer, "max_cache_len")
    if not getattr(layer, "is_sliding", False) or not (static or layer.is_initialized):
        return
    raise CaptureError(
        f"a cache with a sliding window counts its tokens in Python, so a graph would be valid for one step: {path}",
        got=type(layer).__name__,
        need="layers that keep all tokens",
        fix="Create it with transformers.DynamicCache(), without the config: the model's mask applies the window.",
    )
