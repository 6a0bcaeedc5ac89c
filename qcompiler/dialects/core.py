"""The `core` dialect: inputs, weights, updates, return, checks, and arithmetic on sizes."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses import FakeTensor

from qcompiler.errors import InputError
from qcompiler.ir import Effects, Role
from qcompiler.ir.op_table import TEXT, OpDef, declare


def expect(condition: Any, message: str) -> None:
    """Torch definition of `core.expect`.

    Args:
        condition: A bool, or a tensor with one element; a tensor on a GPU causes a synchronization.
        message: The error message if the condition is false.

    Raises:
        InputError: The condition is false.
    """
    if isinstance(condition, FakeTensor):
        torch._assert_async(condition, message)  # keeps the check in a trace of the compiled model
    elif not bool(condition):
        raise InputError(message, fix="Compile the model again with these inputs as the example.")


declare(OpDef("core.input", "An argument of the function.", effects=Effects.CONTROLS))
declare(
    OpDef("core.return", "The end of the function; its operands are the outputs.", ("*",), effects=Effects.CONTROLS)
)
declare(
    OpDef(
        "core.param",
        "A weight that does not change.",
        attributes={"name": TEXT},
        optional={"role": TEXT},
        role=Role.STATE,
    )
)
declare(
    OpDef(
        "core.buffer",
        "The value of a buffer at the start of the call.",
        attributes={"name": TEXT},
        role=Role.STATE,
        effects=Effects.READS,
    )
)
declare(
    OpDef(
        "core.update",
        "Writes a new value to a buffer or an input at the end of the call.",
        ("target", "value"),
        types=lambda _: (),
        role=Role.UPDATE,
        effects=Effects.WRITES,
    )
)
declare(
    OpDef(
        "core.expect",
        "Raises an error if a condition that held at capture is false.",
        ("condition",),
        {"message": TEXT},
        types=lambda _: (),
        meaning=expect,
        effects=Effects.CONTROLS,
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
"""Python arithmetic on sizes and other numbers that are not tensors; each is `core.<name>`."""

for _name, _function in SCALAR_FUNCTIONS.items():
    declare(OpDef(f"core.{_name}", f"Python's `{_name}` on numbers that are not tensors.", ("*",), meaning=_function))
