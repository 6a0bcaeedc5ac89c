"""Support for tracing Hugging Face models. transformers is optional: it is imported only if a model uses it.

`tracing_settings` changes what the model visibly computes (no cache unless one is passed), so the check against the
model runs under it too; `tracing_patches` only replaces code that cannot be traced.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch

from qcompiler.capture.quiet import third_party_silence

CACHE_ARGUMENTS = ("use_cache", "past_key_values", "past_key_value", "cache_params")
CONFIGURED = ("use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits")
EXPORTABLE_EXPERTS = "grouped_mm"
PLAIN_CONTAINERS = ("builtins:tuple", "builtins:list", "builtins:set", "builtins:frozenset", "collections:OrderedDict")
TORCH_NAMES = (torch.dtype, torch.layout)


def pretrained_model(model: torch.nn.Module) -> torch.nn.Module | None:
    """Returns the outermost PreTrainedModel of transformers, the model or a module in it; None if there is none."""
    return next((module for module in model.modules() if _is_pretrained(module)), None)


@contextmanager
def tracing_settings(model: torch.nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Sets a model to what can be captured, and restores its configuration afterwards.

    A causal language model creates and returns a key-value cache by default. It is captured without one, unless the
    call passes `use_cache` or a cache: a graph that only scores or prefills does not need one.
    """
    inner = pretrained_model(model)
    with ExitStack() as stack:
        if inner is not None:
            if not _passes_cache(kwargs):
                stack.enter_context(_without_cache(inner))
            stack.enter_context(_exportable_experts(inner))
        yield


def implied_arguments(model: torch.nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns non-tensor arguments of a transformers model -> the value that None implies with `kwargs`."""
    if not _is_pretrained(model):
        return {}
    config: Any = model.config
    values: dict[str, Any] = {name: None for name in CACHE_ARGUMENTS if kwargs.get(name) is None}
    values |= {name: getattr(config, name) for name in CONFIGURED if isinstance(getattr(config, name, None), bool)}
    if not _passes_cache({name: value for name, value in kwargs.items() if name != "use_cache"}):
        values["use_cache"] = False
    return values


def pad_token(model: torch.nn.Module) -> int | None:
    """Returns the id of the padding token, if a transformers model defines one."""
    found = getattr(getattr(model, "config", None), "pad_token_id", None)
    return found if isinstance(found, int) and found >= 0 else None


@contextmanager
def tracing_patches(model: torch.nn.Module) -> Iterator[None]:
    """Temporarily applies transformers' own replacements for code that torch.export cannot trace.

    Raises:
        ImportError: This version of transformers has none, or the model is not a transformers model.
    """
    inner = pretrained_model(model)
    if inner is None:
        raise ImportError("not a transformers model")
    dynamo, patches = _exporter("exporter_dynamo"), _exporter("utils")
    with patches.apply_patches("dynamo"), dynamo.reset_model_state(inner):
        yield


def register_caches(model: torch.nn.Module) -> None:
    """Registers transformers' caches with pytree, so that they can be inputs and outputs."""
    inner = pretrained_model(model)
    if inner is None:
        return
    try:
        dynamo = _exporter("exporter_dynamo")
    except ImportError:  # an older transformers: its caches register themselves, or cannot be captured
        return
    dynamo.register_cache_pytrees_for_model(inner)


def register_cache(kind: type) -> None:
    """Registers a cache class of transformers with pytree; does nothing for other classes."""
    try:
        dynamo = _exporter("exporter_dynamo")
    except ImportError:  # as in `register_caches`
        return
    if dynamo.is_cache_class(kind):
        dynamo.register_pytree_node(kind)


def cache_layers(value: object) -> list[Any]:
    """Returns the layers of a transformers cache, of both halves if it has two; empty for anything else."""
    if not any(c.__name__ == "Cache" and c.__module__ == "transformers.cache_utils" for c in type(value).__mro__):
        return []
    halves = [getattr(value, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    return [layer for part in (value, *halves) for layer in getattr(part, "layers", None) or ()]


def lacks_memory(layer: Any) -> bool:
    """Whether a layer of a cache is static and allocates its tensors in its first call."""
    return hasattr(layer, "max_cache_len") and not layer.is_initialized


def is_cache_context(context: Any, may_be_named: Callable[[str], bool]) -> bool:
    """Whether pytree's context of a cache is safe: transformers instantiates each class that the context names.

    Args:
        context: The result of `to_dumpable_context`, or as read from a text.
        may_be_named: Whether `module:Class` is a known cache class.
    """
    if isinstance(context, list | tuple):
        return all(is_cache_context(item, may_be_named) for item in context)
    if not isinstance(context, dict):
        return True
    kind, path = context.get("_t"), context.get("p")
    if kind in ("obj", "type") and not (isinstance(path, str) and may_be_named(path)):
        return False
    if kind in ("map", "seq") and path not in PLAIN_CONTAINERS:
        return False
    if kind in ("dtype", "layout") and not isinstance(getattr(torch, str(context.get("n")), None), TORCH_NAMES):
        return False
    return all(is_cache_context(item, may_be_named) for item in context.values())


def cache_context_on(context: Any, device: torch.device, new: torch.device) -> Any:
    """Returns pytree's context of a cache with its device replaced: the context records where tensors are."""
    if isinstance(context, list):
        return [cache_context_on(item, device, new) for item in context]
    if not isinstance(context, dict):
        return context
    if context == {"_t": "device", "s": str(device)}:
        return {"_t": "device", "s": str(new)}
    return {key: cache_context_on(item, device, new) for key, item in context.items()}


def output_embeddings(model: torch.nn.Module) -> torch.Tensor | None:
    """Returns the weight of the output head that computes logits, if the model defines one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    weight = getattr(head, "weight", None)
    return weight if isinstance(weight, torch.Tensor) else None


def _exporter(name: str) -> Any:
    """Returns a module of transformers' exporters; the import loads every patched model, with deprecation warnings."""
    with third_party_silence():
        return import_module(f"transformers.exporters.{name}")


def _passes_cache(kwargs: Mapping[str, Any]) -> bool:
    return any(kwargs.get(name) is not None for name in CACHE_ARGUMENTS)


def _is_pretrained(module: torch.nn.Module) -> bool:
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__
    )


@contextmanager
def _without_cache(model: torch.nn.Module) -> Iterator[None]:
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, value in before:
            config.use_cache = value


@contextmanager
def _exportable_experts(model: torch.nn.Module) -> Iterator[None]:
    """Selects the batched or grouped implementation of experts: the loop over experts reads data."""
    get, put = getattr(model, "get_experts_implementation", None), getattr(model, "set_experts_implementation", None)
    before = get() if callable(get) else {}
    if not callable(put) or "eager" not in before.values():
        yield
        return
    try:
        put({key: EXPORTABLE_EXPERTS if value == "eager" else value for key, value in before.items()})
    except ValueError:  # a model without experts also reports "eager"
        yield
        return
    try:
        yield
    finally:
        put(before)
