"""Launches of an operator, remembered for operands of one description and made again for others of the same.

What an operator does on the host - checks, the choice of a configuration, strides, constants - depends on the shapes,
strides, element types and alignment of its operands, never on their values. So a call is taken down: which tensors it
allocated and which kernels it launched on what. A later call allocates the same and launches the same, with the new
addresses, and runs none of the code in between. What is taken down is the second call for operands of some shapes: many
are met once only, such as those of a prompt.

    def scale_rows(x, factor):
        out = replay.empty(x.shape, x.dtype, x.device)
        launch(kernel, …, (x, factor, out), …)
        return out

    replayed(scale_rows, "scale_rows", (x, factor), x, factor)

Only what is understood is remembered: each tensor that a kernel is given must lie in an operand, or come from `empty`.
An operator that copied an operand first, or ran one of torch's operators, simply runs again the next time.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from codegen.launching.enqueue import MAPS, Encoder, Kernel, current_device, current_stream, hooked
from codegen.launching.recent import Recent

Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...])


class _State(threading.local):
    """What the thread is doing.

    Attributes:
        tape: Takes down launches and allocations, while a call is taken down.
        planner: Is given each kernel call that is not compiled yet, with its key, and nothing is launched, while
            somebody looks which kernels a call would need.
        problems: Where products that are met are noted, each once, while somebody looks which ones a call makes.
    """

    tape: "_Tape | None" = None
    planner: Callable[[Hashable, Any], None] | None = None
    problems: dict[Any, None] | None = None


state = _State()


class _Place(NamedTuple):
    """Where an argument's address comes from: bytes beyond the start of an operand, or of what was allocated."""

    slot: int
    source: int
    offset: int


class _Descriptor(NamedTuple):
    """Where an encoded descriptor comes from."""

    slot: int
    source: int
    offset: int
    encode: Encoder
    description: tuple[int, ...]


class _Launch(NamedTuple):
    """One launch, with everything in place but addresses."""

    kernel: Kernel
    call: Callable[..., None]
    template: list[Any]
    places: tuple[_Place, ...]
    descriptors: tuple[_Descriptor, ...]


class _Plan(NamedTuple):
    """What a call comes to."""

    device: int
    makers: tuple[Callable[[], Tensor], ...]
    launches: tuple[_Launch, ...]
    results: tuple[int, ...]
    single: bool

    def run(self, addresses: list[int]) -> Any:
        """Allocates and launches, for operands at these addresses; what the call returns."""
        if current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.run(addresses)
        made = [make() for make in self.makers]
        addresses += [tensor.data_ptr() for tensor in made]
        stream = current_stream(self.device)
        for kernel, call, template, places, descriptors in self.launches:
            ready = template.copy()
            for slot, source, offset in places:
                ready[slot] = addresses[source] + offset
            for slot, source, offset, encode, description in descriptors:
                address = addresses[source] + offset
                ready[slot] = MAPS.young.get((description, address)) or encode(description, address)
            if kernel.listed:
                call(stream, *kernel.head, ready)
            else:
                call(stream, *kernel.head, *ready)
        return made[self.results[0]] if self.single else tuple([made[index] for index in self.results])


class _Known(NamedTuple):
    """A plan and the operands it is for.

    Attributes:
        alignment: Their addresses, less whole steps of 16 bytes.
        apart: For operands that share memory, such as the halves of one product: how many bytes the second is behind
            the first. Where that is the same, it does not matter from which of them an address was computed.
        fits: Compares all else.
        plan: What to do.
    """

    alignment: list[int]
    apart: tuple[tuple[int, int, int], ...]
    fits: Callable[..., bool]
    plan: _Plan

    def lie_right(self, addresses: Sequence[int]) -> bool:
        """Whether operands that share memory are as far apart as they were."""
        return all(addresses[second] - addresses[first] == behind for first, second, behind in self.apart)


_KNOWN: Recent[list[_Known]] = Recent(2048)
"""(what, shapes) -> the calls that are remembered; none after the first, and a few that differ in strides or types."""

MOST_VARIANTS = 8
"""Calls of one operator for operands of the same shapes that are remembered."""


def forget() -> None:
    """Forgets all calls: what operators do for the same operands has changed."""
    _KNOWN.clear()


def replayed(
    run: Callable[..., Result], what: Hashable, operands: Sequence[Tensor | None], *arguments: Any
) -> Result:  # fmt: skip
    """`run(*arguments)`, or the launches of an earlier such call.

    Args:
        run: An operator on a CUDA device; it returns one or several of the tensors that it got from `empty`.
        what: Everything that its launches depend on beside the operands, the operator's own name included.
        operands: All tensors among the arguments.
        arguments: Of `run`.
    """
    if state.tape is not None:
        state.tape.whole = False  # what launches are remembered apart is no part of the call around it
    if state.planner is not None or hooked():
        return run(*arguments)
    given = [tensor for tensor in operands if tensor is not None]
    addresses = [tensor.data_ptr() for tensor in given]
    key = (what, *[None if tensor is None else tensor.shape for tensor in operands])
    known = _KNOWN.get(key)
    if known is None:
        _KNOWN.put(key, [])
        return run(*arguments)
    alignment = [address & 15 for address in addresses]
    for each in known:
        if each.alignment == alignment and each.fits(*given) and each.lie_right(addresses):
            result: Result = each.plan.run(addresses)
            return result
    outer, state.tape = state.tape, _Tape(given)
    try:
        made = run(*arguments)
        plan = state.tape.plan(made)
    finally:
        state.tape = outer
    if plan is not None:
        new = _Known(alignment, _distances(given), _comparison(given), plan)
        _KNOWN.put(key, [new, *known[: MOST_VARIANTS - 1]])
    return made


