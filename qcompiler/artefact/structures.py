"""Converts the structure of a call's arguments and results to JSON and back.

    ((x, {"mask": m}), {})  ->  {"tuple": [{"tuple": ["*", {"dict": [["mask", "*"]]}]}, {"dict": []}]}

torch's own text form imports any module that a text names. An artefact must not choose what is imported, so a class is
looked up by name only

    among classes registered with torch's pytree, and named tuples in imported modules;
    or in the transformers modules that define model outputs and caches, which are imported if needed.
"""

import re
import sys
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompiler.artefact.literals import from_json, is_exact, to_json
from qcompiler.artefact.strict_json import Node
from qcompiler.capture.huggingface import cache_context_on, is_cache_context, register_cache
from qcompiler.errors import ArtefactError

LEAF = "*"
_A_LEAF = pytree.tree_structure(0)

SEQUENCES: dict[str, type] = {"tuple": tuple, "list": list}
MAPPINGS: dict[str, type] = {"dict": dict, "ordered_dict": OrderedDict}
FACTORIES: dict[str, Any] = {
    "None": None,
    **{kind.__name__: kind for kind in (list, dict, set, tuple, int, float, str)},
}
"""Allowed factories of a defaultdict."""

IMPORTABLE = re.compile(r"transformers\.(modeling_outputs|cache_utils|generation\.utils|models(\.\w+)*\.modeling_\w+)")
"""Modules that may be imported on request: they are in an installed library and define models."""


def structure_to_json(spec: pytree.TreeSpec) -> Any:
    """A structure as JSON. Raises ArtefactError if one of its classes cannot be found again."""
    if spec.is_leaf():
        return LEAF
    children = [structure_to_json(child) for child in spec.children()]
    for name, kind in SEQUENCES.items():
        if spec.type is kind:
            return {name: children}
    for name, kind in MAPPINGS.items():
        if spec.type is kind:
            return {name: _pairs(spec.context, children)}
    if spec.type is defaultdict:
        factory, keys = spec.context
        made_by = next((name for name, known in FACTORIES.items() if factory is known), None)
        if made_by is None:
            raise ArtefactError("a defaultdict cannot be saved", got=f"its factory {factory!r}", need=list(FACTORIES))
        return {"default_dict": {"factory": made_by, "items": _pairs(keys, children)}}
    if spec.type is deque:
        return {"deque": {"longest": spec.context, "items": children}}
    if spec.type is namedtuple:
        return {
            "named_tuple": {"class": path_of(spec.context), "fields": list(spec.context._fields), "items": children}
        }
    return {"class": _registered(spec, children)}


def structure_from_json(node: Node) -> pytree.TreeSpec:
    """Parses the output of `structure_to_json`. Raises ArtefactError for anything else or an unknown class."""
    if node.value == LEAF:
        return _A_LEAF
    members = list(node.members())
    if len(members) != 1 or members[0][0] not in KINDS:
        node.wrong(f"a structure: {LEAF!r} or an object with one of {', '.join(KINDS)}")
    kind, inner = members[0]
    return KINDS[kind](inner)


def moved_structure(spec: pytree.TreeSpec, device: torch.device, new: torch.device) -> pytree.TreeSpec:
    """The structure with another device, which transformers caches store in their context."""
    if spec.is_leaf():
        return spec
    context = spec.context
    if getattr(spec.type, "__module__", "").startswith("transformers."):
        context = cache_context_on(context, device, new)
    return pytree.TreeSpec(spec.type, context, [moved_structure(child, device, new) for child in spec.children()])


def path_of(kind: type) -> str:
    """`module:Class`."""
    return f"{kind.__module__}:{kind.__qualname__}"


# Writing


def _pairs(keys: Any, children: list[Any]) -> list[list[Any]]:
    if wrong := [key for key in keys if not is_exact(key)]:
        raise ArtefactError("a dict with such a key cannot be saved", got=repr(wrong[0]), need="strings or numbers")
    return [[to_json(key), child] for key, child in zip(keys, children, strict=True)]


def _registered(spec: pytree.TreeSpec, children: list[Any]) -> dict[str, Any]:
    """A user class that is registered with torch's pytree."""
    definition = pytree.SUPPORTED_SERIALIZED_TYPES.get(spec.type)
    dump = definition.to_dumpable_context if definition is not None else None
    context = dump(spec.context) if dump is not None else spec.context
    if not is_exact(context):
        raise ArtefactError(
            "a model's arguments or results have a structure that cannot be saved",
            got=f"{path_of(spec.type)} with {context!r}",
            need="a context of numbers and strings",
            fix="Register the class with a to_dumpable_context and a from_dumpable_context.",
        )
    return {"name": path_of(spec.type), "context": to_json(context), "children": children}


