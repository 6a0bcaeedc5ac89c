"""The `core` dialect: what every graph is made of, and arithmetic on sizes."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from qcompiler.ir.op_table import TEXT, OpDef, declare

declare(OpDef("core.input", "An argument of the function.", effect=True))
declare(OpDef("core.return", "The end of the function: its operands are the outputs.", ("*",), effect=True))
declare(OpDef("core.param", "A weight that never changes.", attributes={"name": TEXT}, optional={"role": TEXT}))
declare(OpDef("core.buffer", "The state that a buffer has when the call begins.", attributes={"name": TEXT}))
declare(
    OpDef(
        "core.update",
        "Writes a new value to a buffer or an input when the call ends.",
        ("target", "value"),
        types=lambda _: (),
        effect=True,
    )
)

SCALAR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv,
    "floordiv": operator.floordiv, "mod": operator.mod, "pow": operator.pow, "neg": operator.neg,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "and_": operator.and_, "or_": operator.or_, "not_": operator.not_, "getitem": operator.getitem,
    "sym_max": torch.sym_max, "sym_min": torch.sym_min, "sym_float": torch.sym_float, "sym_int": torch.sym_int,
    "sym_not": torch.sym_not, "sym_ite": torch.sym_ite, "sym_sum": torch.sym_sum, "floor": math.floor,
    "ceil": math.ceil, "trunc": math.trunc, "round": round,
}  # fmt: skip
"""Python's arithmetic on sizes outside of tensors, as capture meets it; `core.<name>` each."""

for _name, _function in SCALAR_FUNCTIONS.items():
    declare(OpDef(f"core.{_name}", f"Python's `{_name}` on numbers outside of tensors.", ("*",), meaning=_function))
