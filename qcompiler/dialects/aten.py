"""The `aten` dialect, and every other namespace of torch: names, dtypes and literals, to torch and back.

Operations here are not declared one by one: every functional overload that torch knows is legal, its meaning is torch's
own, and its types are what capture recorded. `aten.linear` is the default overload, `aten.add.Tensor` a named one.
"""

from functools import cache
from typing import Any

import torch

from qcompiler.errors import QCompilerError
from qcompiler.ir.op import Argument, Tag
from qcompiler.ir.op_table import OpenNamespaces, declare_open_namespaces
from qcompiler.ir.types import DType

TORCH_DTYPES: dict[DType, torch.dtype] = {
    DType.f64: torch.float64, DType.f32: torch.float32, DType.f16: torch.float16, DType.bf16: torch.bfloat16,
    DType.f8e4m3fn: torch.float8_e4m3fn, DType.f8e5m2: torch.float8_e5m2, DType.f8e8m0fnu: torch.float8_e8m0fnu,
    DType.c64: torch.complex64, DType.c128: torch.complex128,
    DType.i64: torch.int64, DType.i32: torch.int32, DType.i16: torch.int16, DType.i8: torch.int8,
    DType.u64: torch.uint64, DType.u32: torch.uint32, DType.u16: torch.uint16, DType.u8: torch.uint8,
    DType.b8: torch.bool,
}  # fmt: skip
IR_DTYPES = {dtype: ours for ours, dtype in TORCH_DTYPES.items()}

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


def torch_dtype(dtype: DType) -> torch.dtype:
    """Torch's name for an element type."""
    return TORCH_DTYPES[dtype]


def ir_dtype(dtype: torch.dtype) -> DType:
    """Our name for torch's element type; QCompilerError when the IR has none."""
    if dtype not in IR_DTYPES:
        raise QCompilerError("the graph IR has no such element type", got=dtype, need=", ".join(map(str, DType)))
    return IR_DTYPES[dtype]


def to_torch(literal: Argument) -> Any:
    """A literal as torch takes it: dtypes and tags become torch's objects."""
    if isinstance(literal, DType):
        return TORCH_DTYPES[literal]
    return TAGS[literal.name] if isinstance(literal, Tag) else literal


def op_name(overload: torch._ops.OpOverload) -> str:
    """`aten.add.Tensor` for torch's overload; the default overload goes without a name."""
    return str(overload.name()).replace("::", ".").removesuffix(".default")


@cache
def overload_of(name: str) -> torch._ops.OpOverload:
    """Torch's overload for `aten.add.Tensor`, to be called; KeyError when torch knows none."""
    name = RUN_AS.get(name, name)
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


def _knows(name: str) -> bool:
    try:
        overload_of(name)
    except (KeyError, IndexError, ValueError):
        return False
    return True


@cache
def _names() -> tuple[str, ...]:
    schemas = (schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::"))
    names = {f"{schema.name.replace('::', '.')}.{schema.overload_name}".rstrip(".") for schema in schemas}
    return tuple(name for name in names if not name.startswith("aten._") and not name.endswith("out"))


@cache
def _is_function(name: str) -> bool:
    return not _has_effect(name) and "empty" not in name.split(".")[1]  # what is empty holds anything


@cache
def _has_effect(name: str) -> bool:
    schema = overload_of(name)._schema
    return schema.is_mutable or not schema.returns or torch.Tag.nondeterministic_seeded in overload_of(name).tags


declare_open_namespaces(OpenNamespaces(_knows, _names, _is_function, _has_effect))
