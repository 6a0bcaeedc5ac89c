"""Reads the configuration of a compressed-tensors checkpoint: which weights are quantized, and how finely.

    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "block", ...}, ...}}

A group is for modules by name, by `re:` and a regular expression, or by class. A folder does not know classes, so a
group that names one is for every quantized weight that no other group names.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from qcompiler.checkpoints.config_keys import ANY, check_keys, nothing, one_of
from qcompiler.checkpoints.files import TensorFiles
from qcompiler.checkpoints.quantized_weight import StoredAs
from qcompiler.errors import QCompilerError, did_you_mean
from qcompiler.numerics import ALL

FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "mixed-precision")
WEIGHT, SCALE = "weight", "weight_scale"
CODES = {"float": torch.float8_e4m3fn, "int": torch.int8}
LONGEST_MATCH = 1.0
"""Seconds: a pattern such as `(a+)+b` could take years."""

BLOCKS = {"tensor": (ALL, ALL), "channel": (1, ALL)}


def _dense(value: Any) -> str | None:
    """A sparsity configuration that changes no weight."""
    fine = isinstance(value, dict) and value.get("format") in (None, "dense")
    return None if fine else "null, or the format 'dense'"


def _no_groups(value: Any) -> str | None:
    """A transform configuration without transforms."""
    return None if value == {"config_groups": {}} else "null: the weights must not be transformed"


KEYS = {
    "quant_method": ANY, "format": ANY, "config_groups": ANY,  # read below
    "sparsity_config": _dense, "transform_config": _no_groups, "moe_sparsity_config": nothing,
    "ignore": ANY, "kv_cache_scheme": ANY, "quantization_status": ANY, "global_compression_ratio": ANY, "version": ANY,
    "run_compressed": ANY, "dequantize": ANY, "use_optimized_inference": ANY,
}  # fmt: skip
"""Which keys compressed-tensors and transformers write. The tensors tell what is ignored; caches stay in float."""

GROUP_KEYS = {
    "targets": ANY, "weights": ANY, "input_activations": ANY, "output_activations": nothing, "format": one_of(*FORMATS),
}  # fmt: skip

NUMBERS = {"num_bits": ANY, "type": ANY, "strategy": ANY, "dynamic": ANY, "block_structure": ANY, "symmetric": ANY,
           "scale_dtype": ANY, "zp_dtype": ANY, "observer": ANY, "observer_kwargs": ANY}  # fmt: skip
WEIGHT_KEYS = {**NUMBERS, "group_size": one_of(-1), "actorder": one_of(False, "weight", "static")}
"""A `group_size` of -1 is the channel; these orders of GPTQ leave the columns where they are."""

ACTIVATION_KEYS = {**NUMBERS, "group_size": ANY, "num_bits": one_of(8), "symmetric": one_of(True),
                   "actorder": one_of(False)}  # fmt: skip
"""The scheme that compiles the model chooses the granularity of activations, which have no zero points here."""


@dataclass(frozen=True)
class Group:
    """One group: what it is for, and how its weights are stored."""

    name: str
    targets: tuple[str, ...]
    codes: torch.dtype
    block: tuple[int, int]

    def names(self, module: str) -> bool:
        """Whether it is for a module by name or by a regular expression."""
        return any(_matches(target, module) for target in self.targets)


def stored_weights(said: Mapping[str, Any], tensors: TensorFiles) -> dict[str, StoredAs]:
    """The quantized weights of a folder: each weight with a `weight_scale` beside it.

    Args:
        said: The `quantization_config`.
        tensors: Those of the folder.

    Raises:
        QCompilerError: The configuration is malformed or asks for what is not supported, or a scale has no weight.
    """
    check_keys(said, KEYS, "the quantization configuration")
    if (format := said.get("format")) not in FORMATS:
        raise QCompilerError("an unknown format", got=repr(format), fix=did_you_mean(str(format), FORMATS))
    groups = _groups(said.get("config_groups"))
    modules = {name.rpartition(".")[0] for name in tensors}
    found: dict[str, StoredAs] = {}
    for name in tensors:
        if name.rpartition(".")[2] != SCALE:
            continue
        weight = name.removesuffix(SCALE) + WEIGHT
        group = _group_of(weight.rpartition(".")[0], groups, modules)
        if weight not in tensors or tensors.dtype(weight) is not group.codes:
            got = str(tensors.dtype(weight)).removeprefix("torch.") if weight in tensors else "nothing"
            need = f"{str(group.codes).removeprefix('torch.')} in '{weight}', as {group.name} says"
            raise QCompilerError(f"a scale belongs to no such weight: '{name}'", got=got, need=need)
        found[weight] = StoredAs(name, group.block)
    return found


def _groups(said: Any) -> list[Group]:
    if not isinstance(said, dict) or not said:
        raise QCompilerError("'config_groups' is no JSON object with groups", got=repr(said))
    return [_group(name, group) for name, group in said.items()]


def _group(name: str, said: Any) -> Group:
    weights = said.get("weights") if isinstance(said, dict) else None
    targets = said.get("targets") if isinstance(said, dict) else None
    if not isinstance(weights, dict) or not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise QCompilerError(f"the group '{name}' is malformed", need="'targets', a list, and 'weights', an object")
    check_keys(said, GROUP_KEYS, f"the group '{name}'")
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    if bits != 8 or not isinstance(kind, str) or kind not in CODES:
        raise QCompilerError(f"the group '{name}' has weights of another kind", got=f"{kind!r} of {bits!r} bits",
                             need="'float' or 'int' of 8 bits")  # fmt: skip
    if weights.get("symmetric", True) is not True or weights.get("dynamic", False) is not False:
        raise QCompilerError(f"the weights of group '{name}' have zero points, or scales of each call")
    block = _block(name, weights)
    check_keys(weights, WEIGHT_KEYS, f"the weights of group '{name}'")
    activations = said.get("input_activations")
    if isinstance(activations, dict) and activations.get("dynamic") is not True:
        fix = "Scales of activations are computed in each call here; a checkpoint's own are not read."
        raise QCompilerError(f"the activations of group '{name}' have fixed scales", need="dynamic", fix=fix)
    if isinstance(activations, dict):
        check_keys(activations, ACTIVATION_KEYS, f"the activations of group '{name}'")
    return Group(name, tuple(targets), CODES[kind], block)


def _block(name: str, weights: Mapping[str, Any]) -> tuple[int, int]:
    strategy, sizes = weights.get("strategy"), weights.get("block_structure")
    if strategy == "block":
        if isinstance(sizes, str):  # older files have "128x128"
            sizes = [int(size) for size in sizes.split("x") if size.isdecimal() and len(size) < 9]
        if isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes):
            return sizes[0], sizes[1]
        raise QCompilerError(
            f"'block_structure' of group '{name}' is malformed", got=sizes, need="two positive numbers"
        )
    if not isinstance(strategy, str) or strategy not in BLOCKS:
        got, need = repr(strategy), "block, channel or tensor"
        raise QCompilerError(f"the weights of group '{name}' have an unknown strategy", got=got, need=need)
    return BLOCKS[strategy]


def _group_of(module: str, groups: list[Group], modules: Collection[str]) -> Group:
    """The group of one module; what is the name of another one, such as `lm_head`, is no class."""
    found = [group for group in groups if group.names(module)] or [
        group
        for group in groups
        if any("." not in t and not t.startswith("re:") and t not in modules for t in group.targets)
    ]
    if len(found) != 1:
        got = ", ".join(group.name for group in found) or "none"
        raise QCompilerError(f"it is not clear which group '{module}' belongs to", got=got, need="one group")
    return found[0]


def _matches(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        regex = import_module("regex")  # unlike Python's own, it can be told to stop
    except ImportError as error:
        fix = "Install it: pip install 'qcompiler[hf]'."
        raise QCompilerError("a target is a regular expression, and 'regex' is missing", got=target, fix=fix) from error
    try:
        return regex.match(target.removeprefix("re:"), module, timeout=LONGEST_MATCH) is not None
    except TimeoutError as error:
        raise QCompilerError("a target takes too long to match a name", got=f"{target!r} and {module!r}",
                             need=f"{LONGEST_MATCH} s or less") from error  # fmt: skip
    except (regex.error, ValueError, OverflowError, RecursionError) as error:
        raise QCompilerError("a target is no regular expression", got=f"{target!r}: {error}") from error
