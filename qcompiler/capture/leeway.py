"""What a call may omit or add without changing the meaning of the captured call.

A model is often called with more or fewer arguments than at capture: a mask of ones, `use_cache=False`, labels. Capture
finds out which of these change nothing by running the model (`trials`); it never guesses.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompiler.errors import InputError
from qcompiler.ir.sizes import Size, evaluate

ANYTHING = "anything"
"""The value name for a tensor whose entries the graph does not read."""

VALUES: Mapping[str, Callable[..., torch.Tensor]] = {
    "ones": torch.ones,
    "zeros": torch.zeros,
    "positions": lambda *shape, dtype, device: torch.arange(shape[-1], dtype=dtype, device=device).expand(shape),
    ANYTHING: lambda *shape, dtype, device: torch.zeros((), dtype=dtype, device=device).expand(shape),
}
"""Name -> creates the tensor that an omitted argument is equivalent to, from a shape."""

REMEDY = "Omit it here, or compile with it among the example inputs."


@dataclass(frozen=True)
class OptionalTensor:
    """A tensor argument whose omission means the same as a certain value.

    Attributes:
        name: The argument.
        value: The name of that value in `VALUES`.
        shape: Its sizes, over the graph's symbols.
        without: Paths of the outputs that the model does not return if the argument is omitted, such as a loss.
    """

    name: str
    value: str
    shape: tuple[Size, ...]
    without: tuple[str, ...] = ()

    def make(self, sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Creates the tensor that the omitted argument is equivalent to."""
        return VALUES[self.value](*(evaluate(size, sizes) for size in self.shape), dtype=dtype, device=device)

    def check(self, given: Any, sizes: Mapping[str, int]) -> None:
        """Raises InputError unless `given`, which is not a graph input, means the same as omitting it.

        On a GPU this synchronizes the device. Under `torch.compile` with `fullgraph=True`, Dynamo raises an error.
        """
        problem = f"the argument {self.name!r} was not given at capture, where omitting it means {self.value}"
        if not isinstance(given, torch.Tensor):
            raise InputError(problem, got=type(given).__name__, need="a tensor", fix=REMEDY)
        if given.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InputError(problem, got="a tensor whose values cannot be read in a CUDA graph", fix=REMEDY)
        shape = tuple(evaluate(size, sizes) for size in self.shape)
        if tuple(given.shape) != shape:
            raise InputError(problem, got=f"shape {tuple(given.shape)}", need=f"shape {shape}", fix=REMEDY)
        if not bool((given == self.make(sizes, torch.int64, given.device)).all()):
            raise InputError(problem, got="other entries", fix=REMEDY)


@dataclass(frozen=True)
class Leeway:
    """What a call may omit or add.

    Attributes:
        implied: Non-tensor arguments -> the value that the model uses if they are None or omitted.
        optional: Tensor arguments that may be omitted; those that were not captured may be passed with that value.
        ignored: Inputs of which the graph reads at most the sizes: any tensor is accepted.
        widened: Integer inputs that also accept narrower integer dtypes.
    """

    implied: Mapping[str, Any] = field(default_factory=dict)
    optional: tuple[OptionalTensor, ...] = ()
    ignored: tuple[str, ...] = ()
    widened: tuple[str, ...] = ()

    def find(self, name: str) -> OptionalTensor | None:
        """Returns the optional tensor of that name."""
        return next((optional for optional in self.optional if optional.name == name), None)

    def same_constant(self, name: str, left: Any, right: Any) -> bool:
        """Whether two values of an argument mean the same: they are equal, or None implies the other one."""
        left, right = (self.implied.get(name) if value is None else value for value in (left, right))
        return type(left) is type(right) and bool(left == right)

    def may_add(self, name: str, value: Any, default: Any) -> bool:
        """Whether an argument that was not captured means the same as omitting it, by its value alone."""
        if value is default or (type(value) is type(default) and type(value) in PLAIN and value == default):
            return True
        if name in self.implied:
            return self.same_constant(name, value, None)
        return value is None and self.find(name) is not None


PLAIN = (bool, int, float, str)


def without_outputs(spec: pytree.TreeSpec, paths: Sequence[str], dropped: frozenset[str]) -> pytree.TreeSpec:
    """Returns the structure of a result without some of its entries.

    Args:
        spec: The whole structure.
        paths: The path of each leaf of `spec`.
        dropped: The paths to remove: all leaves of some entries of the outermost container.
    """
    kept, start = [], 0
    for index, child in enumerate(spec.children()):
        if not set(paths[start : start + child.num_leaves]) <= dropped or not child.num_leaves:
            kept.append(index)
        start += child.num_leaves
    keyed = isinstance(spec.context, list) and len(spec.context) == spec.num_children
    context = [spec.context[index] for index in kept] if keyed else spec.context
    return pytree.TreeSpec(spec.type, context, [spec.children()[index] for index in kept])
