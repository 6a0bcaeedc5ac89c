"""The `aten` dialect and all other torch namespaces: converts names, dtypes, and literals.

Operations are not declared individually: every functional torch overload is allowed, runs as in torch, and has the
types that capture recorded. `aten.linear` is a default overload, `aten.add.Tensor` a named one.
"""

from functools import cache
from typing import Any

import torch

from qcompiler.ir import Argument, Effects, Role, Tag
from qcompiler.ir.op_table import OpenNamespaces, declare_open_namespaces
from qcompiler.ir.traits import Traits
from qcompiler.ir.types import DType
from qcompiler.numerics.dtypes import TORCH_DTYPES

TAGS: dict[str, Any] = {
    str(tag).removeprefix("torch."): tag
    for tag in (
        torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d,
        torch.strided, torch.sparse_coo, torch.jagged,
    )
}  # fmt: skip
"""Memory formats and layouts, which are tags in the IR."""


RUN_AS = {"aten.view": "aten.reshape"}
"""Operation -> the operation to run instead. Tracing turns a reshape into a view based on the example strides; other
strides may need a copy."""


MATMULS = {
    "aten.linear": 0, "aten.mm": 0, "aten.matmul": 0, "aten.bmm": 0, "aten.inner": 0, "aten.mv": 0, "aten.dot": 0,
    "aten._grouped_mm": 0, "transformers.grouped_mm_fallback": 0, "aten.addmm": 1, "aten.baddbmm": 1, "aten.addmv": 1,
    "aten.einsum": None,
}  # fmt: skip
"""Captured matmul -> index of the first of its two matrix operands."""

GROUPED = ("aten._grouped_mm", "transformers.grouped_mm_fallback")
"""Grouped matmuls: each group of rows has its own matrix; offsets define the groups."""

ROLES = {"aten._to_copy": Role.CAST, "aten.to.dtype": Role.CAST, "aten._unsafe_view": Role.VIEW}
"""Roles that cannot be derived from a schema."""

COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "symm_mem", "_dtensor")
"""Namespaces of operations that communicate with other processes."""


def to_torch(literal: Argument) -> Any:
    """Converts a literal for torch: dtypes and tags become torch objects."""
    if isinstance(literal, DType):
        return TORCH_DTYPES[literal]
    return TAGS[literal.name] if isinstance(literal, Tag) else literal


def op_name(overload: torch._ops.OpOverload) -> str:
    """The IR name of a torch overload, such as `aten.add.Tensor`; the default overload has no suffix."""
    return str(overload.name()).replace("::", ".").removesuffix(".default")


def overload_of(name: str) -> torch._ops.OpOverload:
    """The torch overload to call for `aten.add.Tensor`; raises KeyError if torch has none."""
    return _overload(RUN_AS.get(name, name))


@cache
def _overload(name: str) -> torch._ops.OpOverload:
    namespace, op, overload = (*name.split(".", 2), "default")[:3]
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), op), overload)
    except AttributeError:
        raise KeyError(name) from None
    if not isinstance(found, torch._ops.OpOverload):
        raise KeyError(name)
    return found


@cache
def is_view(name: str) -> bool:
    """Whether a torch operation may return the memory of an argument."""
    # In evaluation mode dropout returns its input; the schemas of these three do not declare the alias.
    if name.startswith(("aten.dropout", "aten._unsafe_view", "prims.")):
        return True
    return any(result.alias_info is not None for result in overload_of(name)._schema.returns)


@cache
def is_pointwise(name: str) -> bool:
    """Whether torch says that each element of the result depends only on the operands' elements at the same place."""
    try:
        return torch.Tag.pointwise in _overload(name).tags
    except (KeyError, IndexError, ValueError):
        return False


@cache
def _names() -> tuple[str, ...]:
    schemas = (schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::"))
    names = {f"{schema.name.replace('::', '.')}.{schema.overload_name}".rstrip(".") for schema in schemas}
    return tuple(name for name in names if not name.startswith("aten._") and not name.endswith("out"))


def _traits(name: str) -> Traits | None:
    if name.endswith(".default"):  # not the name of an operation: see `op_name`
        return None
    try:
        schema = _overload(name)._schema
    except (KeyError, IndexError, ValueError):
        return None
    names = [arg.name for arg in schema.arguments]
    positions = {arg.name: index for index, arg in enumerate(schema.arguments) if not arg.kwarg_only}
    defaults = {arg.name: _literal(arg.default_value) for arg in schema.arguments}
    effects = _effects(name)
    if name in MATMULS:
        first = MATMULS[name]
        aliases = {} if first is None else {"x": names[first], "w": names[first + 1]}
        return Traits(positions, defaults, aliases, role=Role.MATMUL, effects=effects)
    role = ROLES.get(name) or (Role.VIEW if effects is Effects.PURE and _is_alias(schema) else None)
    return Traits(positions, defaults, {"x": names[0]} if role else {}, role=role, effects=effects)


def _is_alias(schema: torch._C.FunctionSchema) -> bool:
    """Whether every result may alias the first argument, which is a tensor."""
    tensors = bool(schema.returns) and isinstance(schema.arguments[0].type, torch.TensorType)
    return tensors and all(result.alias_info is not None for result in schema.returns)


def _literal(default: Any) -> Any:
    return tuple(default) if isinstance(default, list) else default


def _effects(name: str) -> Effects:
    overload = _overload(name)
    effects = Effects.PURE
    if name.split(".")[0] in COLLECTIVES:
        effects |= Effects.COMMUNICATES
    if overload._schema.is_mutable:
        effects |= Effects.WRITES
    elif not overload._schema.returns:
        effects |= Effects.CONTROLS  # such an operation only raises errors
    if torch.Tag.nondeterministic_seeded in overload.tags:
        effects |= Effects.RANDOM
    if "empty" in name.split(".")[1]:
        effects |= Effects.UNDEFINED
    return effects


declare_open_namespaces(OpenNamespaces(_traits, _names))
