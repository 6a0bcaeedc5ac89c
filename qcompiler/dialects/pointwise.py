"""The operation `kernel.pointwise`: results that are fused expressions of operands at indices of their own.

    %q, %k = kernel.pointwise(%qkv, %cos) {expressions = ["bf16(x0[i0, i2, 64*i1 + i3] * x1[i0, i3])", …],
                                           shapes = ["x0.0, 4, x0.1, 64", …]}

One expression and one shape for each result. A size is a number, or an axis of an operand, or a part of one: `x0.1` is
axis 1 of x0, and `x0.1/2` is half of it, rounded down.
Integer operands are parts of indices only, and operands may be named by shapes only. Results are contiguous. The
operation replaces arithmetic, casts, concatenations and views; see the pass fuse-pointwise.
"""

import re
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcompiler.dialects.expression_nodes import IndexNumber, Load, Where, elements
from qcompiler.dialects.fused_expression import FusedExpression, parse
from qcompiler.errors import ParseError
from qcompiler.ir import Argument, DType, Op, Size, TensorType, Type, Value
from qcompiler.ir.op_table import AttributeCheck, OpDef, OpError, declare
from qcompiler.ir.sizes import Expr, floordiv
from qcompiler.numerics.dtypes import ir_dtype

TEXTS: tuple[AttributeCheck, str] = (
    lambda a: isinstance(a, tuple) and bool(a) and all(isinstance(text, str) for text in a),
    "a list of strings",
)

INTEGERS = (DType.i32, DType.i64)
"""Element types of operands that are parts of indices."""

CODES = (DType.f8e4m3fn, DType.f8e5m2)
"""Element types of codes, which are numbers to be multiplied by scales."""


class AxisPart(NamedTuple):
    """A size of a result: the size of an axis of an operand, divided by a number."""

    operand: int
    axis: int
    by: int = 1


AxisSize = int | AxisPart
"""A size of a result: a number, or an axis of an operand."""

AXIS = re.compile(r"x(0|[1-9][0-9]*)\.([0-9]+)(?:/([1-9][0-9]*))?", re.ASCII)


def read_shape(text: str) -> tuple[AxisSize, ...]:
    """The sizes in a text such as "x0.0, 4, x0.1, 64"; raises OpError if it is malformed."""
    sizes: list[AxisSize] = []
    for part in filter(None, map(str.strip, text.split(","))):
        if part.isdecimal() and part.isascii():
            sizes.append(int(part))
        elif found := AXIS.fullmatch(part):
            sizes.append(AxisPart(*(int(each or 1) for each in found.groups())))
        else:
            raise OpError(f"'{part}' in the shape '{text}' is neither a number nor an axis such as x0.1")
    return tuple(sizes)


def pointwise_types(op: Op) -> tuple[Type, ...]:
    """(operands float[...] or int[...]) -> float[shape] for each expression, in the dtype that it is rounded to"""
    return results_of(op, op.args)


def results_of(op: Op, operands: Sequence[Argument]) -> tuple[TensorType, ...]:
    """The types of the results of the attributes `expressions` and `shapes`; raises OpError if they do not fit."""
    kinds = [_operand_type(arg, place) for place, arg in enumerate(operands)]
    expressions, shapes = texts_of(op, "expressions"), texts_of(op, "shapes")
    if len(expressions) != len(shapes):
        raise OpError(f"it has {len(expressions)} expressions, but {len(shapes)} shapes")
    made = [_parsed(text) for text in expressions]
    sizes = [read_shape(shape) for shape in shapes]
    _check_operands(made, sizes, kinds)
    return tuple(_result(each, shape, kinds) for each, shape in zip(made, sizes, strict=True))


def _check_operands(
    made: Sequence[FusedExpression], sizes: Sequence[Sequence[AxisSize]], kinds: Sequence[TensorType]
) -> None:
    """Raises OpError unless each operand is used, and integers are read only as parts of indices."""
    loaded = {load.name for each in made for load in each.loads}
    counted = {element.function for each in made for element in each.elements}
    named = {f"x{size.operand}" for shape in sizes for size in shape if not isinstance(size, int)}
    used = loaded | counted | named
    if used != {f"x{place}" for place in range(len(kinds))}:
        names = ", ".join(sorted(used)) or "no operands"
        raise OpError(f"its expressions and shapes name {names}, but it has {len(kinds)} operands")
    for place, kind in enumerate(kinds):
        wrong = counted if kind.dtype.is_float else loaded
        if f"x{place}" in wrong:
            how = f"x{place}[…]" if kind.dtype.is_float else f"an index such as x{place}(i0)"
            raise OpError(f"its elements are {kind.dtype}, so an expression reads them as {how}", place)


def texts_of(op: Op, name: str) -> tuple[str, ...]:
    """An attribute that is a list of strings, which must be checked already."""
    return op.attrs[name]  # type: ignore[return-value]  # checked by the declaration


def _operand_type(arg: Argument, place: int) -> TensorType:
    kind = arg.type if isinstance(arg, Value) else None
    if isinstance(kind, TensorType):
        dtype = kind.dtype
        if dtype in (*INTEGERS, *CODES) or (dtype.is_float and dtype.bits in (16, 32)):
            return kind
    raise OpError("an operand of an expression must be a tensor in bf16, f16, f32, FP8, i32, or i64", place)


