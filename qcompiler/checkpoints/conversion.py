"""Converts tensors between checkpoint files and a transformers model, which may stack tensors.

    mlp.experts.0.gate_proj.weight, mlp.experts.0.up_proj.weight, …    <->    mlp.experts.gate_up_proj [E, 2 I, K]

transformers has tables of these conversions; `stacking` applies them to both codes and scales. This is exact for
operations that stack and split whole matrices; any other operation is rejected.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from qcompiler.errors import QCompilerError

EXACT = ("MergeModulelist", "Concatenate", "SplitModulelist", "Chunk", "Split")
"""transformers' operations that join or split whole matrices and keep the order of elements in each."""

Tensors = dict[str, Tensor]


def is_converted(model: nn.Module) -> bool:
    """Whether transformers has conversion tables for a model."""
    return any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__) and hasattr(model, "config")


@dataclass
class Plan:
    """A conversion of some tensors of the files into some tensors of a model.

    Attributes:
        target: The name in the model; for several tensors, the first name.
        sources: Names in the files, each with the pattern that it matches.
        step: transformers' renaming or conversion.
    """

    target: str
    sources: list[tuple[str, str]]
    step: Any

    @property
    def operations(self) -> tuple[str, ...]:
        """Class names of transformers' conversions."""
        return tuple(type(operation).__name__ for operation in getattr(self.step, "operations", ()))

    def convert(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensors:
        """Converted tensors by their names in the model."""
        step = deepcopy(self.step)  # transformers accumulates tensors in it
        for name, pattern in self.sources:
            step.add_tensor(self.target, name, pattern, tensors[name])
        found = step.convert(self.target, model=model, config=getattr(model, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


class _Renamed:
    """The plan for a model that is not from transformers: one tensor under its own name."""

    def __init__(self) -> None:
        self.tensors: Tensors = {}

    def add_tensor(self, target: str, name: str, pattern: str, tensor: Tensor) -> None:
        """Same interface as transformers' class."""
        self.tensors[target] = tensor

    def convert(self, target: str, **_: Any) -> Tensors:
        """Same interface as transformers' class."""
        return self.tensors


def plans(model: nn.Module, names: Iterable[str]) -> list[Plan]:
    """The conversions from tensors of the files to tensors of a model."""
    if not is_converted(model):
        return [Plan(name, [(name, name)], _Renamed()) for name in names]
    loading = import_module("transformers.core_model_loading")
    found: dict[str, Plan] = {}
    for name, (target, pattern, converter) in _renamed(model, names).items():
        step = loading.WeightRenaming(name, target) if converter is None else converter
        found.setdefault(target, Plan(target, [], step)).sources.append((name, pattern or name))
    return [*found.values()]


def to_model(model: nn.Module, tensors: Mapping[str, Tensor], exact: bool = True) -> Tensors:
    """Tensors of the files -> tensors of the model, by name; `exact` rejects operations that reorder elements."""
    if not is_converted(model):
        return dict(tensors)
    found: Tensors = {}
    for plan in plans(model, tensors):
        if exact:
            check_exact(plan.operations, plan.target)
        found |= plan.convert(model, tensors)
    return found


def names_in_model(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Names of tensors in files -> names of the model weights that they are, or are parts of."""
    if not is_converted(model):
        return {name: name for name in names}
    return {name: target for name, (target, _, _) in _renamed(model, names).items()}


def _renamed(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, str | None, Any]]:
    """Name in the files -> name in the model, and transformers' pattern and conversion, if there is one."""
    loading = import_module("transformers.core_model_loading")
    table = import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, loading.WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix, state = getattr(model, "base_model_prefix", None), model.state_dict()
    found = {}
    for name in sorted(names, key=loading.dot_natural_key):
        target, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
        found[name] = (target, pattern, None if pattern is None else by_pattern[pattern])
    return found


def to_files(model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors of the model -> tensors of the files, by name."""
    if not is_converted(model):
        return dict(tensors)
    found: Tensors = import_module("transformers.core_model_loading").revert_weight_conversion(model, dict(tensors))
    return found


def operations_on(model: nn.Module, name: str) -> tuple[str, ...]:
    """transformers' operations on a model weight when it is written."""
    loading = import_module("transformers.core_model_loading")
    table = getattr(model, "_weight_conversions", None)
    if table is None:
        mapping = import_module("transformers.conversion_mapping")
        table = mapping.get_model_conversion_mapping(model, add_legacy=False)
    back = [entry.reverse_transform() for entry in reversed(table) if isinstance(entry, loading.WeightConverter)]
    found = next((entry.operations for entry in back if entry.rename_source_key(name)[1] is not None), ())
    return tuple(type(step).__name__ for step in found)


def check_exact(operations: Iterable[str], name: str) -> None:
    """Raises QCompilerError for an operation that does not keep matrices whole."""
    if wrong := [step for step in operations if step not in EXACT]:
        problem = f"transformers reorders the elements of '{name}', which codes and scales do not support"
        raise QCompilerError(problem, got=wrong[0], need=" or ".join(EXACT))
