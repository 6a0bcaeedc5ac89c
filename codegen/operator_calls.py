"""The call of the torch operator that runs an operation of a graph.

    kernel.quantize(%x) {format = #fp8_tile}    ->    quantize(%x, (1, 128), f8e4m3fn, "deepseek", "row_major")

A schema has the operands of the operation in order, then its attributes by name; a format's are `block`, `dtype`,
`profile` and `scale_layout`.
"""

import torch

import codegen.torch_ops  # noqa: F401  (registers the operators whose schemas are read)
from codegen.operators.operator import OPERATOR_NAMES
from qcompiler.ir import Argument, CacheType, Format, Op, Value
from qcompiler.ir.op_table import lookup


def operator_of(op: Op) -> torch._ops.OpOverload | None:
    """The operator that runs an operation, if there is one; other libraries may define it, too."""
    dialect, name = op.name.split(".", 1)
    known = OPERATOR_NAMES.get(op.name) or (name if dialect == "kernel" else "")
    operator = getattr(torch.ops.qcompiler, known, None) if known else None
    return None if operator is None else operator.default


def operator_arguments(op: Op, schema: torch._C.FunctionSchema) -> list[Argument]:
    """The arguments for the operator that runs an operation, in the order of its schema, without omitted ones."""
    remaining, attrs, args = [*op.args], _attributes(op), list[Argument]()
    definition = lookup(op.name)
    operands = definition.named if definition is not None else ()  # tensors, but also numbers of the host
    for parameter in schema.arguments:
        kind = str(parameter.type)
        if kind == "List[Tensor]" and not (remaining and _is_cache(remaining[0])):
            args.append(tuple(remaining))
        elif "Tensor" in kind or parameter.name in operands:
            args.append(remaining.pop(0) if remaining else None)
        else:
            args.append(attrs.get(parameter.name))
    optional = sum(parameter.has_default_value() for parameter in schema.arguments)
    while optional and args[-1] is None:
        args.pop()
        optional -= 1
    return args


def _attributes(op: Op) -> dict[str, Argument]:
    """The attributes of an operation as its operator takes them: block, dtype, profile and layout of each format."""
    found = dict(op.attrs)
    for name, value in op.attrs.items():
        if isinstance(value, Format):
            prefix = name.removesuffix("format")
            found |= {f"{prefix}block": value.block, f"{prefix}dtype": value.element}
            found |= {f"{prefix}profile": value.profile, f"{prefix}scale_layout": value.scale_layout}
    return found


def _is_cache(arg: Argument) -> bool:
    """Whether an argument is a cache, which an operator takes as a list of tensors."""
    return isinstance(arg, Value) and isinstance(arg.type, CacheType)