def _parsed(text: str) -> FusedExpression:
    try:
        made = parse(text)
    except ParseError as error:
        raise OpError(str(error)) from None
    if made.operands:
        raise OpError(f"its expression reads {made.operands[0]} without an index")
    return made


def _result(made: FusedExpression, sizes: Sequence[AxisSize], kinds: Sequence[TensorType]) -> TensorType:
    shape = tuple(size if isinstance(size, int) else _axis(kinds, *size) for size in sizes)
    reads = {str(load): (load.name, load.index) for load in made.loads}
    reads |= {str(element): (element.function, element.args) for element in made.elements}
    for read, (name, index) in reads.items():
        rank = len(kinds[int(name[1:])].shape)
        if len(index) != rank:
            raise OpError(f"{read} has {len(index)} indices, but {name} has {rank} axes")
    if outside := sorted(index for index in made.indices if int(index[1:]) >= len(shape)):
        raise OpError(f"its expression has the index {outside[-1]}, but its result has {len(shape)} axes")
    if made.across and not shape:
        raise OpError("its expression reduces rows, but its result has no axes")
    return TensorType(ir_dtype(made.dtype()), shape)


def _axis(kinds: Sequence[TensorType], operand: int, axis: int, by: int) -> Size:
    if operand >= len(kinds) or axis >= len(kinds[operand].shape):
        raise OpError(f"its shape names axis {axis} of x{operand}, which does not exist")
    return floordiv(kinds[operand].shape[axis], by)


def pointwise(*operands: Tensor, expressions: Sequence[str], shapes: Sequence[str]) -> tuple[Tensor, ...]:
    """Torch definition of `kernel.pointwise`: gathers what each load reads, then computes."""
    return tuple(
        computed(parse(expression), shape_of(shape, operands), operands)
        for expression, shape in zip(expressions, shapes, strict=True)
    )


def shape_of(text: str, operands: Sequence[Tensor]) -> tuple[int, ...]:
    """The sizes of a result, given the operands."""
    sizes = read_shape(text)
    return tuple(n if isinstance(n, int) else operands[n.operand].shape[n.axis] // n.by for n in sizes)


def computed(made: FusedExpression, shape: tuple[int, ...], operands: Sequence[Tensor]) -> Tensor:
    """One result."""
    device, rank = operands[0].device, len(shape)
    if not prod(shape):
        return torch.empty(shape, dtype=made.dtype(), device=device)
    numbers = _Numbers(device)
    for axis, size in enumerate(shape):
        numbers.known[f"i{axis}"] = torch.arange(size, device=device).view(-1, *[1] * (rank - 1 - axis))
    for element in made.elements:
        numbers.known[element] = _read(operands[int(element.function[1:])], list(map(numbers.of, element.args)))
    values: dict[Any, Tensor] = {}
    for part in made.expressions():
        if isinstance(part, Load):
            values[part] = _loaded(operands[int(part.name[1:])], part, numbers)
        elif isinstance(part, IndexNumber):
            values[part] = numbers.of(part.size).float()
        elif isinstance(part, Where):
            values[part.condition] = numbers.of(part.condition.left) < numbers.of(part.condition.right)
    (result,) = made.evaluate(values, shape)
    return result


def _loaded(x: Tensor, load: Load, numbers: "_Numbers") -> Tensor:
    """The elements of a load in FP32; NaN where an index that depends on elements of integers is outside."""
    at = [numbers.of(size) for size in load.index]
    found = _read(x, at).float()
    for place, size, index in zip(at, x.shape, load.index, strict=True):
        if any(elements(index)):
            found = torch.where((place >= 0) & (place < size), found, torch.nan)
    return found


def _read(x: Tensor, at: Sequence[Tensor]) -> Tensor:
    """The elements at an index; where it is outside, any element."""
    if not x.numel():
        return x.new_zeros(())
    return x[tuple(each.clamp(0, size - 1) for each, size in zip(at, x.shape, strict=True))] if at else x


class _Numbers:
    """The values of index expressions, as tensors that broadcast to the result.

    Attributes:
        known: The values of indices, by name, and of elements of integer operands.
    """

    def __init__(self, device: torch.device) -> None:
        self.known: dict[Any, Tensor] = {}
        self._device = device

    def of(self, size: Size) -> Tensor:
        """The value of an index expression."""
        total = torch.zeros((), dtype=torch.int64, device=self._device)
        for atoms, factor in size.terms if isinstance(size, Expr) else (((), size),):
            term = torch.tensor(factor, device=self._device)
            for atom in atoms:
                term = term * (self.known[atom] if atom in self.known else self._rounded(atom))
            total = total + term
        return total

    def _rounded(self, atom: Any) -> Tensor:
        place, by = map(self.of, atom.args)
        return place // by if atom.function == "floordiv" else place % by


declare(
    OpDef(
        "kernel.pointwise",
        "Evaluates fused expressions whose operands have indices of their own, all in one kernel.",
        ("*",),
        {"expressions": TEXTS, "shapes": TEXTS},
        types=pointwise_types,
        meaning=pointwise,
    )
)
