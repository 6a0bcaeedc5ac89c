"""Between the names of a checkpoint's files and those of a transformers model, which may stack what files have apart.

    mlp.experts.0.gate_proj.weight, mlp.experts.0.up_proj.weight, …    <->    mlp.experts.gate_up_proj [E, 2 I, K]

transformers has tables of these conversions, which are applied here to codes and to scales alike. That is exact for
operations that stack and cut along whole blocks; any other one is refused.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from qcompiler.checkpoints.quantized_weight import QuantizedWeight
from qcompiler.errors import QCompilerError
from qcompiler.numerics import ALL, scale_shape

EXACT = ("MergeModulelist", "Concatenate", "SplitModulelist", "Chunk", "Split")
"""The operations of transformers' that put matrices together, or take them apart, without touching a matrix inside."""

Tensors = dict[str, Tensor]


def is_converted(model: nn.Module) -> bool:
    """Whether transformers has tables for a model."""
    return any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__) and hasattr(model, "config")


def to_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors under the names of files -> under those of the model."""
    if not is_converted(model):
        return dict(tensors)
    loading = import_module("transformers.core_model_loading")
    plans: dict[str, Any] = {}
    for name, (target, pattern, converter) in _renamed(model, tensors).items():
        made = loading.WeightRenaming(name, target) if converter is None else deepcopy(converter)
        plans.setdefault(target, made).add_tensor(target, name, pattern or name, tensors[name])
    found: Tensors = {}
    for target, plan in plans.items():
        _check_exact(getattr(plan, "operations", ()), target)
        found |= plan.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


def names_in_model(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Names of tensors in files -> those of the weights of the model that they are, or are parts of."""
    if not is_converted(model):
        return {name: name for name in names}
    return {name: target for name, (target, _, _) in _renamed(model, names).items()}


def _renamed(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, str | None, Any]]:
    """Name in the files -> that in the model, and the pattern and the conversion of transformers, if there is one."""
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
    """Tensors under the names of the model -> under those of files."""
    if not is_converted(model):
        return dict(tensors)
    found: Tensors = import_module("transformers.core_model_loading").revert_weight_conversion(model, dict(tensors))
    return found


def unstacked(model: nn.Module, name: str, weight: QuantizedWeight) -> dict[str, QuantizedWeight]:
    """One quantized weight of the model -> those that files have in its place."""
    if is_converted(model):
        _check_exact(_operations_on(model, name), name)
    codes = to_files(model, {name: weight.codes})
    try:
        scales = to_files(model, {name: weight.scale})
    except Exception as error:  # transformers' own, of whatever kind, for halves of what cannot be halved
        raise _shared(
            name, weight.block, f"scales {list(weight.scale.shape)}", f"as many as for {sorted(codes)}"
        ) from error
    if codes.keys() != scales.keys():
        raise _shared(name, weight.block, sorted(scales), sorted(codes))
    return {
        file: QuantizedWeight(
            part, _checked(scales[file], part, weight.block, file), weight.block, weight.x_block, weight.x_scale
        )
        for file, part in codes.items()
    }


def stacked(
    model: nn.Module, weights: Iterable[str], codes: Callable[[str], Tensor], scales: Callable[[str], Tensor],
    block: tuple[int, int],
) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """Quantized weights of files, with one size of blocks -> codes and scales by the names that the model has."""
    names = [*weights]
    found = to_model(model, {name: codes(name) for name in names})
    scale = to_model(model, {name: scales(name) for name in names})
    return {name: (tensor, _checked(scale[name], tensor, block, name)) for name, tensor in found.items()}


def _checked(scale: Tensor, codes: Tensor, block: tuple[int, int], name: str) -> Tensor:
    need = scale_shape(codes.shape, block)
    if list(scale.shape) != need and not (block == (ALL, ALL) and scale.numel() == 1):
        raise _shared(name, block, f"scales {list(scale.shape)} for {list(codes.shape)}", need)
    return scale


def _shared(name: str, block: tuple[int, int], got: object, need: object) -> QCompilerError:
    problem = f"'{name}' cannot be put together or taken apart: its parts share blocks of {list(block)}"
    return QCompilerError(problem, got=got, need=need)


def _operations_on(model: nn.Module, name: str) -> Iterable[Any]:
    """What transformers does to a weight of the model when it is written."""
    loading = import_module("transformers.core_model_loading")
    table = getattr(model, "_weight_conversions", None)
    if table is None:
        mapping = import_module("transformers.conversion_mapping")
        table = mapping.get_model_conversion_mapping(model, add_legacy=False)
    back = [entry.reverse_transform() for entry in reversed(table) if isinstance(entry, loading.WeightConverter)]
    found: Iterable[Any] = next(
        (entry.operations for entry in back if entry.rename_source_key(name)[1] is not None), ()
    )
    return found


def _check_exact(operations: Iterable[Any], name: str) -> None:
    if wrong := [type(step).__name__ for step in operations if type(step).__name__ not in EXACT]:
        problem = f"transformers changes the order inside of '{name}', which codes and scales cannot follow"
        raise QCompilerError(problem, got=wrong[0], need=" or ".join(EXACT))
