"""Answers a model's Python questions about data from the example, and checks the answers in each later call.

    if mask.any():            ->   core.expect(any == False) {message = "... if mask.any(): (model.py:10) is False"}
    for n in sizes.tolist():  ->   core.expect(sizes[0] == 4) {message = "..."}, and so on

The graph is valid for all inputs that lead to the same answers. This is useful if answers depend on a mask or on image
sizes, and useless if they depend on activations: a router chooses differently in each call. So an answer may depend on
integer and boolean inputs and buffers, but not on floating-point ones, parameters, or random numbers.
"""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from traceback import extract_stack
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from qcompiler.capture.locations import is_users, short_path
from qcompiler.errors import CaptureError
from qcompiler.ir.graph import BUFFER, PARAM, Graph
from qcompiler.ir.op import Op
from qcompiler.ir.structure import INPUT
from qcompiler.ir.traits import Effects
from qcompiler.ir.types import TensorType

EXPECTED = "these inputs lead the model's code to a different result than the example: at capture, "
"""Prefix of a check's message."""

MOST_NAMED = 3
"""Maximum number of source lines that the warning names."""

QUESTIONS: dict[Any, type] = {
    Tensor.__bool__: bool, Tensor.__int__: int, Tensor.__index__: int, Tensor.__float__: float, Tensor.item: object,
}  # fmt: skip
"""Operators that turn a one-element tensor into a Python value, with that value's type."""

MOST_ANSWERS = 1000
"""Maximum number of questions; a model that asks more decides element by element."""


class DataDependent(CaptureError):
    """The model's Python code branches on the values of a tensor."""


@contextmanager
def answers_of_example() -> Iterator[None]:
    """Makes torch.export compute with the example's values and answer questions about data from them.

    Raises:
        DataDependent: Raised inside the block if the model asks more than MOST_ANSWERS times.
    """
    with values_of_example(), _Answers():
        yield


def values_of_example() -> AbstractContextManager[Any]:
    """Makes traced tensors carry the example's values; also needed when the traced program is decomposed."""
    patched: AbstractContextManager[Any] = config.patch(
        fake_tensor_propagate_real_tensors=True,
        generate_fake_kernels_from_real_mismatches=True,  # torch's fake kernel for sums of int32 has another dtype
    )
    return patched


def settle(graph: Graph, learned: Collection[str]) -> list[str]:
    """Removes checks that no input can fail; returns a clause about the others for the user, if any.

    Args:
        graph: The imported graph; changed in place.
        learned: Names of the weights that are parameters of the model.

    Raises:
        DataDependent: An answer depends on a parameter, a floating-point input or buffer, or random numbers.
    """
    lines: dict[str, None] = {}
    changing: set[Op] = set()  # what may differ between calls
    varying: set[Op] = set()  # what differs in nearly every call, or is made of parameters
    for op in graph:
        sources = [value.op for _, value in op.operands()]
        if _changes(op) or not changing.isdisjoint(sources):
            changing.add(op)
        if _varies(op, learned) or not varying.isdisjoint(sources):
            varying.add(op)
        if op.name != "core.expect":
            continue
        if changing.isdisjoint(sources):
            graph.erase(op)
        elif not varying.isdisjoint(sources):
            raise DataDependent("the model's control flow depends on activations", where=str(op.loc) or None)
        else:
            lines[f"{op.loc.file}:{op.loc.line}" if op.loc.file else "an unknown location"] = None
    if not lines:
        return []
    more = f" and {len(lines) - MOST_NAMED} more locations" if len(lines) > MOST_NAMED else ""
    named = ", ".join([*lines][:MOST_NAMED])
    return [f"tensor values that the model's code reads are fixed to the example's ({named}{more})"]


def _changes(op: Op) -> bool:
    """Whether an operation itself brings something into the graph that may differ between calls."""
    return op.name in (INPUT, BUFFER) or _is_chance(op)


def _varies(op: Op, learned: Collection[str]) -> bool:
    """Whether an operation is a parameter, a floating-point input or buffer, or gives results by chance."""
    if op.name in (INPUT, BUFFER):
        return isinstance(op.result.type, TensorType) and op.result.type.dtype.is_float
    return _is_chance(op) or (op.name == PARAM and op.attrs["name"] in learned)


def _is_chance(op: Op) -> bool:
    return bool(op.effects & (Effects.RANDOM | Effects.COMMUNICATES))


class _Answers(TorchFunctionMode):
    """Answers questions from the example, and records an assertion of each answer in the trace."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func`, or answers it if it reads data of a traced tensor."""
        if func in QUESTIONS and _example(args[0]) is not None:
            answer = self._answer(args[0])
            return answer if QUESTIONS[func] is object else QUESTIONS[func](answer)
        if func is torch.tensor:  # a list may contain traced tensors, whose values torch would read
            args = pytree.tree_map(self._answer, args)
        out = func(*args, **(kwargs or {}))
        for result in pytree.tree_leaves(out):
            if isinstance(result, Tensor) and (known := _example(result)) is not None:
                self._fix_sizes(result, known)
        return out

    def _answer(self, asked: Any) -> Any:
        """Returns the example's value of a traced tensor; anything else unchanged."""
        known = _example(asked) if isinstance(asked, Tensor) else None
        if known is None:
            return asked
        answer = known.item()
        torch._assert_async(asked == answer, self._message(answer))
        return answer

    def _fix_sizes(self, result: Tensor, known: Tensor) -> None:
        """Fixes sizes that depend on data, such as the result of `nonzero`; torch asserts them in the trace."""
        for size, example in zip(result.shape, known.shape, strict=True):
            if isinstance(size, torch.SymInt) and free_unbacked_symbols(size):
                self._message(example)
                torch._check(size == example)

    def _message(self, answer: object) -> str:
        self.count += 1
        if self.count > MOST_ANSWERS:
            raise DataDependent(f"the model's code reads tensor values more than {MOST_ANSWERS} times")
        frame = next((f for f in reversed(extract_stack(limit=40)) if is_users(f.filename)), None)
        place = "" if frame is None else f" ({short_path(frame.filename)}:{frame.lineno})"
        return f"{EXPECTED}{(frame and frame.line) or 'a value'}{place} is {answer}"


def _example(tensor: Tensor) -> Tensor | None:
    """Returns the example's value of a traced tensor; None if the tensor is not traced."""
    inner: Any = tensor
    while isinstance(inner, FunctionalTensor):
        inner = torch._from_functional_tensor(inner.elem)
    return getattr(inner, "real_tensor", None) if isinstance(inner, FakeTensor) else None
