"""What a call may leave out, or add, without meaning something else than the captured call.

A model is often captured with fewer arguments than it is called with, or with more: a mask of ones, `use_cache=False`,
labels. Which of these change nothing is found out at capture by running the model (`trials`), never guessed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompiler.errors import InputError
from qcompiler.ir.sizes import Size, evaluate

ANYTHING = "anything"
"""The value of a tensor whose entries the graph does not read."""

VALUES: Mapping[str, Callable[..., torch.Tensor]] = {
    "ones": torch.ones,
    "zeros": torch.zeros,
    "positions": lambda *shape, dtype, device: torch.arange(shape[-1], dtype=dtype, device=device).expand(shape),
    ANYTHING: lambda *shape, dtype, device: torch.zeros((), dtype=dtype, device=device).expand(shape),
}
"""Name -> the tensor of a shape that an argument stands for when it is left out."""

REMEDY = "Leave it out here, or compile with it among the example inputs."


@dataclass(frozen=True)
class OptionalTensor:
    """A tensor argument that means the same when it is left out as when it has a certain value.

    Attributes:
        name: The argument.
        value: The name of that value in `VALUES`.
        shape: Its sizes, over the graph's symbols.
        without: The paths of the outputs that the model does not return when the argument is left out, such as a loss.
    """

    name: str
    value: str
    shape: tuple[Size, ...]
    without: tuple[str, ...] = ()

    def make(self, sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The tensor that it stands for."""
        return VALUES[self.value](*(evaluate(size, sizes) for size in self.shape), dtype=dtype, device=device)

    def check(self, given: Any, sizes: Mapping[str, int]) -> None:
        """Raises InputError unless `given`, which the graph does not take, means the same as leaving it out.

        On a GPU this waits for the device. In a `torch.compile` with `fullgraph=True` it is an error of Dynamo.
        """
        problem = f"the argument {self.name!r} was not given at capture, where it stands for {self.value}"
        if not isinstance(given, torch.Tensor):
            raise InputError(problem, got=type(given).__name__, need="a tensor", fix=REMEDY)
        if given.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InputError(problem, got="a tensor that nothing can look at in a CUDA graph", fix=REMEDY)
        shape = tuple(evaluate(size, sizes) for size in self.shape)
        if tuple(given.shape) != shape:
            raise InputError(problem, got=f"shape {tuple(given.shape)}", need=f"shape {shape}", fix=REMEDY)
        if not bool((given == self.make(sizes, torch.int64, given.device)).all()):
            raise InputError(problem, got="other entries", fix=REMEDY)


@dataclass(frozen=True)
class Leeway:
    """What a call may leave out, or add.

    Attributes:
        implied: Arguments that are no tensors -> the value that the model takes when they are None or left out.
        optional: Tensor arguments that may be left out; those that were not captured may be given with that value.
        ignored: Inputs of which the graph reads the sizes at most: any tensor will do.
        widened: Integer inputs that a narrower integer dtype may be given for.
    """

    implied: Mapping[str, Any] = field(default_factory=dict)
    optional: tuple[OptionalTensor, ...] = ()
    ignored: tuple[str, ...] = ()
    widened: tuple[str, ...] = ()

    def find(self, name: str) -> OptionalTensor | None:
        """The optional tensor of that name."""
        return next((optional for optional in self.optional if optional.name == name), None)

    def same_constant(self, name: str, left: Any, right: Any) -> bool:
        """Whether two values of an argument mean the same: they are equal, or None stands for the other one."""
        left, right = (self.implied.get(name) if value is None else value for value in (left, right))
        return type(left) is type(right) and bool(left == right)

    def may_add(self, name: str, value: Any, default: Any) -> bool:
        """Whether an argument that was not captured means the same as none, by its value alone."""
        if value is default or (type(value) is type(default) and type(value) in PLAIN and value == default):
            return True
        if name in self.implied:
            return self.same_constant(name, value, None)
        return value is None and self.find(name) is not None


PLAIN = (bool, int, float, str)


def without_outputs(spec: pytree.TreeSpec, paths: Sequence[str], dropped: frozenset[str]) -> pytree.TreeSpec:
    """The structure of a result without some of its entries.

    Args:
        spec: The whole structure.
        paths: The path of each leaf of `spec`.
        dropped: The paths to leave out: all leaves of some entries of the outermost container.
    """
    kept, start = [], 0
    for index, child in enumerate(spec.children()):
        if not set(paths[start : start + child.num_leaves]) <= dropped or not child.num_leaves:
            kept.append(index)
        start += child.num_leaves
    keyed = isinstance(spec.context, list) and len(spec.context) == spec.num_children
    context = [spec.context[index] for index in kept] if keyed else spec.context
    return pytree.TreeSpec(spec.type, context, [spec.children()[index] for index in kept])