# Reading


def _sequence(kind: type) -> Callable[[Node], pytree.TreeSpec]:
    return lambda node: pytree.TreeSpec(kind, None, [structure_from_json(item) for item in node.items()])


def _mapping(kind: type) -> Callable[[Node], pytree.TreeSpec]:
    return lambda node: pytree.TreeSpec(kind, *_keyed(node))


def _keyed(node: Node) -> tuple[list[Any], list[pytree.TreeSpec]]:
    keys, children = [], []
    for item in node.items():
        pair = item.items()
        if len(pair) != 2:
            item.wrong("a pair of a key and a structure")
        keys.append(from_json(pair[0]))
        children.append(structure_from_json(pair[1]))
    return keys, children


def _default_dict(node: Node) -> pytree.TreeSpec:
    name = node["factory"].text()
    if name not in FACTORIES:
        node["factory"].wrong(f"one of {', '.join(FACTORIES)}")
    keys, children = _keyed(node["items"])
    return pytree.TreeSpec(defaultdict, [FACTORIES[name], keys], children)


def _deque(node: Node) -> pytree.TreeSpec:
    longest = None if node["longest"].missing else node["longest"].count()
    return pytree.TreeSpec(deque, longest, [structure_from_json(item) for item in node["items"].items()])


def _named_tuple(node: Node) -> pytree.TreeSpec:
    path, fields = node["class"].text(), tuple(field.text() for field in node["fields"].items())
    module, _, name = path.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    if not (isinstance(found, type) and pytree.is_namedtuple_class(found) and found._fields == fields):  # type: ignore[attr-defined]
        raise _not_found(path, f"a named tuple with the fields {', '.join(fields)}", node)
    return pytree.TreeSpec(namedtuple, found, [structure_from_json(item) for item in node["items"].items()])


def _class(node: Node) -> pytree.TreeSpec:
    path = node["name"].text()
    kind = _known(path) or _imported(path)
    if kind is None:
        raise _not_found(path, "a class that torch's pytree knows", node)
    definition = pytree.SUPPORTED_SERIALIZED_TYPES.get(kind)
    load = definition.from_dumpable_context if definition is not None else None
    context = from_json(node["context"])
    if load is None and not is_cache_context(context, _may_be_named):
        node["context"].wrong("a context that names only classes of transformers")
    children = [structure_from_json(item) for item in node["children"].items()]
    return pytree.TreeSpec(kind, load(context) if load is not None else context, children)


def _known(path: str) -> type | None:
    return next((kind for kind in pytree.SUPPORTED_NODES if isinstance(kind, type) and path_of(kind) == path), None)


def _imported(path: str) -> type | None:
    """A transformers class from an importable module; None if it is another class or does not exist."""
    module, _, name = path.partition(":")
    if IMPORTABLE.fullmatch(module) is None:
        return None
    try:
        found = vars(import_module(module)).get(name)
    except ImportError:
        return None
    if isinstance(found, type) and found not in pytree.SUPPORTED_NODES:
        register_cache(found)
    return _known(path)


def _may_be_named(path: str) -> bool:
    """Whether the state of a cache may refer to a class."""
    module, _, name = path.partition(":")
    return (IMPORTABLE.fullmatch(module) is not None and name.isidentifier()) or _known(path) is not None


def _not_found(path: str, need: str, node: Node) -> ArtefactError:
    module = path.partition(":")[0]
    fix = f"Import {module} before the artefact is loaded."
    if IMPORTABLE.fullmatch(module):
        fix = 'Install a transformers that has it: pip install "qcompiler[hf]".'
    return ArtefactError(
        "the model's arguments or results are of a class that is not known here",
        got=path,
        need=need,
        where=f"{node.file}, {node.place}",
        fix=fix,
    )


KINDS: dict[str, Callable[[Node], pytree.TreeSpec]] = {
    **{name: _sequence(kind) for name, kind in SEQUENCES.items()},
    **{name: _mapping(kind) for name, kind in MAPPINGS.items()},
    "default_dict": _default_dict,
    "deque": _deque,
    "named_tuple": _named_tuple,
    "class": _class,
}