def _distances(tensors: Sequence[Tensor]) -> tuple[tuple[int, int, int], ...]:
    """Pairs of tensors that share memory, the first of all that do and another, with the bytes between their starts."""
    first: dict[int, int] = {}
    pairs = []
    for index, tensor in enumerate(tensors):
        before = first.setdefault(tensor.untyped_storage().data_ptr(), index)
        if before != index:
            pairs.append((before, index, tensor.data_ptr() - tensors[before].data_ptr()))
    return tuple(pairs)


def _comparison(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Tells whether other tensors have the same shapes, strides, element types and devices as these.

    It is torch.compile's own guard, written in C++, where torch has it: attributes one by one take as long as a launch.
    """
    guards = getattr(torch._C._dynamo.guards, "TensorGuards", None)
    if guards is not None:
        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        check: Callable[..., bool] = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check
    wanted = [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]
    return lambda *given: [(t.shape, t.stride(), t.dtype, t.device) for t in given] == wanted


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, strides: Sequence[int] | None = None
) -> Tensor:  # fmt: skip
    """Memory for a result or for partial sums, of any content; contiguous unless `strides` are given.

    For what `launch`ed kernels write, and nobody else: a remembered call runs none of torch's operators.
    """
    made = (
        torch.empty(shape, dtype=dtype, device=device)
        if strides is None
        else torch.empty_strided(shape, strides, dtype=dtype, device=device)
    )  # fmt: skip
    if state.tape is not None:
        state.tape.made.append(made)
    return made


class _Tape:
    """Takes down one call."""

    def __init__(self, operands: Sequence[Tensor]) -> None:
        self.operands, self.made, self.whole = operands, list[Tensor](), True
        self._launches: list[tuple[Kernel, int, Sequence[Any]]] = []

    def note(self, kernel: Kernel, programs: int, arguments: Sequence[Any]) -> None:
        """One launch."""
        self._launches.append((kernel, programs, arguments))

    def plan(self, returned: Tensor | tuple[Tensor, ...]) -> _Plan | None:
        """How to make the call again; None where that is not known."""
        results = returned if isinstance(returned, tuple) else (returned,)
        indices = [next((i for i, each in enumerate(self.made) if each is result), None) for result in results]
        starts = self._starts()
        if not self.whole or None in indices or not self._launches:
            return None
        launches = [_launch(*each, starts) for each in self._launches]
        if None in launches:
            return None
        whole: Any = (tuple(map(_maker, self.made)), tuple(launches), tuple(indices), isinstance(returned, Tensor))
        return _Plan(self.made[0].get_device(), *whole)

    def _starts(self) -> dict[int, tuple[int, int]]:
        """Storage -> which operand, the first of several, or allocation begins where in it."""
        starts: dict[int, tuple[int, int]] = {}
        for index, tensor in enumerate((*self.operands, *self.made)):
            if tensor.numel():
                starts.setdefault(tensor.untyped_storage().data_ptr(), (index, tensor.data_ptr()))
        return starts


def _maker(tensor: Tensor) -> Callable[[], Tensor]:
    """Makes an empty tensor like this one; on the current device, where torch can do it without its dispatcher."""
    sizes, strides = tuple(tensor.shape), tensor.stride()
    quick = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None) if tensor.is_cuda else None
    if quick is not None:
        return partial(quick, sizes, strides, tensor.dtype)
    return partial(torch.empty_strided, sizes, strides, dtype=tensor.dtype, device=tensor.device)


def _launch(
    kernel: Kernel, programs: int, arguments: Sequence[Any], starts: dict[int, tuple[int, int]]
) -> _Launch | None:  # fmt: skip
    """A launch with the places of its addresses; None where a tensor is not known, or Triton's own way is taken."""
    if kernel.path == "plain":
        return None
    places: list[_Place] = []
    descriptors: list[_Descriptor] = []
    template: list[Any] = []
    for argument, encoder in zip(arguments, kernel.encoders, strict=True):
        tensor = argument if encoder is None else argument.base
        if not isinstance(tensor, Tensor):
            template.append(argument)
            continue
        found = starts.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return None
        source, start = found
        slot, offset = len(template), tensor.data_ptr() - start
        template.append(0)
        if encoder is None:
            places.append(_Place(slot, source, offset))
        else:
            description = encoder.describe(argument.shape, argument.strides)
            descriptors.append(_Descriptor(slot, source, offset, encoder, description))
            template += [*argument.shape, *argument.strides]
    call, template = partial(kernel.raw, programs, 1, 1), [*template, *kernel.constants]
    return _Launch(kernel, call, template, tuple(places), tuple(descriptors))
