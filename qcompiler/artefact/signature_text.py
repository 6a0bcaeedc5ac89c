"""Converts a model's signature (structures, slots, sizes, conditions, `forward`) to JSON and back."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from qcompiler.artefact.leeway_text import leeway_from_json, leeway_to_json, size_from_json, size_to_json
from qcompiler.artefact.literals import Shown, device_from, dtype_from, from_json, to_json
from qcompiler.artefact.strict_json import Node
from qcompiler.artefact.structures import moved_structure, structure_from_json, structure_to_json
from qcompiler.capture.arguments import MISSING
from qcompiler.capture.signature import (
    RELATIONS,
    Condition,
    ConstantSlot,
    NumberSlot,
    Signature,
    Slot,
    TensorSlot,
    linear,
)
from qcompiler.ir.ranges import Range
from qcompiler.program.original import Forward

KINDS = (
    inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD,
)  # fmt: skip


def signature_to_json(signature: Signature, forward: Forward) -> dict[str, Any]:
    """A signature as JSON. Raises ArtefactError if the class of an argument or a result cannot be found again."""
    return {
        "arguments": structure_to_json(signature.in_spec),
        "results": structure_to_json(signature.out_spec),
        "slots": [_slot_to_json(slot) for slot in signature.slots],
        "symbols": {name: [bounds.low, bounds.high] for name, bounds in signature.symbols.items()},
        "parameters": [[name, _default_to_json(value)] for name, value in signature.parameters],
        "device": None if signature.device is None else str(signature.device),
        "conditions": [
            [condition.relation, size_to_json(condition.left), size_to_json(condition.right)]
            for condition in signature.conditions
        ],
        "leeway": leeway_to_json(signature.leeway),
        "forward": _forward_to_json(forward),
    }


def signature_from_json(node: Node) -> tuple[Signature, Forward]:
    """Parses the output of `signature_to_json`. Raises ArtefactError for anything else."""
    device = node["device"]
    signature = Signature(
        structure_from_json(node["arguments"]),
        structure_from_json(node["results"]),
        tuple(_slot_from_json(slot) for slot in node["slots"].items()),
        {name: _range_from_json(bounds) for name, bounds in node["symbols"].members()},
        tuple((name.text(), _default_from_json(value)) for name, value in map(_pair, node["parameters"].items())),
        None if device.missing else device_from(device),
        tuple(_condition_from_json(item) for item in node["conditions"].items()),
    )
    if signature.in_spec.num_leaves != len(signature.slots):
        node["slots"].wrong(f"{signature.in_spec.num_leaves} slots, one for each argument")
    if signature.in_spec.type is not tuple or signature.in_spec.num_children != 2:
        node["arguments"].wrong("a tuple of the arguments by position and those by name")
    if "leeway" in node.value:  # older artefacts do not have it
        bound = {name for slot in signature.slots for name in _symbols(slot)}
        signature = replace(signature, leeway=leeway_from_json(node["leeway"], bound))
    return signature, _forward_from_json(node["forward"])


def moved(signature: Signature, device: torch.device) -> Signature:
    """The signature for another device; inputs that were not on the model's device stay where they are."""
    old = signature.device
    if old is None or old == device:
        return signature
    slots = tuple(
        replace(slot, device=device) if isinstance(slot, TensorSlot) and slot.device == old else slot
        for slot in signature.slots
    )
    arguments, results = (moved_structure(spec, old, device) for spec in (signature.in_spec, signature.out_spec))
    return replace(signature, in_spec=arguments, out_spec=results, slots=slots, device=device)


# Slots


def _slot_to_json(slot: Slot) -> dict[str, Any]:
    if isinstance(slot, TensorSlot):
        return {
            "kind": "tensor", "path": slot.path, "name": slot.name, **to_json(slot.dtype), **to_json(slot.device),
            "shape": [size_to_json(size) for size in slot.shape],
        }  # fmt: skip
    if isinstance(slot, NumberSlot):
        value = None if slot.value is None else size_to_json(slot.value)
        return {"kind": "number", "path": slot.path, "name": slot.name, "value": value}
    return {"kind": "constant", "path": slot.path, "value": to_json(slot.value)}


def _slot_from_json(node: Node) -> Slot:
    kind, path = node["kind"].text(), node["path"].text()
    if kind == "tensor":
        shape = tuple(size_from_json(size) for size in node["shape"].items())
        return TensorSlot(path, node["name"].text(), dtype_from(node["dtype"]), device_from(node["device"]), shape)
    if kind == "number":
        value = node["value"]
        return NumberSlot(path, node["name"].text(), None if value.missing else size_from_json(value))
    if kind == "constant":
        return ConstantSlot(path, from_json(node["value"]))
    node["kind"].wrong("tensor, number or constant")


def _symbols(slot: Slot) -> Iterator[str]:
    """The symbols that an input determines."""
    for size in slot.shape if isinstance(slot, TensorSlot) else ():
        if (form := linear(size)) is not None:
            yield form[0]


def _range_from_json(node: Node) -> Range:
    low, high = _pair(node)
    return Range(low.count(), None if high.missing else high.count())


def _condition_from_json(node: Node) -> Condition:
    parts = node.items()
    if len(parts) != 3 or parts[0].text() not in RELATIONS:
        node.wrong("a relation and two sizes")
    return Condition(parts[0].text(), size_from_json(parts[1]), size_from_json(parts[2]))


def _pair(node: Node) -> tuple[Node, Node]:
    parts = node.items()
    return (parts[0], parts[1]) if len(parts) == 2 else node.wrong("a list of two")


# Parameters of forward


def _default_to_json(value: Any) -> Any:
    return {} if value is MISSING or value is inspect.Parameter.empty else {"default": to_json(value)}


def _default_from_json(node: Node) -> Any:
    """The default of an argument; an argument whose default JSON cannot hold becomes required."""
    value = from_json(node["default"]) if node.value else MISSING
    return MISSING if isinstance(value, Shown) else value


def _forward_to_json(forward: Forward) -> dict[str, Any]:
    if forward.signature is None:
        return {"parameters": None, "doc": forward.doc}
    parameters = [
        {"name": found.name, "kind": found.kind.name, **_default_to_json(found.default)}
        for found in forward.signature.parameters.values()
    ]
    return {"parameters": parameters, "doc": forward.doc}


def _forward_from_json(node: Node) -> Forward:
    doc = None if node["doc"].missing else node["doc"].text()
    if node["parameters"].missing:
        return Forward(None, doc)
    try:
        parameters = [_parameter(item) for item in node["parameters"].items()]
        return Forward(inspect.Signature(parameters), doc)
    except ValueError as error:
        node["parameters"].wrong(f"the parameters of a function: {error}")


def _parameter(node: Node) -> inspect.Parameter:
    kinds: Mapping[str, Any] = {kind.name: kind for kind in KINDS}
    kind = node["kind"].text()
    if kind not in kinds:
        node["kind"].wrong(f"one of {', '.join(kinds)}")
    default = from_json(node["default"]) if "default" in node.value else inspect.Parameter.empty
    return inspect.Parameter(node["name"].text(), kinds[kind], default=default)
