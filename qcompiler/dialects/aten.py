"""The `aten` dialect, and every other namespace of torch: names, dtypes and literals, to torch and back.

Operations here are not declared one by one: every functional overload that torch knows is legal, its meaning is torch's
own, and its types are what capture recorded. `aten.linear` is the default overload, `aten.add.Tensor` a named one.
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
"""Memory formats and layouts: literals that are only names."""


RUN_AS = {"aten.view": "aten.reshape"}
"""What is called in place of an operation. A trace turns reshapes into views by the strides that it saw; a call may
have others, for which the same values need a copy."""


MATMULS = {
    "aten.linear": 0, "aten.mm": 0, "aten.matmul": 0, "aten.bmm": 0, "aten.inner": 0, "aten.mv": 0, "aten.dot": 0,
    "aten._grouped_mm": 0, "transformers.grouped_mm_fallback": 0, "aten.addmm": 1, "aten.baddbmm": 1, "aten.addmv": 1,
    "aten.einsum": None,
}  # fmt: skip
"""Matmuls, as capture may spell them -> the place of the first of the two operands that are multiplied."""

GROUPED = ("aten._grouped_mm", "transformers.grouped_mm_fallback")
"""Matmuls of groups of rows, each with a matrix of its own; offsets give the groups."""

ROLES = {"aten._to_copy": Role.CAST, "aten.to.dtype": Role.CAST, "aten._unsafe_view": Role.VIEW}
"""Roles that do not follow from a schema."""

COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "symm_mem", "_dtensor")
"""Namespaces whose operations exchange data with other processes."""


def to_torch(literal: Argument) -> Any:
    """A literal as torch takes it: dtypes and tags become torch's objects."""
    if isinstance(literal, DType):
        return TORCH_DTYPES[literal]
    return TAGS[literal.name] if isinstance(literal, Tag) else literal


def op_name(overload: torch._ops.OpOverload) -> str:
    """`aten.add.Tensor` for torch's overload; the default overload goes without a name."""
    return str(overload.name()).replace("::", ".").removesuffix(".default")


def overload_of(name: str) -> torch._ops.OpOverload:
    """Torch's overload for `aten.add.Tensor`, to be called; KeyError when torch knows none."""
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
    """Whether an operation of torch's may return the memory of an argument."""
    # In evaluation dropout gives back what it got; its schema, and those of the other two, do not say so.
    if name.startswith(("aten.dropout", "aten._unsafe_view", "prims.")):
        return True
    return any(result.alias_info is not None for result in overload_of(name)._schema.returns)


@cache
def _names() -> tuple[str, ...]:
    schemas = (schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::"))
    names = {f"{schema.name.replace('::', '.')}.{schema.overload_name}".rstrip(".") for schema in schemas}
    return tuple(name for name in names if not name.startswith("aten._") and not name.endswith("out"))


def _traits(name: str) -> Traits | None:
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
    """Whether every result may share the memory of the first argument, which is a tensor."""
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
        effects |= Effects.CONTROLS  # it is there to raise an error
    if torch.Tag.nondeterministic_seeded in overload.tags:
        effects |= Effects.RANDOM
    if "empty" in name.split(".")[1]:
        effects |= Effects.UNDEFINED
    return effects


declare_open_namespaces(OpenNamespaces(_traits, _names))
