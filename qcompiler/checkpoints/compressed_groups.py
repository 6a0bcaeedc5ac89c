"""Reads a compressed-tensors configuration: which weights are quantized, and their granularity.

    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "block", ...}, ...}}

A group targets modules by name, by `re:` and a regular expression, or by class. A folder has no classes, so a group
that targets a class covers every quantized weight that no other group names.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from qcompiler.checkpoints.cache_scales import is_cache_scale
from qcompiler.checkpoints.companions import stem, x_scale_beside, zero_points_beside
from qcompiler.checkpoints.config_keys import ANY, check_keys, nothing
from qcompiler.checkpoints.files import TensorFiles
from qcompiler.checkpoints.group_keys import FORMATS, check_group
from qcompiler.checkpoints.quantized_weight import StoredAs
from qcompiler.errors import QCompilerError, did_you_mean
from qcompiler.ir import ALL, DType, Format
from qcompiler.numerics import torch_dtype

WEIGHT, SCALE, OUTPUT_SCALE = "weight", "weight_scale", "output_scale"
CODES = {"float": DType.f8e4m3fn, "int": DType.i8}
STACKED = tuple(map(torch_dtype, CODES.values()))
LONGEST_MATCH = 1.0
"""Timeout in seconds: a pattern such as `(a+)+b` could run for years."""

BLOCKS = {"tensor": (ALL, ALL), "channel": (1, ALL)}


def _dense(value: Any) -> str | None:
    """Accepts a sparsity configuration that does not change weights."""
    fine = isinstance(value, dict) and value.get("format") in (None, "dense")
    return None if fine else "null, or the format 'dense'"


def _no_groups(value: Any) -> str | None:
    """Accepts a transform configuration without transforms."""
    return None if value == {"config_groups": {}} else "null: the weights must not be transformed"


KEYS = {
    "quant_method": ANY, "format": ANY, "config_groups": ANY,  # read below
    "sparsity_config": _dense, "transform_config": _no_groups, "moe_sparsity_config": nothing,
    "ignore": ANY, "kv_cache_scheme": ANY, "quantization_status": ANY, "global_compression_ratio": ANY, "version": ANY,
    "run_compressed": ANY, "dequantize": ANY, "use_optimized_inference": ANY,
}  # fmt: skip
"""Keys that compressed-tensors and transformers write. The tensors show which layers are ignored; KV caches stay in
float."""


@dataclass(frozen=True)
class Group:
    """A config group: its targets, and how its weights are stored.

    Attributes:
        name: The group's key in the configuration.
        targets: Module names, `re:` and a regular expression, or classes.
        format: The format of the weights.
        static: Whether activations have scales in the files.
        zero_points: Names of the zero points that each weight of an asymmetric group must have.
        outputs: Whether the group also quantizes the outputs of its modules.
    """

    name: str
    targets: tuple[str, ...]
    format: Format
    static: bool
    zero_points: tuple[str, ...]
    outputs: bool

    def names(self, module: str) -> bool:
        """Whether the group targets a module by name or by a regular expression."""
        return any(_matches(target, module) for target in self.targets)


def stored_weights(said: Mapping[str, Any], tensors: TensorFiles) -> dict[str, StoredAs]:
    """The quantized weights of a folder: each weight with a `weight_scale`.

    Args:
        said: The `quantization_config`.
        tensors: The tensors of the folder.

    Raises:
        QCompilerError: The configuration is malformed or not supported, or a scale has no weight.
    """
    check_keys(said, KEYS, "the quantization configuration")
    if (format := said.get("format")) not in FORMATS:
        raise QCompilerError("an unknown format", got=repr(format), fix=did_you_mean(str(format), FORMATS))
    groups = _groups(said)
    modules = {name.rpartition(".")[0] for name in tensors}
    found: dict[str, StoredAs] = {}
    for name in tensors:
        if (weight := _weight_of(name, tensors)) is None:
            continue
        group = _group_of(weight.rpartition(".")[0], groups, modules)
        codes = torch_dtype(group.format.element)
        if weight not in tensors or tensors.dtype(weight) is not codes:
            got = str(tensors.dtype(weight)).removeprefix("torch.") if weight in tensors else "nothing"
            need = f"{str(codes).removeprefix('torch.')} in '{weight}', as {group.name} says"
            raise QCompilerError(f"a scale has no matching weight: '{name}'", got=got, need=need)
        found[weight] = _stored_as(weight, name, group, tensors)
    return found


def notes(said: Mapping[str, Any]) -> list[str]:
    """Report notes about groups that do not quantize weights, and about outputs that other engines quantize."""
    groups = said.get("config_groups")
    named = groups.items() if isinstance(groups, dict) else ()
    found = [f"the group '{name}' quantizes no weights and is skipped" for name, group in named if _is_empty(group)]
    return found + [
        f"the group '{name}' also quantizes the outputs of its modules, which is not done here"
        for name, group in named
        if not _is_empty(group) and isinstance(group, dict) and group.get("output_activations")
    ]


def _weight_of(name: str, tensors: TensorFiles) -> str | None:
    """The weight that a scale belongs to, stacked experts included; None if the tensor is not a weight's scale."""
    if name.rpartition(".")[2] == SCALE:
        return name.removesuffix(SCALE) + WEIGHT
    for suffix in (f"_{SCALE}", "_scale"):
        stack = name.removesuffix(suffix)
        if stack != name and stack in tensors and len(tensors.shape(stack)) == 3 and tensors.dtype(stack) in STACKED:
            return stack
    return None


def _stored_as(weight: str, scale: str, group: Group, tensors: TensorFiles) -> StoredAs:
    zero_points = zero_points_beside(weight, tensors)
    for needed in group.zero_points:
        if stem(weight) + needed not in zero_points:
            problem = f"the group '{group.name}' is asymmetric, and '{weight}' has no '{needed}' beside it"
            raise QCompilerError(problem, need="zero points that are all zero, or symmetric codes")
    x_scale = x_scale_beside(weight, tensors) if group.static else None
    output = stem(weight) + OUTPUT_SCALE
    outputs = (output,) if group.outputs and output in tensors and not is_cache_scale(output) else ()
    return StoredAs(scale, group.format, x_scale, (*zero_points, *outputs))


def _is_empty(group: Any) -> bool:
    """Whether a group declares no weights: it quantizes only inputs or outputs."""
    return isinstance(group, dict) and "weights" in group and group["weights"] is None


def _groups(said: Mapping[str, Any]) -> list[Group]:
    groups = said.get("config_groups")
    if groups == {} and said.get("kv_cache_scheme"):
        return []  # only the cache is quantized
    if not isinstance(groups, dict) or not groups:
        raise QCompilerError("'config_groups' is not a JSON object with groups", got=repr(groups))
    for name, group in groups.items():
        if _is_empty(group):
            check_group(name, group)
    return [_group(name, group) for name, group in groups.items() if not _is_empty(group)]


def is_float(said: Mapping[str, Any]) -> bool:
    """Whether a valid configuration quantizes only the cache or activations, not weights."""
    groups: Mapping[str, Any] = said["config_groups"]
    return all(map(_is_empty, groups.values()))


def _group(name: str, said: Any) -> Group:
    weights = said.get("weights") if isinstance(said, dict) else None
    targets = said.get("targets") if isinstance(said, dict) else None
    if not isinstance(weights, dict) or not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise QCompilerError(f"the group '{name}' is malformed", need="'targets', a list, and 'weights', an object")
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    if bits != 8 or not isinstance(kind, str) or kind not in CODES:
        raise QCompilerError(
            f"the group '{name}' has unsupported weights",
            got=f"{kind!r} of {bits!r} bits",
            need="'float' or 'int' of 8 bits",
        )
    if weights.get("dynamic", False) is not False:
        raise QCompilerError(f"the weights of group '{name}' have dynamic scales", need="'dynamic': false")
    static, block = _is_static(name, said, kind), _block(name, weights)
    check_group(name, said)
    kinds = {"weight": weights, **({"input": said["input_activations"]} if static else {})}
    zero_points = (f"{key}_zero_point" for key, each in kinds.items() if each.get("symmetric", True) is not True)
    outputs = bool(said.get("output_activations"))
    return Group(name, tuple(targets), Format(CODES[kind], block), static, tuple(zero_points), outputs)


def _is_static(name: str, group: Mapping[str, Any], kind: str) -> bool:
    """Whether each activation of a group has a static scale in the files.

    Raises:
        QCompilerError: The kernels do not support the granularity or format of the static scales.
    """
    activations = group.get("input_activations")
    if not isinstance(activations, dict) or activations.get("dynamic", False) is True:
        return False
    dynamic, strategy = activations.get("dynamic", False), activations.get("strategy", "tensor")
    if dynamic is not False or strategy not in ("tensor", None):
        got = f"dynamic {dynamic!r} with strategy {strategy!r}"
        need = "'dynamic': true, or one static scale: 'strategy': \"tensor\""
        raise QCompilerError(f"the activations of group '{name}' have unsupported scales", got=got, need=need)
    if (activations.get("type", kind), activations.get("num_bits", 8)) != (kind, 8):
        got = f"{activations.get('type')!r} of {activations.get('num_bits')!r} bits"
        raise QCompilerError(
            f"the activations of group '{name}' do not have the format of its weights",
            got=got,
            need=f"{kind!r} of 8 bits",
        )
    return True


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
    """The group of one module. A target that is the name of a module, such as `lm_head`, is not a class."""
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
        raise QCompilerError(
            "a target takes too long to match a name",
            got=f"{target!r} and {module!r}",
            need=f"{LONGEST_MATCH} s or less",
        ) from error
    except (regex.error, ValueError, OverflowError, RecursionError) as error:
        raise QCompilerError("a target is not a regular expression", got=f"{target!r}: {error}") from error
